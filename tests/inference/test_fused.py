"""Classes that experts and Gaussians agree on: the classifier against its own parts, one image and one class at a time."""

import pytest
import torch
from test_classifier import TASKS, adapted, pictures, probabilities, prompts_of

from peft_moe_merge import ContinualClassifier
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.selection import DiscriminantSelector, GaussianSelector, PatchTokens

LABELS = {"pets": [0, 2] * 20, "shapes": [0, 1] * 20}  # there was no dog


def pixels_of(processor, images):
    return processor(images=images, return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def processor():
    return load_clip(mini_clip_path())[1]


@pytest.fixture(scope="module")
def selector(processor):
    model, made = adapted(), DiscriminantSelector(PatchTokens(2), means="classes", shared=(1.0,))
    images = pictures(40)
    for shift, (task, labels) in enumerate(LABELS.items()):
        x = model.frozen_features(made.source, pixels_of(processor, images))
        made.fit(task, [(x + torch.tensor(labels)[:, None] * 0.02 + shift, torch.tensor(labels))])
    return made


def fused(model, processor, selector, image, task, prompts):
    """The reference: the classes that were seen share what CLIP gives them by the product of the two."""
    clip = probabilities(model, processor, image, task, prompts)
    names = {"pets": ["cat", "dog", "rabbit"], "shapes": ["circle", "cat"]}[task]
    x = model.frozen_features(selector.source, pixels_of(processor, image))
    labels, posterior = selector.class_posterior(x, list(TASKS).index(task))
    of_class = {names[label]: p for label, p in zip(labels.tolist(), posterior[0].exp().tolist(), strict=True)}
    seen = {name: clip[name] * p for name, p in of_class.items() if name in clip}
    mass = sum(clip[name] for name in seen)
    return clip | {name: mass * p / sum(seen.values()) for name, p in seen.items()}


def test_the_product_of_two_opinions(processor, selector):
    model, reference = adapted(), adapted()
    model.attach_selector(selector)
    classifier = ContinualClassifier(model, processor, TASKS, batch_size=3, fuse=True)
    images, tasks = pictures(5), ["pets", "shapes", "pets", -1, "shapes"]
    plain = ContinualClassifier(model, processor, TASKS)
    for image, task, prediction in zip(images, tasks, classifier(images, task=tasks), strict=True):
        if task == -1:
            assert prediction.probabilities == pytest.approx(plain(image, task=-1).probabilities, abs=1e-6)
            continue
        expected = fused(reference, processor, selector, image, task, prompts_of(task))
        assert prediction.probabilities == pytest.approx(expected, abs=1e-4)
        assert prediction.probabilities != pytest.approx(plain(image, task=task).probabilities, abs=1e-3)
        if task == "pets":  # nothing is known of dogs but by CLIP
            assert prediction.probabilities["dog"] == pytest.approx(
                plain(image, task=task).probabilities["dog"], abs=1e-5
            )


def test_candidates(processor, selector):
    model, reference = adapted(), adapted()
    model.attach_selector(selector)
    classifier = ContinualClassifier(model, processor, TASKS, fuse=True)
    image = pictures(1)[0]
    prompts = {**prompts_of("pets"), "ship": ["a photo of a ship."]}
    del prompts["rabbit"]
    found = classifier(image, task="pets", candidates=["ship", "dog", "cat"]).probabilities
    assert found == pytest.approx(fused(reference, processor, selector, image, "pets", prompts), abs=1e-4)
    spelt = classifier(image, task="pets", candidates=["ship", "Dog", "CAT"])
    assert list(spelt.probabilities) == ["ship", "Dog", "CAT"]
    in_capitals = {"ship": ["a photo of a ship."], "Dog": ["a photo of a Dog.", "a drawing of the Dog."]}
    in_capitals |= {"CAT": ["a photo of a CAT.", "a drawing of the CAT."]}
    clip = probabilities(reference, processor, image, "pets", in_capitals)
    assert spelt.probabilities == pytest.approx(clip, abs=1e-4), "one class is known alone: it shares with none"
    plain = ContinualClassifier(model, processor, TASKS)
    for candidates in (["ship", "car"], ["dog", "car"]):  # of which no image was seen
        one, other = (each(image, task="pets", candidates=candidates) for each in (classifier, plain))
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def test_the_selector_chooses_and_has_its_say(processor, selector, tmp_path):
    model = adapted()
    model.attach_selector(selector)
    classifier = ContinualClassifier(model, processor, TASKS, fuse=True, soft=True)
    images = pictures(4)
    x = model.frozen_features(selector.source, pixels_of(processor, images))
    shares = selector.posterior(x)
    single = ContinualClassifier(model, processor, TASKS, fuse=True)
    for row, prediction in enumerate(classifier(images)):
        kept = shares[row].argsort(descending=True).tolist()
        kept = [kept[i] for i in range(3) if shares[row][kept[:i]].sum() < 0.95]
        expected = {}
        for route in kept:
            share = (shares[row, route] / shares[row, kept].sum()).item()
            for name, p in single(images[row], task=-1 if route == 2 else route).probabilities.items():
                expected[name] = expected.get(name, 0.0) + share * p
        assert prediction.probabilities == pytest.approx(expected, abs=1e-4)
    classifier.save_pretrained(tmp_path)
    clip, _ = load_clip(mini_clip_path())
    again = ContinualClassifier.from_pretrained(tmp_path, clip=clip, fuse=True, soft=True)
    assert [p.probabilities for p in again(images)] == [p.probabilities for p in classifier(images)]


def test_what_looks_at_classes_sees_all_tokens_after_the_last_block(processor):
    model = adapted()
    plain, pixels = model.get_base_model(), pixels_of(processor, pictures(3))
    selector = DiscriminantSelector.for_classes(model, reject_rate=0.1)
    with torch.no_grad(), model.disable_adapter():
        x = plain.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
    expected = torch.cat([x[:, 0], x[:, 1:].mean(dim=1), x[:, 1:].std(dim=1, correction=0)], dim=1)
    torch.testing.assert_close(model.frozen_features(selector.source, pixels), expected, rtol=1e-4, atol=1e-4)
    assert selector.linear and selector.needs_labels and selector.reject_rate == 0.1
    assert DiscriminantSelector.for_classes(plain.vision_model).source == selector.source
    with pytest.raises(TypeError, match="vision tower"):
        DiscriminantSelector.for_classes(torch.nn.Linear(2, 2))


def test_errors_name_the_way_out(processor, selector):
    model = adapted()
    with pytest.raises(ValueError, match=r"none is attached: fit a `DiscriminantSelector\.for_classes\(model\)`"):
        ContinualClassifier(model, processor, TASKS, fuse=True)
    advised = DiscriminantSelector.for_classes(model)
    for task, labels in LABELS.items():
        advised.fit(
            task, [(model.frozen_features(advised.source, pixels_of(processor, pictures(40))), torch.tensor(labels))]
        )
    model.attach_selector(advised)
    assert ContinualClassifier(model, processor, TASKS, fuse=True)(pictures(1)[0], task="pets").task == "pets"
    gaussian = GaussianSelector()
    for task in TASKS:
        gaussian.fit(task, model.frozen_features(gaussian.source, pixels_of(processor, pictures(30))))
    model.attach_selector(selector)
    classifier = ContinualClassifier(model, processor, TASKS, fuse=True)
    model.attach_selector(gaussian)
    with pytest.raises(ValueError, match="the attached GaussianSelector knows tasks alone"):
        classifier(pictures(1)[0], task="pets")
    model.attach_selector(selector)
    with pytest.raises(ValueError, match=r"labels up to 2 of task 'pets', for which 2 classes are named"):
        ContinualClassifier(model, processor, {**TASKS, "pets": ["cat", "dog"]}, fuse=True)


def test_class_names_that_differ_in_case_alone(processor, selector):
    """Each is its own class where the task's classes are asked about as they are."""
    model, names = adapted(), {**TASKS, "shapes": ["Cat", "cat"]}
    model.attach_selector(selector)
    fused, plain = (ContinualClassifier(model, processor, names, fuse=fuse) for fuse in (True, False))
    image = pictures(1)[0]
    x = model.frozen_features(selector.source, pixels_of(processor, image))
    _, posterior = selector.class_posterior(x, 1)
    clip = plain(image, task="shapes").probabilities
    product = [clip[name] * p for name, p in zip(names["shapes"], posterior[0].exp().tolist(), strict=True)]
    expected = {name: p / sum(product) for name, p in zip(names["shapes"], product, strict=True)}
    assert fused(image, task="shapes").probabilities == pytest.approx(expected, abs=1e-4)
