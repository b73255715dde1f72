"""The data sets of the MTIL benchmark on the Hugging Face Hub: one entry each. To add one, add an entry and its names.

Class names in CLIP's wording are in `class_names/<task>.txt`, templates in `../templates.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CLASS_NAMES = Path(__file__).parent / "class_names"


class Anchors(NamedTuple):
    """Published accuracies on a task, in percent: order I, all images, ViT-B/16.

    Attributes:
        zero_shot: CLIP untouched.
        finetune: all weights trained on this task alone.
        transfer, average, last: of the method in arXiv 2405.11530; the first task has no transfer.
    """

    zero_shot: float
    finetune: float
    transfer: float | None
    average: float
    last: float


@dataclass(frozen=True)
class HubSet:
    """Where a data set is and what is done with it.

    Attributes:
        hub_id: its repository.
        revision: the commit that is loaded; None where none is known, then the newest.
        train, test: splits, joined by "+".
        sizes: images to train and to test on; checked after loading.
        licence: as far as known.
        config: where the repository has several.
        image, label: its columns.
        without: classes left out.
        split_seed: if given, there are no fixed splits; all images are divided at random, four fifths to train on.
        label_names: names by number, for a copy whose labels are bare numbers.
        lr, lr_few_shot: peak learning rate with all images, and with five of each class.
        anchors: what others measured.
    """

    hub_id: str
    revision: str | None
    train: str
    test: str
    sizes: tuple[int, int]
    licence: str
    config: str | None = None
    image: str = "image"
    label: str = "label"
    without: tuple[str, ...] = ()
    split_seed: int | None = None
    label_names: tuple[str, ...] | None = None
    lr: float = 1e-3
    lr_few_shot: float = 1e-3
    anchors: Anchors | None = None


# fmt: off
HUB_SETS: dict[str, HubSet] = {  # in order I
    "aircraft": HubSet(
        "Donghyun99/FGVC-Aircraft", None,
        train="train", test="test", sizes=(3334, 3333), lr=5e-3, lr_few_shot=8e-3,
        licence="non-commercial research", anchors=Anchors(24.3, 62.0, None, 51.1, 50.7),
    ),
    "caltech101": HubSet(
        "dpdl-benchmark/caltech101", None,
        train="train+test", test="", sizes=(6941, 1736), split_seed=42, without=("background_google",),
        lr=1e-3, lr_few_shot=5e-4, licence="CC BY 4.0", anchors=Anchors(88.4, 95.1, 88.4, 93.2, 92.7),
    ),
    "cifar100": HubSet(
        "uoft-cs/cifar100", "aadb3af77e9048adbea6b47c21a81e47dd092ae5", config="cifar100",
        image="img", label="fine_label",
        train="train", test="test", sizes=(50000, 10000), lr=5e-3, lr_few_shot=2e-4,
        licence="unknown", anchors=Anchors(68.2, 89.6, 68.2, 83.6, 86.5),
    ),
    "dtd": HubSet(
        "mcimpoi/dtd_split_1", None,
        train="train", test="test", sizes=(1880, 1880), lr=1e-3, lr_few_shot=5e-3,
        licence="research", anchors=Anchors(44.6, 79.5, 39.7, 68.2, 77.0),
    ),
    "eurosat": HubSet(
        "timm/eurosat-rgb", "b4e28552cd5f3932b6abc37eb20d3e84901ad728",
        train="train+validation", test="test", sizes=(21600, 5400), lr=1e-4, lr_few_shot=1e-3,
        licence="MIT", anchors=Anchors(54.9, 98.9, 55.3, 80.2, 92.6),
    ),
    "flowers": HubSet(
        "dpdl-benchmark/oxford_flowers102", None,
        train="train", test="test", sizes=(1020, 6149), lr=1e-3, lr_few_shot=1e-3,
        licence="unknown", anchors=Anchors(71.0, 97.5, 68.3, 83.3, 94.1),
    ),
    "food101": HubSet(
        "ethz/food101", "e06acf2a88084f04bce4d4a525165d68e0a36c38",
        train="train", test="validation", sizes=(75750, 25250), lr=1e-3, lr_few_shot=1e-2,
        licence="unknown", anchors=Anchors(88.5, 92.7, 88.5, 88.7, 89.0),
    ),
    "mnist": HubSet(
        "ylecun/mnist", "77f3279092a1c1579b2250db8eafed0ad422088c", config="mnist",
        train="train", test="test", sizes=(60000, 10000), lr=1e-4, lr_few_shot=1e-4,
        licence="MIT", anchors=Anchors(59.4, 99.6, 59.4, 73.7, 98.5),
    ),
    "oxford_pet": HubSet(
        "timm/oxford-iiit-pet", None,
        train="train", test="test", sizes=(3680, 3669), lr=1e-3, lr_few_shot=1e-2,
        licence="CC BY-SA 4.0", anchors=Anchors(89.0, 94.7, 89.0, 89.1, 89.2),
    ),
    "stanford_cars": HubSet(
        "tanganke/stanford_cars", "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40",
        train="train", test="test", sizes=(8144, 8041), lr=1e-3, lr_few_shot=1e-2,
        licence="unknown", anchors=Anchors(64.7, 89.6, 64.7, 68.5, 85.5),
    ),
    "sun397": HubSet(
        "dpdl-benchmark/sun397", "7e6af6a2499ad708618be868e1471eac0aca1168",
        train="train+validation", test="test", sizes=(87003, 21750), lr=1e-3, lr_few_shot=1e-2,
        licence="unknown", anchors=Anchors(65.2, 81.8, 64.5, 65.9, 79.8),
    ),
}

REFERENCE = "tiny_imagenet"
REFERENCE_SET = HubSet(  # images beside the stream, by which a method can see what CLIP knew; not a task
    "zh-plus/tiny-imagenet", "5a77092c28e51558c5586e9c5eb71a7e17a5e43f",
    train="train", test="", sizes=(100000, 0), licence="non-commercial research",
)

ORDER_II = (
    "stanford_cars", "food101", "mnist", "oxford_pet", "flowers", "sun397", "aircraft", "caltech101", "dtd", "eurosat",
    "cifar100",
)
# fmt: on


def class_names(task: str) -> dict[str, tuple[str, ...]]:
    """Read a task's classes: CLIP's wording -> other names of the same class, which data sets give it."""
    lines = (CLASS_NAMES / f"{task}.txt").read_text(encoding="utf-8").splitlines()
    return {name: tuple(others) for name, *others in (line.split(" | ") for line in lines)}
