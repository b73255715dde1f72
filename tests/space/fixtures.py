"""A small adapter, and a classifier with it, that the tests of the Space share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    from space.tiny_adapter import train

    return train(tmp_path_factory.mktemp("space") / "adapter")


@pytest.fixture(scope="session")
def classifier(adapter):
    from peft_moe_merge import ContinualClassifier

    return ContinualClassifier.from_pretrained(adapter)
