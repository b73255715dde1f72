"""A small CLIP, copies of it that differ as fine-tuned ones do, and routers that tell images apart."""

import copy

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

TASKS = ("cars", "dtd", "svhn")


def small_clip(seed: int = 0, **vision) -> CLIPModel:
    torch.manual_seed(seed)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 16, **vision}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "eos_token_id": 1}
    config = CLIPConfig(
        vision_config={**vision, "patch_size": 8, "num_attention_heads": 2},
        text_config={**text, "bos_token_id": 0, "num_attention_heads": 2, "max_position_embeddings": 8},
        projection_dim=16,
    )
    return CLIPModel(config).eval()


def finetune(base: nn.Module, seed: int, part: str = "vision_model.", size: float = 0.02) -> nn.Module:
    """A copy of `base` with noise on the parameters of one part, in place of training."""
    tuned, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.startswith(part):
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return tuned


def features(model, images: torch.Tensor) -> torch.Tensor:
    return model.get_image_features(pixel_values=images).pooler_output


def stir_routers(model, seed: int = 3):
    """Routers start near a constant; give them the same large random weights each time, so that images differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".wemoe_router." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def base():
    return small_clip().double()


@pytest.fixture
def finetuned(base):
    return {task: finetune(base, seed) for seed, task in enumerate(TASKS, start=1)}


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
