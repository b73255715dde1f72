"""The classifier against PEFT's own calls, one image, one class and one task at a time."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, tiny_clip
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge import ContinualClassifier, MoELoraMergeConfig, TaskClasses
from peft_moe_merge.inference.classes import write_classes
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.selection import DiscriminantSelector, GaussianSelector

TASKS = {
    "pets": TaskClasses(("cat", "dog", "rabbit"), ("a photo of a {}.", "a drawing of the {}.")),
    "shapes": ["circle", "cat"],
}


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 32, 3), dtype=np.uint8)) for _ in range(count)]


def adapted() -> PeftModel:
    torch.manual_seed(0)
    config = MoELoraMergeConfig(num_experts=4, r=4, tasks=list(TASKS))
    model = get_peft_model(CLIPModel.from_pretrained(mini_clip_path()), config)
    randomize(model)
    return model.eval()


@pytest.fixture(scope="module")
def processor() -> CLIPProcessor:
    return CLIPProcessor.from_pretrained(mini_clip_path())


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted()


@pytest.fixture
def classifier(model: PeftModel, processor: CLIPProcessor) -> ContinualClassifier:
    return ContinualClassifier(model, processor, TASKS, batch_size=3)


@torch.no_grad()
def probabilities(
    model: PeftModel, processor: CLIPProcessor, image: Image.Image, task: str | None, prompts: dict[str, list[str]]
) -> dict[str, float]:
    """The reference: `prompts` are those of each class, `task` None is CLIP without experts."""
    model.set_task(task)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    image_P = F.normalize(model.get_image_features(pixels).pooler_output[0], dim=-1)
    logits = []
    for of_class in prompts.values():
        texts = [
            F.normalize(
                model.get_text_features(processor.tokenizer(p, return_tensors="pt").input_ids).pooler_output[0], dim=0
            )
            for p in of_class
        ]
        logits.append(model.get_base_model().logit_scale.exp() * image_P @ F.normalize(sum(texts), dim=0))
    return dict(zip(prompts, torch.stack(logits).softmax(dim=0).tolist(), strict=True))


def prompts_of(task: str) -> dict[str, list[str]]:
    if task == "pets":
        return {name: [f"a photo of a {name}.", f"a drawing of the {name}."] for name in ("cat", "dog", "rabbit")}
    return {name: [f"a photo of a {name}."] for name in ("circle", "cat")}


def test_mixed_tasks_in_one_call(classifier, model, processor) -> None:
    images = pictures(7)
    tasks = ["pets", 1, "shapes", -1, 0, "pets", -1]
    predictions = classifier(images, task=tasks)
    everything = {**prompts_of("pets"), "circle": ["a photo of a circle."]}  # "cat" by the templates of the first task
    for image, task, prediction in zip(
        images, ["pets", "shapes", "shapes", None, "pets", "pets", None], predictions, strict=True
    ):
        prompts = everything if task is None else prompts_of(task)
        expected = probabilities(model, processor, image, task, prompts)
        assert prediction.task == task
        assert prediction.probabilities == pytest.approx(expected, abs=1e-4)
        assert prediction.label == max(expected, key=expected.get)
        assert prediction.score == max(prediction.probabilities.values())
    assert classifier.model.training is False


@torch.no_grad()
def test_under_autocast_the_towers_alone_lose_precision(classifier, model, processor) -> None:
    images = pictures(6)
    with torch.autocast("cpu", torch.bfloat16):
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        features = F.normalize(model.get_image_features(pixels, task_ids=torch.zeros(6).long()).pooler_output.float())
        texts = classifier.class_texts(0)[1]
        predictions = classifier(images, task="pets")
    expected = (model.get_base_model().logit_scale.exp() * features @ texts.T).softmax(dim=1)
    found = torch.tensor([list(prediction.probabilities.values()) for prediction in predictions])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_one_image_a_path_and_a_list_alike(classifier, tmp_path) -> None:
    image = pictures(1)[0]
    image.save(tmp_path / "a.png")
    one = classifier(image, task="pets")
    assert classifier(tmp_path / "a.png", task="pets") == one
    assert classifier([str(tmp_path / "a.png")], task="pets") == [one]
    grey = image.convert("L").convert("P")
    assert classifier(grey, task=0).probabilities.keys() == one.probabilities.keys()
    assert classifier([], task="pets") == []


def test_texts_are_encoded_once(classifier, monkeypatch) -> None:
    calls = []
    encode = classifier.model.get_text_features

    def counted(**arguments):
        calls.append(arguments["task_ids"].unique().item())
        return encode(**arguments)

    monkeypatch.setattr(classifier.model, "get_text_features", counted)
    classifier(pictures(7), task=["pets", "shapes"] * 3 + ["pets"])
    classifier(pictures(7), task="pets")
    assert sorted(calls) == [0, 1]


def test_an_attached_selector_chooses_for_each_image(processor, tmp_path) -> None:
    model = adapted()
    generator = np.random.default_rng(1)

    def of_task(brightness: int, count: int) -> list[Image.Image]:
        noise = generator.integers(0, 40, (count, 40, 32, 3))
        return [Image.fromarray((brightness + pixels).astype(np.uint8)) for pixels in noise]

    selector = GaussianSelector(reject_rate=0.05)
    for task, brightness in (("pets", 0), ("shapes", 210)):
        pixels = processor(images=of_task(brightness, 300), return_tensors="pt")["pixel_values"]
        selector.fit(task, model.frozen_features(selector.source, pixels))
    model.attach_selector(selector)
    classifier = ContinualClassifier(model, processor, TASKS, open_classes=["tree", "car"], batch_size=4)
    images = [*of_task(0, 2), *pictures(1), *of_task(210, 2), *pictures(1), *of_task(0, 1)]
    predictions = classifier(images)
    expected = ["pets", "pets", None, "shapes", "shapes", None, "pets"]
    assert [prediction.task for prediction in predictions] == expected
    for one, other in zip(predictions, classifier(images, task=[0, 0, -1, 1, 1, -1, 0]), strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    assert list(predictions[2].probabilities) == ["tree", "car"]

    classifier.save_pretrained(tmp_path)
    loaded = ContinualClassifier.from_pretrained(tmp_path)
    assert [prediction.task for prediction in loaded(images)] == expected


def bright(brightness: int, count: int, seed: int = 1) -> list[Image.Image]:
    noise = np.random.default_rng([seed, brightness]).integers(0, 40, (count, 40, 32, 3))
    return [Image.fromarray((brightness + pixels).astype(np.uint8)) for pixels in noise]


def with_selector(processor: CLIPProcessor) -> PeftModel:
    """Pets are dark images, shapes bright ones."""
    model = adapted()
    selector = GaussianSelector(reject_rate=0.05)
    for task, brightness in (("pets", 0), ("shapes", 210)):
        pixels = processor(images=bright(brightness, 300), return_tensors="pt")["pixel_values"]
        selector.fit(task, model.frozen_features(selector.source, pixels))
    model.attach_selector(selector)
    return model


def test_candidates_tell_the_task(processor) -> None:
    model = with_selector(processor)
    without = adapted()  # the same, but no selector has a say in the reference
    classifier = ContinualClassifier(model, processor, TASKS, batch_size=2)
    dark, light, neither = *bright(0, 1, seed=2), *bright(210, 1, seed=2), *pictures(1)
    images = [dark, light, neither]
    assert [prediction.task for prediction in classifier(images)] == ["pets", "shapes", None]
    pixels = processor(images=neither, return_tensors="pt")["pixel_values"]
    scores = model.task_selector.decision_function(model.frozen_features(model.task_selector.source, pixels))
    better = list(TASKS)[scores[0].argmax()]
    pets = ["cat", "dog", "rabbit"]
    plain = {name: [f"a photo of a {name}."] for name in ("circle", "tree", "car")}
    for candidates, expected in (
        (pets, ["pets"] * 3),  # whatever they look like
        (["dog", "Rabbit"], ["pets"] * 3),
        (["tree", "car"], [None] * 3),
        ([*pets, "circle"], ["pets", "shapes", better]),  # one of the two, by its own classes
        ([*pets, "circle", "tree"], ["pets", "shapes", None]),  # or none of them: all classes
        (["dog", "tree"], ["pets", None, None]),
    ):
        predictions = classifier(images, candidates=candidates)
        assert [prediction.task for prediction in predictions] == expected, candidates
        for image, task, prediction in zip(images, expected, predictions, strict=True):
            known = {name.lower(): forms for name, forms in {**prompts_of("shapes"), **prompts_of("pets")}.items()}
            if task == "shapes":
                known |= prompts_of("shapes")  # "cat" as that task says it
            prompts = {name: (known | plain)[name.lower()] for name in candidates}
            prompts = {name: [form.replace(name.lower(), name) for form in forms] for name, forms in prompts.items()}
            assert list(prediction.probabilities) == candidates
            if "circle" in candidates and task is not None:  # both tasks are possible: the other's own classes are out
                of_other = {"dog", "rabbit"} if task == "shapes" else {"circle"}
                prompts = {name: forms for name, forms in prompts.items() if name not in of_other}
                reference = dict.fromkeys(candidates, 0.0) | probabilities(without, processor, image, task, prompts)
            else:
                reference = probabilities(without, processor, image, task, prompts)
            assert prediction.probabilities == pytest.approx(reference, abs=1e-4)


def test_likely_tasks_are_mixed(processor) -> None:
    """Against each task's own answer, added up by the posterior; with and without candidates."""
    model, without = adapted(), adapted()
    selector = DiscriminantSelector(shrinkage=(0.5,), shared=(1.0,), reject_rate=0.05)
    for task, brightness in (("pets", 90), ("shapes", 92)):  # hardly told apart
        pixels = processor(images=bright(brightness, 300), return_tensors="pt")["pixel_values"]
        selector.fit(task, model.frozen_features(selector.source, pixels))
    model.attach_selector(selector)
    hard, soft = (ContinualClassifier(model, processor, TASKS, batch_size=2, soft=soft) for soft in (False, True))
    images = [*bright(90, 2, seed=2), *bright(92, 2, seed=3), *pictures(1)]
    pets, shapes = prompts_of("pets"), prompts_of("shapes")
    tree = {"tree": ["a photo of a tree."]}
    of_all = {None: {**shapes, **pets}, "pets": pets, "shapes": shapes}
    of_candidates = {None: {**of_all[None], **tree}, "pets": {**pets, **tree}, "shapes": {**shapes, **tree}}
    mixed = 0
    for candidates, prompts in ((None, of_all), (list(of_candidates[None]), of_candidates)):
        for image, prediction, alone in zip(
            images, soft(images, candidates=candidates), hard(images, candidates=candidates), strict=True
        ):
            pixels = processor(images=image, return_tensors="pt")["pixel_values"]
            scores = selector.decision_function(model.frozen_features(selector.source, pixels))[0].double()
            none = 0.2 if (scores - selector.thresholds())[scores.argmax()] >= 0 else 1.0
            shares = [*((1 - none) * (selector.temperature * scores).softmax(dim=0)).tolist(), none]
            expected, kept = {}, {}
            for route in sorted(range(3), key=lambda route: -shares[route]):
                if sum(kept.values()) < 0.95:
                    kept[route] = shares[route]
            mixed += len(kept) > 1
            for route, share in kept.items():
                task = [*TASKS, None][route]
                for name, probability in probabilities(without, processor, image, task, prompts[task]).items():
                    expected[name] = expected.get(name, 0) + share / sum(kept.values()) * probability
            got = {name: value for name, value in prediction.probabilities.items() if name in expected}
            assert got == pytest.approx(expected, abs=1e-4) and sum(got.values()) == pytest.approx(1, abs=1e-5)
            assert prediction.label == max(expected, key=expected.get)
            assert prediction.score == pytest.approx(expected[prediction.label], abs=1e-4)
            assert prediction.task == [*TASKS, None][max(kept, key=kept.get)] == alone.task
    assert mixed > 4
    assert soft(images, task=0) == hard(images, task=0), "nothing to choose"
    assert soft(images[0], candidates=["dog", "rabbit"]) == hard(images[0], candidates=["dog", "rabbit"])
    gaussian = ContinualClassifier(with_selector(processor), processor, TASKS, soft=True)
    with pytest.raises(ValueError, match=r"soft=True .* a GaussianSelector does not have: attach a Discriminant"):
        gaussian(images[0])


def test_candidates_without_a_selector(classifier, model, processor) -> None:
    """Where they leave one task, or none, nothing else need be asked."""
    image = pictures(1)[0]
    assert classifier(image, candidates=["dog", "rabbit"]).task == "pets"
    asked = classifier(image, candidates=TaskClasses(("tree", "dog"), ("the {}.", "this is a {}.")), task=1)
    prompts = {name: [f"the {name}.", f"this is a {name}."] for name in ("tree", "dog")}
    assert asked.probabilities == pytest.approx(probabilities(model, processor, image, "shapes", prompts), abs=1e-4)
    told = classifier(image, candidates=["tree", "car"])
    assert told == classifier(image, task=-1, candidates=["tree", "car"]) and told.task is None
    with pytest.raises(ValueError, match=r"The candidates leave \['pets'\] or none of them\. Give `task="):
        classifier(image, candidates=["dog", "tree"])
    with pytest.raises(ValueError, match=r"The candidates leave \['pets', 'shapes'\]\. Give `task="):
        classifier(image, candidates=["cat"])
    for candidates, message in (([], "at least one class name"), (["dog", "dog"], r"named twice: \['dog'\]")):
        with pytest.raises(ValueError, match=message):
            classifier(image, candidates=candidates)
    with pytest.raises(ValueError, match=r"named twice: \['dog'\]"):
        TaskClasses(("dog", "cat", "dog"))


def test_candidates_that_mean_the_same(model, processor) -> None:
    """By text embeddings of plain CLIP: what is allowed changes at the cosine of the most similar name."""
    names = ["dogs", "rabbits", "green field"]

    @torch.no_grad()
    def embed(name: str) -> torch.Tensor:
        model.set_task(None)
        tokens = processor.tokenizer(f"a photo of a {name}.", return_tensors="pt").input_ids
        return F.normalize(model.get_text_features(tokens).pooler_output[0], dim=0)

    cosines = {name: [(embed(name) @ embed(known)).item() for known in ("cat", "dog", "rabbit")] for name in names}
    assert max(cosines["dogs"]) == cosines["dogs"][1] and max(cosines["rabbits"]) == cosines["rabbits"][2]
    level = min(cosines["dogs"][1], cosines["rabbits"][2])
    assert level > max(cosines["green field"])
    for similarity, allowed in ((level - 1e-3, (0,)), (max(cosines["dogs"] + cosines["rabbits"]) + 1e-3, ())):
        classifier = ContinualClassifier(model, processor, TASKS, similarity=similarity)
        evidence = classifier.evidence(names)
        assert evidence.allowed == allowed and not evidence.complete
    assert ContinualClassifier(model, processor, TASKS, similarity=2).evidence(names).allowed == ()


def test_a_selector_that_lags_behind_is_named(processor) -> None:
    model = with_selector(processor)
    model.add_task("cars")
    for soft in (True, False):
        classifier = ContinualClassifier(model, processor, {**TASKS, "cars": ["van", "bus"]}, soft=soft)
        for candidates in (None, ["cat"], ["van", "bus", "dog", "rabbit", "cat"]):
            with pytest.raises(
                ValueError, match=r"selector knows the tasks \['pets', 'shapes'\], the adapter has .*'cars'"
            ):
                classifier(pictures(1), candidates=candidates)
    assert classifier(pictures(1), candidates=["bus", "van"])[0].task == "cars", "known without it"


def test_save_and_load(classifier, tmp_path) -> None:
    classifier.open_classes = TaskClasses(("tree", "car"))
    classifier.save_pretrained(tmp_path)
    loaded = ContinualClassifier.from_pretrained(tmp_path)  # the config names the CLIP
    images = pictures(4)
    for one, other in zip(classifier(images, task=[0, 1, -1, 0]), loaded(images, task=[0, 1, -1, 0]), strict=True):
        assert (one.label, one.task) == (other.label, other.task)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def test_bad_input(classifier, model, processor, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"tasks \['pets', 'shapes'\], but classes are given for \['pets'\]"):
        ContinualClassifier(model, processor, {"pets": ["cat"]})
    lora = get_peft_model(CLIPModel.from_pretrained(mini_clip_path()), LoraConfig(target_modules=["fc1"]))
    with pytest.raises(TypeError, match="got one of LoraConfig"):
        ContinualClassifier(lora, processor, TASKS)
    with pytest.raises(ValueError, match="`class_names` must be a list .* got 'cat'"):
        ContinualClassifier(model, processor, {"pets": "cat", "shapes": ["circle"]})
    with pytest.raises(ValueError, match=r"templates.*got \('a photo',\)"):
        TaskClasses(("cat",), ("a photo",))
    with pytest.raises(ValueError, match=r"Unknown tasks \['cars'\]"):
        classifier(pictures(2), task=["pets", "cars"])
    with pytest.raises(ValueError, match=r"Unknown tasks \[2\]"):
        classifier(pictures(1), task=2)
    with pytest.raises(ValueError, match="1 tasks for 2 images"):
        classifier(pictures(2), task=["pets"])
    with pytest.raises(ValueError, match=r"Which task are these images from\?.*selector"):
        classifier(pictures(1))
    with pytest.raises(ValueError, match="nowhere.png"):
        classifier("nowhere.png", task="pets")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(OSError, match="text.png"):
        classifier(tmp_path / "text.png", task="pets")
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="classifier.json"):
        ContinualClassifier.from_pretrained(tmp_path)
    for damaged in ('{"tasks": {', '{"tasks": {}}', '{"tasks": {"pets": {"names": []}}, "open_classes": null}', "[]"):
        (tmp_path / "classifier.json").write_text(damaged)
        with pytest.raises(ValueError, match="classifier.json in .* is damaged"):
            ContinualClassifier.from_pretrained(tmp_path)
    get_peft_model(tiny_clip(), MoELoraMergeConfig(num_experts=4, r=4)).save_pretrained(tmp_path)
    classifier.processor.save_pretrained(tmp_path)
    write_classes(tmp_path, {"default": TaskClasses(("cat",))})
    with pytest.raises(ValueError, match="does not say which CLIP it is for"):
        ContinualClassifier.from_pretrained(tmp_path)


def test_candidates_of_threads_do_not_mix(model: PeftModel, processor: CLIPProcessor) -> None:
    """One asks while another's candidates are being encoded: each gets its own, then and later."""
    mine, theirs = ("cat", "tiger"), ("circle", "moon")

    class Interrupted:
        """A processor whose tokenizer lets another thread ask to the end before it goes on."""

        interrupt = None

        def __call__(self, **inputs):
            return processor(**inputs)

        @property
        def tokenizer(self):
            interrupt, self.interrupt = self.interrupt, None
            if interrupt is not None:
                with ThreadPoolExecutor(1) as threads:
                    threads.submit(interrupt).result()
            return processor.tokenizer

    interrupted = Interrupted()
    classifier = ContinualClassifier(model, interrupted, TASKS)
    (image,) = pictures(1)
    alone = {names: classifier(image, task="pets", candidates=names) for names in (mine, theirs, mine)}
    classifier = ContinualClassifier(model, interrupted, TASKS)
    seen = []
    interrupted.interrupt = lambda: seen.append(classifier(image, task="pets", candidates=theirs))
    assert classifier(image, task="pets", candidates=mine) == alone[mine]
    assert seen == [alone[theirs]]
    for names in (theirs, mine):
        assert classifier(image, task="pets", candidates=names) == alone[names]
