"""PEFT knows our methods after one import, wherever and however often it happens."""

import copy
import pickle
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peft_moe_merge import MoELoraMergeConfig, MoELoraMergeModel
from peft_moe_merge.tuners.registration import peft_type, register


def test_member_behaves_as_pefts_own():
    member = PeftType("MOE_LORA_MERGE")
    assert member is PeftType.MOE_LORA_MERGE is PeftType["MOE_LORA_MERGE"] is peft_type("MOE_LORA_MERGE")
    assert list(PeftType).count(member) == 1
    assert member == "MOE_LORA_MERGE" and member.value == member.name == "MOE_LORA_MERGE"
    assert isinstance(member, PeftType) and member != PeftType.LORA
    assert {PeftType.LORA: 1, member: 2}["MOE_LORA_MERGE"] == 2
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is MoELoraMergeConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is MoELoraMergeModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "moe_lora_"


@pytest.mark.parametrize("what", [PeftType("MOE_LORA_MERGE"), MoELoraMergeConfig(num_experts=7)])
def test_unpickles_in_a_process_that_has_not_imported_us(what):
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer))"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(what), capture_output=True, check=True)
    assert b"MOE_LORA_MERGE" in done.stdout and (not isinstance(what, MoELoraMergeConfig) or b"=7" in done.stdout)


def test_imported_twice():
    code = """
import sys, peft_moe_merge
first = peft_moe_merge.MoELoraMergeConfig
for name in [name for name in sys.modules if name.partition(".")[0] == "peft_moe_merge"]:
    del sys.modules[name]
import peft_moe_merge, peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
member = peft.PeftType("MOE_LORA_MERGE")
assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is peft_moe_merge.MoELoraMergeConfig is not first
assert list(peft.PeftType).count(member) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_refuses_a_name_that_is_somebody_elses():
    with pytest.raises(KeyError, match="lora"):
        register(name="lora", prefix="lora_", config_cls=MoELoraMergeConfig, model_cls=MoELoraMergeModel)
