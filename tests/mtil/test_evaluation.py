"""Testing on a task: class texts once and in batches of bounded size, every image decoded once; a bad image is named."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset, Features, Image, Value
from hub.mtil_sets import picture

from peft_moe_merge.mtil.clip import small_clip
from peft_moe_merge.mtil.data.batches import eval_batches
from peft_moe_merge.mtil.data.label_space import LabelSpace
from peft_moe_merge.mtil.data.task import Task
from peft_moe_merge.mtil.data.templates import TEMPLATES
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.stream import Stream, StreamSettings

CLASSES = ("cat", "a rather long name of a dog", "sea horse", "8", "yin and yang symbol")


def images(count, broken=None):
    pictures = [picture(row % len(CLASSES)) if row != broken else b"no image" for row in range(count)]
    columns = {"image": [{"bytes": image, "path": None} for image in pictures], "label": [r % 5 for r in range(count)]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("int64")}))


@pytest.fixture
def task():
    return Task("things", CLASSES, TEMPLATES["caltech101"], images(5), images(23))


@pytest.fixture
def method(task):
    clip, processor = small_clip(prompt for template in task.templates for prompt in task.prompts(template))
    return METHODS["zero_shot"](clip, processor, MethodSettings())


@torch.no_grad()
def test_class_features_are_the_mean_over_templates(task, method):
    """Against one prompt at a time, without padding."""
    expected = []
    for name in CLASSES:
        single = [method.processor.tokenizer([t.format(name)], return_tensors="pt") for t in task.templates]
        features = torch.cat([method.model.get_text_features(tokens["input_ids"]).pooler_output for tokens in single])
        expected.append(F.normalize(F.normalize(features, dim=-1).mean(dim=0), dim=-1))
    torch.testing.assert_close(
        method.encode_classes(LabelSpace.of_task(task).prompts, torch.device("cpu")), torch.stack(expected)
    )


def test_texts_once_and_each_image_once(task, method, monkeypatch):
    asked = {"texts": 0, "images": 0}
    encode, preprocess = method.encode_classes, type(method.processor.image_processor).__call__

    def texts(*arguments):
        asked["texts"] += 1
        return encode(*arguments)

    def pixels(self, batch, **options):
        asked["images"] += len(batch)
        return preprocess(self, batch, **options)

    monkeypatch.setattr(method, "encode_classes", texts)
    monkeypatch.setattr(type(method.processor.image_processor), "__call__", pixels)
    value = Stream([task], StreamSettings(eval_batch_size=4), Accelerator(cpu=True)).accuracy(method, task)
    assert asked == {"texts": 1, "images": 23} and 0 <= value <= 100


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named(method, workers):
    batches = eval_batches(images(9, broken=6), method.processor.image_processor, batch_size=4, num_workers=workers)
    with pytest.raises(ValueError, match=r"(?s)Row 6 of .* can't be read: cannot identify image file.*--verify"):
        list(batches)
