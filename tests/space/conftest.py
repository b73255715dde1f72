from pathlib import Path

import pytest
from space.tiny_adapter import train

from peft_moe_merge import ContinualClassifier


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("space") / "adapter")


@pytest.fixture(scope="session")
def classifier(adapter) -> ContinualClassifier:
    return ContinualClassifier.from_pretrained(adapter)
