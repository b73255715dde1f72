"""Vision towers other than CLIP's, each against the method written out: one image, one task, one tensor at a time."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from peft_moe_merge import WEMoEConfig, merge_finetuned
from peft_moe_merge.tuners.wemoe.layer import WEMoEBlock
from peft_moe_merge.tuners.wemoe.model import default_targets
from tests.wemoe_clip import TASKS, finetune, stir_routers

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
MLP = {"intermediate_size": 24}


def siglip():
    text = {**MLP, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return SiglipModel(SiglipConfig(vision_config={**SIZE, **MLP}, text_config={**text, **tokens}))


TOWERS = {
    "siglip": siglip,
    "siglip_vision": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZE, **MLP)),
    "vit": lambda: ViTModel(ViTConfig(**SIZE, **MLP)),
    "vit_classifier": lambda: ViTForImageClassification(ViTConfig(**SIZE, **MLP, num_labels=5)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZE, mlp_ratio=2, layerscale_value=0.5)),
    "dinov2_swiglu": lambda: Dinov2Model(Dinov2Config(**SIZE, mlp_ratio=2, use_swiglu_ffn=True)),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZE, mlp_ratio=2)),
}


def outputs(model, pixels):
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=pixels).pooler_output
    out = model(pixel_values=pixels)
    return out.logits if "logits" in out else out.last_hidden_state


class Outputs(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return outputs(self.model, pixels)


def reference(base, tuned, images, routers, scaling):
    """Each block's gates come from a hook on it, which then runs the block with weights of this image's own."""
    theta = {name: p.detach() for name, p in base.named_parameters()}
    tau = [{name: p.detach() - theta[name] for name, p in model.named_parameters()} for model in tuned.values()]
    answers = []
    for image in images:
        model = copy.deepcopy(base)
        for block_name, router in routers.items():
            block, plain = model.get_submodule(block_name), copy.deepcopy(base.get_submodule(block_name))

            def run(h_1SH, block_name=block_name, router=router, plain=plain):
                gate_T = torch.stack([router(token[None, None])[0] for token in h_1SH[0]]).mean(0)
                own = {}
                for name in dict(plain.named_parameters()):
                    own[name] = theta[f"{block_name}.{name}"].clone()
                    for gate, changes in zip(gate_T, tau, strict=True):
                        own[name] += gate * changes[f"{block_name}.{name}"]
                return functional_call(plain, own, (h_1SH,))

            block.forward = run
        inside = tuple(f"{name}." for name in routers)
        merged = {
            f"model.{name}": p if name.startswith(inside) else p + scaling * sum(changes[name] for changes in tau)
            for name, p in theta.items()
        }
        answers.append(functional_call(Outputs(model), merged, (image[None],))[0])
    return torch.stack(answers)


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_a_tower_follows_the_loop_over_images(tower):
    torch.manual_seed(0)
    base = TOWERS[tower]().eval().requires_grad_(False)  # kernels may differ by it, in the last bit
    part = "vision_model." if tower == "siglip" else ""
    tuned = {task: finetune(base, seed, part) for seed, task in enumerate(TASKS)}
    model = merge_finetuned(copy.deepcopy(base), tuned, WEMoEConfig())
    stir_routers(model)
    blocks = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, WEMoEBlock)}
    assert len(blocks) == 2 and all("head" not in name and "text_model" not in name for name in blocks)
    images = torch.randn(3, 3, 16, 16)
    routers = {name: block.wemoe_router["default"] for name, block in blocks.items()}
    expected = reference(base, tuned, images, routers, scaling=0.3)
    torch.testing.assert_close(outputs(model, images), expected, rtol=1e-4, atol=1e-5)
    assert (expected - outputs(base, images)).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(outputs(model, images), outputs(base, images))


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_projection_gates_find_every_linear_layer_of_the_blocks(tower):
    torch.manual_seed(0)
    base = TOWERS[tower]().eval().requires_grad_(False)  # kernels may differ by it, in the last bit
    part = "vision_model." if tower == "siglip" else ""
    tuned = finetune(base, 1, part)
    config = WEMoEConfig(gates="projection", rank=16)
    model = merge_finetuned(copy.deepcopy(base), {"a": tuned}, config)
    within = [n for n, _ in base.named_modules() if n.split(".")[-1].isdigit() and "text_model" not in n]
    assert len(within) == 2
    expected = {
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(f"{block}." for block in within))
    }
    # one task: its gate is 1, and each targeted layer is the fine-tuned one
    mixed = copy.deepcopy(base)
    for name in expected:
        mixed.get_submodule(name).load_state_dict(tuned.get_submodule(name).state_dict())
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(outputs(model, images), outputs(mixed, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_folders_of_a_tower_merge_as_models_in_memory_do_and_load_again(tower, tmp_path, monkeypatch):
    torch.manual_seed(0)
    base = TOWERS[tower]().eval().requires_grad_(False)
    copied = finetune(base, 1, "vision_model." if tower == "siglip" else "")
    targets = default_targets("projection", base.config)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    for name, model in {"base": base, "copied": copied, "lora": lora}.items():
        model.save_pretrained(tmp_path / name)
    merged = {"copied": copied, "lora": copy.deepcopy(lora).merge_and_unload()}
    fresh = type(base).from_pretrained(tmp_path / "base").eval()
    for options in ({}, {"rank": 4}, {"sparsity": 0.5}, {"gates": "projection", "rank": 4, "gate_rank": 2}):
        with monkeypatch.context() as patch:
            if tower != "dinov2_swiglu":  # whose files hold two of its weights as one
                patch.setattr(
                    type(base), "from_pretrained", None
                )  # a whole model can't be loaded now: tensors are read
            folders = {name: tmp_path / name for name in merged}
            model = merge_finetuned(copy.deepcopy(base), folders, WEMoEConfig(**options))
        expected = merge_finetuned(copy.deepcopy(base), merged, WEMoEConfig(**options))
        for one in (model, expected):
            stir_routers(one)
        images = torch.randn(3, 3, 16, 16)
        torch.testing.assert_close(outputs(model, images), outputs(expected, images), rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path / "merged")
        loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "merged").eval()
        torch.testing.assert_close(outputs(loaded, images), outputs(model, images), rtol=1e-4, atol=1e-5)
        assert (outputs(model, images) - outputs(base, images)).abs().max() > 1e-2


def test_another_kind_of_model_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="name them in `target_modules`"):
        merge_finetuned(nn.Linear(2, 2), {"a": nn.Linear(2, 2)}, WEMoEConfig())
