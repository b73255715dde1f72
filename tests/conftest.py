"""Small models and inputs that the tests share. Seeded."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network

import pytest
import torch
from hub.loopback import LoopbackHub
from transformers import CLIPConfig, CLIPModel

pytest_plugins = ["experiments", "space.fixtures"]  # fixtures of several tests

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def tiny_clip(seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()


def tiny_batch(images: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Images, and three prompts of different lengths, padded with the end token."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(images, 3, 16, 16, generator=generator),
        "input_ids": torch.tensor([[0, 5, 6, 7, 1], [0, 8, 1, 1, 1], [0, 9, 10, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
    }


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """As if the disk were full: the kernel refuses to write beyond so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def without_checksums(folder: Path) -> None:
    """Make saved files such as release 0.1 wrote, of which only the structure is checked."""
    for path in folder.glob("*.json"):
        described = json.loads(path.read_text())
        described.pop("checksums", None)
        path.write_text(json.dumps(described))


def randomize(model: torch.nn.Module, seed: int = 1) -> None:
    """Give routers and experts weights as if they had learnt, so that choices and outputs differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moe_lora_" in name:
                scale = 1.0 if "routers" in name else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)


@pytest.fixture
def clip() -> CLIPModel:
    return tiny_clip()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return tiny_batch()


@pytest.fixture(scope="session")
def real_images() -> Path:
    if "MTIL_REAL_DIR" not in os.environ:
        pytest.skip("MTIL_REAL_DIR (image folders with photographs) is not set")
    return Path(os.environ["MTIL_REAL_DIR"])


@pytest.fixture(scope="session")
def real_clip() -> Path:
    if "MTIL_REAL_CLIP" not in os.environ:
        pytest.skip("MTIL_REAL_CLIP (a pretrained CLIP) is not set")
    return Path(os.environ["MTIL_REAL_CLIP"])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    server = LoopbackHub(tmp_path / "hub")
    server.start()
    yield server
    server.stop()
