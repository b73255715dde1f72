"""Fine-tuned models that are never whole in memory: files tensor by tensor, LoRAs by their factors."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_moe_merge import WEMoEConfig, merge_finetuned
from peft_moe_merge.model_merging.finetuned import load_task_vectors
from peft_moe_merge.model_merging.sources import LoraTensors
from peft_moe_merge.model_merging.static import merge_static
from peft_moe_merge.tuners.wemoe.task_vectors import truncate, truncate_factors
from tests.wemoe_clip import TASKS, finetune, small_clip

TARGETS = r".*vision_model.*(fc1|fc2|q_proj)"


def lora(base, seed, r=3, **options):
    torch.manual_seed(seed)
    return get_peft_model(
        copy.deepcopy(base), LoraConfig(r=r, target_modules=TARGETS, init_lora_weights=False, **options)
    )


def merged(model):
    return copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 5}, {"rank_pattern": {"fc1": 5}}])
def test_a_lora_by_its_factors_is_the_merged_model(options, tmp_path):
    base = small_clip()
    wants = [p.requires_grad for p in base.parameters()]
    model = lora(base, 1, **options)
    model.save_pretrained(tmp_path)
    whole = dict(merged(model).named_parameters())
    for form in (model, tmp_path):
        vectors = load_task_vectors(base, {"a": form})
        assert isinstance(vectors.finetuned["a"], LoraTensors)
        assert {n for n, p in whole.items() if not torch.equal(p, base.get_parameter(n))} == vectors.changed()
        for name in vectors.changed():
            torch.testing.assert_close(vectors.finetuned["a"][name], whole[name].detach(), rtol=1e-5, atol=1e-6)
            expected = whole[name].detach() - base.get_parameter(name).detach()
            torch.testing.assert_close(vectors.delta("a", name), expected, rtol=1e-4, atol=1e-6)
    assert [p.requires_grad for p in base.parameters()] == wants
    assert not any("lora" in name for name, _ in base.named_modules())


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"modules_to_save": ["post_layernorm"]}, {"bias": "lora_only"}]
)
def test_more_than_plain_factors_is_merged_by_peft(options):
    base = small_clip()
    model = lora(base, 1, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name or name.endswith("fc1.base_layer.bias"):
                p.add_(0.1)
    vectors = load_task_vectors(base, {"a": model})
    assert not isinstance(vectors.finetuned["a"], LoraTensors)
    for name, p in merged(model).named_parameters():
        torch.testing.assert_close(base.get_parameter(name) + vectors.delta("a", name), p, rtol=1e-5, atol=1e-6)


def test_a_lora_on_another_base_is_not_taken_by_its_factors():
    base, other = small_clip(0), small_clip(1)
    vectors = load_task_vectors(base, {"a": lora(other, 1)})
    torch.testing.assert_close(
        vectors.delta("a", "visual_projection.weight"),
        (other.visual_projection.weight - base.visual_projection.weight).detach(),
    )


@pytest.mark.parametrize("rank", [1, 2, 3, 7])
def test_factors_truncate_as_their_products_do(rank):
    g = torch.Generator().manual_seed(0)
    factors = [(torch.randn(20, r, generator=g), torch.randn(r, 12, generator=g)) for r in (3, 2, 0)]
    products = torch.stack([up @ down for up, down in factors])
    down_TRI, up_TRO = truncate_factors(factors, rank)
    expected_down, expected_up = truncate(products, rank)
    assert down_TRI.shape == expected_down.shape and up_TRO.shape == expected_up.shape
    torch.testing.assert_close(up_TRO.mT @ down_TRI, expected_up.mT @ expected_down, rtol=1e-3, atol=1e-4)
    lengths = down_TRI.norm(dim=2)
    torch.testing.assert_close(lengths, (lengths > 0.5).float(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_wemoe_of_loras_is_the_one_of_merged_copies():
    base = small_clip()
    loras = {task: lora(base, seed, r=2 + seed) for seed, task in enumerate(TASKS)}
    config, images = WEMoEConfig(rank=4, router_depth=0), torch.randn(2, 3, 16, 16)
    torch.manual_seed(0)
    expected = merge_finetuned(copy.deepcopy(base), {t: merged(m) for t, m in loras.items()}, config)
    actual = merge_finetuned(copy.deepcopy(base), loras, config)
    for model in (actual, expected):
        for block in model.base_model.model.vision_model.encoder.layers:
            block.mlp.wemoe_router["default"].bias.copy_(torch.tensor([0.2, 0.9, -0.4]))
    out = [m.get_image_features(pixel_values=images).pooler_output for m in (actual, expected)]
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-5)
    static = [merge_static(base, source, "ties") for source in (loras, {t: merged(m) for t, m in loras.items()})]
    for (name, one), two in zip(static[0].named_parameters(), static[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("shard", ["10KB", "5GB"])
def test_folders_are_read_tensor_by_tensor(shard, tmp_path, monkeypatch):
    base = small_clip()
    copies = {task: finetune(base, seed) for seed, task in enumerate(TASKS)}
    for task, model in copies.items():
        model.save_pretrained(tmp_path / task, max_shard_size=shard)
    assert (len(list((tmp_path / TASKS[0]).glob("*.safetensors"))) > 1) == (shard == "10KB")
    monkeypatch.setattr(type(base), "from_pretrained", None)  # a whole model can't be loaded now
    vectors = load_task_vectors(base, {task: tmp_path / task for task in TASKS})
    for task, model in copies.items():
        for name, parameter in model.named_parameters():
            assert torch.equal(vectors.delta(task, name), (parameter - base.get_parameter(name)).detach())
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(vectors.summed(name), vectors.stacked(name).sum(0))
    assert vectors.finetuned[TASKS[0]][name] is not vectors.finetuned[TASKS[0]][name]  # read anew, kept by nobody
