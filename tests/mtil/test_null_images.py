"""Rows without an image, in data sets of any origin."""

import io

import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import CLIPImageProcessor

from peft_moe_merge.mtil.data.batches import eval_batches
from peft_moe_merge.mtil.data.task import Task

PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def rows(missing: dict[int, dict | None], count: int = 2500) -> Dataset:
    """Rows of one small image, some of them without."""
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    file = {"bytes": buffer.getvalue(), "path": None}
    columns = {"image": [missing.get(row, file) for row in range(count)], "label": [row % 2 for row in range(count)]}
    names = ClassLabel(names=["a", "b"])
    return Dataset.from_dict(columns, features=Features({"image": ImageFeature(), "label": names}))


@pytest.mark.parametrize("nothing", [None, {"bytes": b"", "path": None}])
def test_rows_without_an_image(nothing):
    whole = rows({})
    Task("pairs", ("a", "b"), ("a {}.",), whole, whole)
    with pytest.raises(ValueError, match="'pairs', split 'test': no image in 2 of 2500 rows: 7, 2301. Remove"):
        Task("pairs", ("a", "b"), ("a {}.",), whole, rows({7: nothing, 2301: nothing}))
    some = rows({7: nothing, 2301: nothing}).select([0, 2301, 5])
    with pytest.raises(ValueError, match="'pairs', split 'train': no image in 1 of 3 rows: 1. "):
        Task("pairs", ("a", "b"), ("a {}.",), some, whole)
    several = rows(dict.fromkeys(range(100, 150)), 200)
    with pytest.raises(ValueError, match="50 of 200 rows: 100, .*, 109 and 40 more"):
        Task("pairs", ("a", "b"), ("a {}.",), several, whole)
    # the advice that the error gives
    Task("pairs", ("a", "b"), ("a {}.",), several.select([*range(100), *range(150, 200)]), whole)


def test_a_batch_names_the_row_without_an_image():
    with pytest.raises(ValueError, match="Row 3 of .*there is no image"):
        list(eval_batches(rows({3: None}, 6), PROCESSOR, batch_size=6))
