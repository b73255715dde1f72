"""Damaged adapters and selectors: an exception that names the file, or the very outputs that were saved."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from wemoe_clip import TASKS, finetune, small_clip, stir_routers

from peft_moe_merge import MoELoraMergeConfig, WEMoEConfig, merge_finetuned
from peft_moe_merge.selection import SELECTORS, load_selector, save_selector

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Mixture:
    base, options, selector = staticmethod(tiny_clip), {}, None

    def __init__(self, **options):
        self.options = options

    def save(self, folder, name="default"):
        torch.manual_seed(0)
        config = MoELoraMergeConfig(num_experts=4, r=2, tasks=["a", "b"], **self.options)
        model = get_peft_model(tiny_clip(), config, adapter_name=name)
        randomize(model)
        if self.options.get("modules_to_save"):
            model.base_model.model.visual_projection.modules_to_save[name].weight.data.mul_(2)
        model.save_pretrained(folder)

    def run(self, model):
        with torch.no_grad():
            return model.eval()(**tiny_batch(), task_ids=torch.tensor([0, 1, -1, 1])).logits_per_image

    def outputs(self, folder, door=0):
        if door == 1:  # the configuration is handed over
            return self.run(PeftModel.from_pretrained(self.base(), folder, config=PeftConfig.from_pretrained(folder)))
        return self.run(PeftModel.from_pretrained(self.base(), folder, adapter_name=("default", "", "other")[door]))


class WEMoE(Mixture):
    base = staticmethod(small_clip)

    def save(self, folder, name="default"):
        base = small_clip()
        torch.manual_seed(0)
        tuned = {task: finetune(base, seed) for seed, task in enumerate(TASKS)}
        model = merge_finetuned(base, tuned, WEMoEConfig(**self.options), adapter_name=name)
        stir_routers(model)
        model.save_pretrained(folder)

    def run(self, model):
        with torch.no_grad():
            return model.eval().get_image_features(pixel_values=IMAGES).pooler_output


class Alone:
    """A selector in a folder of its own."""

    def __init__(self, kind):
        self.kind = kind

    def save(self, folder):
        options = {"iterations": 5, "bottleneck": 2} if self.kind == "autoencoder" else {}
        selector = SELECTORS[self.kind](reject_rate=0.2, **options)
        for task in range(2):
            generator = torch.Generator().manual_seed(task)
            features = torch.randn(40, 6, generator=generator) + 3 * task
            texts = torch.randn(3, 6, generator=generator)
            selector.fit(f"task {task}", [(features, torch.randint(0, 3, (40,), generator=generator))], texts)
        save_selector(selector, folder)

    def outputs(self, folder, door=0):
        features = torch.randn(5, 6, generator=torch.Generator().manual_seed(9))
        return torch.cat([part.double() for part in load_selector(folder).judge(features)])


KINDS = {
    "mixture": Mixture(),
    "mixture and a module": Mixture(modules_to_save=["visual_projection"], routing="token", target_modules=["fc1"]),
    "wemoe": WEMoE(),
    "wemoe shared sparse": WEMoE(shared_router=True, sparsity=0.9),
    "wemoe rank": WEMoE(rank=3, router_depth=1),
    "wemoe projection": WEMoE(gates="projection", gate_rank=2),
    **{f"selector {kind}": Alone(kind) for kind in SELECTORS},
}


# ------------------------------------------------------------------------------------------------------ kinds of damage


def cut(file, rng):
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def flip(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def flip_in_the_header(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.randrange(min(len(content), 8 + int.from_bytes(content[:8], "little")))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def lengthen(file, rng):
    file.write_bytes(file.read_bytes() + bytes(rng.randrange(1, 9)))


def remove(file, rng):
    file.unlink()


def edit_tensors(file, rng):
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    other = rng.choice(sorted(tensors))
    changed = {
        "missing": {},
        "renamed": {name + "s": tensor},
        "of another module": {name: tensor, name.replace("layers.0", "layers.7") + "_": tensor},
        "extra": {name: tensor, "base_model.model.logit_scale": torch.tensor(9.0)},
        "reshaped": {name: tensor.reshape(-1, 1)} if tensor.ndim != 2 or tensor.shape[1] != 1 else {},
        "longer": {name: torch.cat([tensor.flatten(), tensor.flatten()[:1]])},
        "integers": {name: tensor.to(torch.int16 if tensor.is_floating_point() else torch.float32)},
        "nan": {name: torch.full_like(tensor, float("nan"))} if tensor.is_floating_point() else {},
        "infinite": {name: torch.full_like(tensor, float("inf"))} if tensor.is_floating_point() else {},
        "halved": {name: (tensor.float() / 2).to(tensor.dtype)},
        "swapped": {name: tensors[other], other: tensor},
    }
    edit = rng.choice(sorted(changed))
    save_file({key: t.contiguous().clone() for key, t in (tensors | changed[edit]).items()}, file)
    return edit


STRUCTURAL = {"missing", "renamed", "of another module", "extra", "reshaped", "longer", "integers", "nan", "infinite"}


def edit_fields(file, rng):
    described = json.loads(file.read_text())
    where = described
    while True:
        key = rng.choice(sorted(where))
        if isinstance(where[key], dict) and where[key] and rng.random() < 0.7:
            where = where[key]
        else:
            break
    value = where[key]
    nonsense = [None, "", "x", [], {}, -1, 0, 2, 1e30, True, False, ["a"], float("nan")]
    action = rng.choice(("delete", "rename", "replace", "nudge"))
    if action == "delete":
        del where[key]
    elif action == "rename":
        where[key + "_"] = where.pop(key)
    elif action == "nudge" and isinstance(value, (int, float, str)):
        where[key] = value + "x" if isinstance(value, str) else (not value if isinstance(value, bool) else value + 1)
    else:
        where[key] = rng.choice(nonsense)
    file.write_text(json.dumps(described))


DAMAGES = {
    ".safetensors": (cut, flip, flip_in_the_header, lengthen, remove, edit_tensors, edit_tensors),
    ".json": (cut, flip, flip, lengthen, remove, edit_fields, edit_fields, edit_fields),
}


def the_same_or_named(kind, folder, expected, door, what):
    file = what[0]
    try:
        outputs = KINDS[kind].outputs(folder, door)
    except Exception as error:  # whatever it is, it has to say where
        assert isinstance(error, (ValueError, TypeError, OSError)), (what, door, repr(error))
        assert file.name in str(error), (what, door, repr(error))
        return False
    assert torch.equal(outputs, expected), (what, door)
    return True


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each kind once: the folder and its outputs."""
    done = {}

    def make(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp("saved")
            KINDS[kind].save(folder)
            done[kind] = folder, KINDS[kind].outputs(folder)
        return done[kind]

    return make


def damage_many(kind, saved, seeds, into):
    folder, expected = saved(kind)
    refused = 0
    for seed in seeds:
        rng = random.Random(seed)
        shutil.rmtree(into, ignore_errors=True)
        shutil.copytree(folder, into)
        file = rng.choice(sorted(f for f in into.iterdir() if f.suffix in DAMAGES))
        damage = rng.choice(DAMAGES[file.suffix])
        edit = damage(file, rng)
        refused += not the_same_or_named(kind, into, expected, rng.randrange(3), (file, damage.__name__, edit, seed))
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_or_harmless(kind, saved, tmp_path):
    assert damage_many(kind, saved, range(24), tmp_path / "damaged") >= 18


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage_is_named_or_harmless(kind, saved, tmp_path):
    damage_many(kind, saved, range(1000, 1400), tmp_path / "damaged")


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_older_releases_have_no_checksums_and_are_checked_by_structure(kind, saved, tmp_path):
    folder, expected = saved(kind)
    shutil.copytree(folder, tmp_path / "old")
    described = next(f for f in (tmp_path / "old").iterdir() if f.suffix == ".json")
    fields = json.loads(described.read_text())
    assert set(fields["checksums"]) == {f.name for f in folder.iterdir() if f.suffix in DAMAGES}
    del fields["checksums"]
    described.write_text(json.dumps(fields))
    assert torch.equal(KINDS[kind].outputs(tmp_path / "old"), expected)
    tried = set()
    for seed in range(40):
        rng, into = random.Random(seed), tmp_path / f"{seed}"
        shutil.copytree(tmp_path / "old", into)
        file = next(f for f in into.iterdir() if f.suffix == ".safetensors")
        edit = edit_tensors(file, rng)
        if edit in STRUCTURAL:
            the_same_or_named(kind, into, expected, 0, (file, edit, seed))
            tried.add(edit)
        shutil.rmtree(into)
    assert len(tried) > 5


# ---------------------------------------------------------------------------------------------- what the messages advise


def test_an_edit_made_on_purpose_is_kept_by_deleting_the_checksums(saved, tmp_path):
    folder, expected = saved("wemoe rank")
    shutil.copytree(folder, tmp_path / "edited")
    file = tmp_path / "edited" / "adapter_config.json"
    fields = json.loads(file.read_text())
    fields["base_model_name_or_path"] = "me/another-name"
    file.write_text(json.dumps(fields))
    assert torch.equal(KINDS["wemoe rank"].outputs(tmp_path / "edited"), expected)  # where the base is may be edited

    tensors = load_file(tmp_path / "edited" / "adapter_model.safetensors")
    save_file({name: t * 2 for name, t in tensors.items()}, tmp_path / "edited" / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match="adapter_model.safetensors' is damaged.*delete 'checksums' from 'adapter_conf"
    ):
        KINDS["wemoe rank"].outputs(tmp_path / "edited")
    del fields["checksums"]
    file.write_text(json.dumps(fields))
    assert not torch.equal(KINDS["wemoe rank"].outputs(tmp_path / "edited"), expected)


def test_a_config_that_is_read_changed_and_written_has_new_checksums(saved, tmp_path):
    folder, _ = saved("mixture")
    shutil.copytree(folder, tmp_path / "b")
    config = MoELoraMergeConfig.from_pretrained(tmp_path / "b")
    config.current_task = "b"
    config.save_pretrained(tmp_path / "b")
    assert PeftModel.from_pretrained(tiny_clip(), tmp_path / "b").peft_config["default"].current_task == "b"


def test_weights_of_another_adapter_are_noticed(tmp_path):
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_clip(), MoELoraMergeConfig(num_experts=4, r=2, tasks=["a"]))
        randomize(model, seed)
        model.save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", tmp_path / "one" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not belong to"):
        PeftModel.from_pretrained(tiny_clip(), tmp_path / "one")


def test_an_adapter_that_does_not_load_leaves_nothing_behind(saved, tmp_path):
    folder, _ = saved("wemoe")
    shutil.copytree(folder, tmp_path / "damaged")
    file = tmp_path / "damaged" / "adapter_model.safetensors"
    model = PeftModel.from_pretrained(small_clip(), folder)
    before = KINDS["wemoe"].run(model)
    for damage in (flip, cut):
        damage(file, random.Random(0))
        for name in ("other", "default"):
            with pytest.raises(ValueError, match="adapter_model.safetensors"):
                model.load_adapter(tmp_path / "damaged", name)
        assert list(model.peft_config) == ["default"]
        assert torch.equal(KINDS["wemoe"].run(model), before)


# ------------------------------------------------------------------------------------------------------ names and pickles


@pytest.mark.parametrize("name", ["cars", "wemoe", "an_adapter"])
@pytest.mark.parametrize("kind", ["wemoe", "wemoe shared sparse", "mixture"])
def test_any_name_of_an_adapter(kind, name, saved, tmp_path):
    _, expected = saved(kind)
    KINDS[kind].save(tmp_path, name)
    for other in ("default", name, "another"):
        model = PeftModel.from_pretrained(KINDS[kind].base(), tmp_path / name, adapter_name=other)
        assert torch.equal(KINDS[kind].run(model), expected)


@pytest.mark.parametrize("name", ["weight", "hidden", "mlp", "0"])
def test_a_name_that_the_weights_have_too_is_refused(name):
    with pytest.raises(ValueError, match=f"An adapter can't be called '{name}'"):
        merge_finetuned(small_clip(), {"a": finetune(small_clip(), 1)}, WEMoEConfig(), adapter_name=name)
    model = merge_finetuned(small_clip(), {"a": finetune(small_clip(), 1)}, WEMoEConfig())
    with pytest.raises(ValueError, match=f"An adapter can't be called '{name}'"):
        model.add_adapter(name, WEMoEConfig(tasks=["a"]))
    assert list(model.peft_config) == ["default"]


def test_files_in_which_release_0_1_left_the_name_of_the_adapter(saved, tmp_path):
    folder, expected = saved("wemoe")
    shutil.copytree(folder, tmp_path / "old")
    file = tmp_path / "old" / "adapter_model.safetensors"
    tensors = {n.replace("wemoe_router.hidden", "wemoe_router.cars.hidden"): t for n, t in load_file(file).items()}
    assert sum(".cars.hidden." in name for name in tensors) == 4
    save_file(tensors, file)
    fields = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    del fields["checksums"]
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(fields))
    for name in ("default", "cars", "other"):
        model = PeftModel.from_pretrained(small_clip(), tmp_path / "old", adapter_name=name)
        assert torch.equal(KINDS["wemoe"].run(model), expected)


@pytest.mark.parametrize("kind", ["mixture", "wemoe"])
def test_no_door_leads_to_a_pickle(kind, saved, tmp_path, monkeypatch):
    folder, expected = saved(kind)
    shutil.copytree(folder, tmp_path / "pickled")
    weights = tmp_path / "pickled" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled" / "adapter_model.bin")  # one that would load
    base = KINDS[kind].base
    config_cls = {"mixture": MoELoraMergeConfig, "wemoe": WEMoEConfig}[kind]
    config = config_cls.from_pretrained(tmp_path / "pickled")
    assert torch.equal(KINDS[kind].outputs(tmp_path / "pickled", door=1), expected)  # safetensors come first
    weights.unlink()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    model = PeftModel.from_pretrained(base(), folder)
    base().save_pretrained(tmp_path / "base")
    fields = json.loads((tmp_path / "pickled" / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "pickled" / "adapter_config.json").write_text(json.dumps(fields))
    for load in (
        lambda: PeftModel.from_pretrained(base(), tmp_path / "pickled"),
        lambda: PeftModel.from_pretrained(base(), tmp_path / "pickled", config=config),
        lambda: PeftModel.from_pretrained(
            base(), tmp_path / "pickled", config=PeftConfig.from_pretrained(tmp_path / "pickled")
        ),
        lambda: AutoPeftModel.from_pretrained(tmp_path / "pickled"),
        lambda: model.load_adapter(tmp_path / "pickled", "other"),
        lambda: model.load_adapter(tmp_path / "pickled", "default"),
        lambda: config_cls.from_pretrained(tmp_path / "pickled"),
        lambda: base().load_adapter(tmp_path / "pickled"),  # transformers' own
    ):
        with pytest.raises(ValueError, match="a pickle file"):
            load()


def test_transformers_own_door_notices_damage(saved, tmp_path):
    folder, expected = saved("wemoe rank")
    shutil.copytree(folder, tmp_path / "copy")
    model = small_clip()
    model.load_adapter(tmp_path / "copy")
    assert torch.equal(KINDS["wemoe rank"].run(model), expected)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        for damage in (flip, cut):
            shutil.copy(folder / name, tmp_path / "copy" / name)
            damage(tmp_path / "copy" / name, random.Random(1))
            with pytest.raises(ValueError, match=name):
                small_clip().load_adapter(tmp_path / "copy")
        shutil.copy(folder / name, tmp_path / "copy" / name)


def test_adapters_of_other_methods_load_as_ever(tmp_path):
    from peft import LoraConfig

    torch.manual_seed(0)
    lora = get_peft_model(small_clip(), LoraConfig(target_modules=["fc1"], init_lora_weights=False)).eval()
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_clip(), tmp_path)
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert torch.equal(KINDS["wemoe"].run(loaded), KINDS["wemoe"].run(lora))
    plain = small_clip()
    plain.load_adapter(tmp_path)
    assert torch.equal(KINDS["wemoe"].run(plain), KINDS["wemoe"].run(lora))
    Path(tmp_path, "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json' is damaged"):
        PeftModel.from_pretrained(small_clip(), tmp_path)
