"""Streaming discriminant analysis: against all images at once, and what it leaves to plain CLIP."""

# ruff: noqa: F401, F811 -- fixtures are imported

import pytest
import torch
import torch.nn.functional as F
from small_methods import SETTINGS, make, run, tasks

from peft_moe_merge.inference.zero_shot import class_features
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.label_space import LabelSpace
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.methods import METHODS
from peft_moe_merge.selection import DiscriminantSelector

CPU = torch.device("cpu")


def learnt(tasks, **options):
    method = METHODS["slda"](*load_clip(mini_clip_path()), SETTINGS)
    if options:
        method.gaussians = DiscriminantSelector(
            method.gaussians.source, means="classes", shared=(1.0,), reject_rate=0, **options
        )
    for task in tasks:
        method.learn(task)
    return method


def images_of(method, task, split):
    rows = getattr(task, split)
    images = [image.convert("RGB") for image in rows["image"]]
    return method.processor.image_processor(images, return_tensors="pt")["pixel_values"], torch.tensor(rows["label"])


@torch.no_grad()
def asked(method, of, pixels):
    classes = LabelSpace.of_all(of)
    scores = method.scorer(classes, CPU)(pixels)
    cosines = F.normalize(method.model.get_image_features(pixels).pooler_output, dim=-1)
    cosines = cosines @ class_features(method.model, method.processor.tokenizer, classes.prompts).T
    return scores, (method.model.logit_scale.exp() * cosines).softmax(dim=1)


@torch.no_grad()
def test_the_classes_of_a_task_are_told_apart_as_by_all_images_at_once(tasks):
    method = learnt(tasks, shrinkage=(0.2,), held_out=1e-9)
    deviations, means, count = 0.0, {}, 0
    for task in tasks:
        pixels, labels = images_of(method, task, "train")
        x = method.frozen_features(method.gaussians.source, pixels).double()
        means[task.name] = torch.stack([x[labels == label].mean(dim=0) for label in range(len(task.class_names))])
        centred = x - means[task.name][labels]
        deviations, count = deviations + centred.T @ centred, count + len(x)
    covariance = deviations / count
    covariance = 0.8 * covariance + 0.2 * torch.diag(covariance.diagonal())
    for task in tasks:
        pixels, labels = images_of(method, task, "test")
        scores, _ = asked(method, [task], pixels)
        x = method.frozen_features(method.gaussians.source, pixels).double()
        weights = torch.linalg.solve(covariance, means[task.name].T)
        expected = x @ weights - 0.5 * (means[task.name].T * weights).sum(dim=0)
        assert scores.argmax(dim=1).tolist() == expected.argmax(dim=1).tolist()
        assert (scores.argmax(dim=1) == labels).float().mean() > 0.8
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(len(x)))


def test_among_the_classes_of_learnt_tasks_the_gaussians_alone_decide(tasks):
    method = learnt(tasks[:2])
    pixels, _ = images_of(method, tasks[0], "test")
    x = method.frozen_features(method.gaussians.source, pixels[:5])
    scores, _ = asked(method, tasks[:2], pixels[:5])
    of_task = method.gaussians.posterior(x, may_be_none=False)
    expected = [of_task[:, t : t + 1] * method.gaussians.class_posterior(x, t)[1].exp() for t in range(2)]
    torch.testing.assert_close(scores, torch.cat(expected, dim=1))


def test_some_classes_are_of_no_learnt_task(tasks):
    method = learnt(tasks[:2])
    pixels, _ = images_of(method, tasks[2], "test")
    x = method.frozen_features(method.gaussians.source, pixels[:5])
    scores, clip = asked(method, tasks, pixels[:5])
    of_route = method.gaussians.posterior(x)
    own = [of_route[:, t : t + 1] * method.gaussians.class_posterior(x, t)[1].exp() for t in range(2)]
    expected = of_route[:, 2:] * clip
    expected[:, :7] += torch.cat(own, dim=1)
    torch.testing.assert_close(scores, expected)


def test_a_task_not_learnt_is_left_to_clip(run, tasks):
    method = learnt(tasks[:2])
    pixels, _ = images_of(method, tasks[2], "test")
    scores, clip = asked(method, [tasks[2]], pixels[:5])
    torch.testing.assert_close(scores, clip)
    matrix, zero_shot = run("slda").matrix, run("zero_shot").matrix[0]
    for row in range(3):
        assert matrix[row][row + 1 :] == zero_shot[row + 1 :]


def test_the_order_of_tasks_makes_no_difference(tasks):
    one, other = learnt(tasks), learnt(tasks[::-1])
    pixels, _ = images_of(one, tasks[0], "test")
    for of in ([tasks[0]], tasks):
        torch.testing.assert_close(asked(one, of, pixels)[0], asked(other, of, pixels)[0], atol=1e-4, rtol=1e-3)


def test_nothing_of_old_tasks_changes_but_the_common_covariance(tasks):
    method = learnt(tasks[:1])
    before = {name: tensor.clone() for name, tensor in method.gaussians.own[0].items() if name != "threshold"}
    scatter = method.gaussians.shared["scatter"].clone()
    method.learn(tasks[1])
    assert all(torch.equal(method.gaussians.own[0][name], tensor) for name, tensor in before.items())
    assert not torch.equal(method.gaussians.shared["scatter"], scatter)


def test_it_takes_no_steps(make):
    assert make("slda").trainable_parameters() == [] and not METHODS["slda"].trains
    with pytest.raises(RuntimeError, match="knows no task yet"):
        make("slda").gaussians.class_posterior(torch.zeros(1, 3), 0)
