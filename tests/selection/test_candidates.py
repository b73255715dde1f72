"""Which tasks candidate classes admit."""

import pytest
import torch

from peft_moe_merge.selection import tasks_of_candidates

PETS, SHAPES, FOOD = ("cat", "dog", "rabbit"), ("circle", "square", "cat"), ("apple_pie", "soup")
CLASSES = [PETS, SHAPES, FOOD]


@pytest.mark.parametrize(
    "candidates, allowed, complete",
    [
        (PETS, (0,), True),  # a whole list, though "cat" is a shape too
        (("Rabbit", "CAT", " dog "), (0,), True),
        ((*PETS, *FOOD), (0, 2), True),
        (("apple pie", "soup"), (2,), True),
        (("cat",), (0, 1), True),  # either
        (("dog", "rabbit"), (0,), True),  # a part of one list
        (("soup", "dog"), (0, 2), True),  # half of the two
        (("car", "tree", "house"), (), False),
        (("soup", "car"), (2,), False),
        ((*PETS, "car", "tree", "house", "bus"), (0,), False),  # all of pets, one in three of the shapes
        (("cat", "car", "tree", "house"), (), False),  # a shared name is not a shared subject
        ((*PETS, *SHAPES[:2], *FOOD, "car", "tree"), (0, 1, 2), False),  # all domains, learnt or not
    ],
)
def test_by_names(candidates, allowed, complete):
    evidence = tasks_of_candidates(candidates, CLASSES)
    assert (evidence.allowed, evidence.complete) == (allowed, complete)


def test_what_a_chosen_task_rules_out():
    """Classes of other allowed tasks alone: not its own, not those that no such task has."""
    evidence = tasks_of_candidates(["soup", "Dog", "car", "cat", "square", "rabbit", "circle"], CLASSES)
    assert evidence.allowed == (0, 1, 2) and not evidence.complete
    assert [evidence.ruled_out(task) for task in (0, 1, 2)] == [{0, 4, 6}, {0, 1, 5}, {1, 3, 4, 5, 6}]
    evidence = tasks_of_candidates([*FOOD, *PETS], CLASSES)
    assert evidence.complete and [evidence.ruled_out(task) for task in (0, 2)] == [{0, 1}, {2, 3, 4}]
    like = {0: [[0.97, 0.5, 0.3], [0.1] * 3, [0.1] * 3], 1: [[0.1] * 3] * 3, 2: [[0.1] * 2, [0.96, 0.1], [0.1] * 2]}
    evidence = tasks_of_candidates(["kitten", "pie", "car"], CLASSES, lambda task: torch.tensor(like[task]))
    assert evidence.allowed == (2,) and evidence.ruled_out(2) == frozenset(), "pets share one of three: not allowed"


def test_identical_lists_leave_the_choice():
    evidence = tasks_of_candidates(["dog", "cat"], [("cat", "dog"), ("dog", "cat"), ("dog", "cow")])
    assert evidence.allowed == (0, 1) and evidence.complete
    evidence = tasks_of_candidates(["cat", "dog", "cow"], [("cat", "dog"), ("cow", "dog", "cat")])
    assert evidence.allowed == (0, 1) and evidence.complete, "digits among digits and letters"


def test_by_embeddings():
    """Kitten and puppy are like cat and dog, a car like nothing."""
    candidates = ["kitten", "puppy", "car"]
    like = {0: [[0.97, 0.5, 0.3], [0.5, 0.95, 0.3], [0.1, 0.1, 0.1]], 1: [[0.2, 0.2, 0.97], [0.1] * 3, [0.1] * 3]}
    asked = []

    def cosines(task):
        asked.append(task)
        return torch.tensor(like.get(task, [[0.0, 0.0]] * 3))

    evidence = tasks_of_candidates(candidates, CLASSES, cosines, similarity=0.95)
    assert evidence.allowed == (0,) and not evidence.complete, "two of three pets, one of three shapes"
    assert tasks_of_candidates(candidates, CLASSES, cosines, similarity=0.96).allowed == ()
    assert tasks_of_candidates(candidates[:2], CLASSES, lambda task: cosines(task)[:2]).complete
    assert asked.count(0) == asked.count(2) == 3
    assert tasks_of_candidates(PETS, CLASSES, cosines).allowed == (0,) and len(asked) == 9, "equal names need no texts"
    same = {0: [[0.99, 0.99, 0.99]], 1: [[0.99, 0.1, 0.1]], 2: [[0.1, 0.1]]}
    assert tasks_of_candidates(["pet"], CLASSES, lambda task: torch.tensor(same[task])).allowed == (0, 1)


@pytest.mark.parametrize(
    "candidates, message",
    [
        ([], r"at least one class name, got \[\]"),
        ("cat", "at least one class name, got 'cat'"),
        (["cat", 3], "non-empty string, got 3"),
        (["cat", " "], "non-empty string, got ' '"),
        (["cat", "dog", "cat"], r"named twice: \['cat'\]. Name each once"),
    ],
)
def test_bad_candidates(candidates, message):
    with pytest.raises(ValueError, match=message):
        tasks_of_candidates(candidates, CLASSES)
