"""The metrics on a matrix worked out by hand."""

import math

import evaluate
import pytest

from peft_moe_merge.mtil.metrics import mtil

#            task 0  task 1  task 2
MATRIX = [[80.0, 30.0, 20.0], [70.0, 90.0, 26.0], [65.0, 84.0, 95.0]]
EXPECTED = {
    "transfer": (30 + (20 + 26) / 2) / 2,  # 26.5
    "average": ((80 + 70 + 65) / 3 + (30 + 90 + 84) / 3 + (20 + 26 + 95) / 3) / 3,
    "last": (65 + 84 + 95) / 3,
    "forgetting": ((80 - 65) + (90 - 84)) / 2,  # 10.5
}


def test_evaluate_loads_it_from_the_package():
    metric = evaluate.load(mtil.__file__)
    result = metric.compute(accuracies=MATRIX)
    for name, value in EXPECTED.items():
        assert result[name] == pytest.approx(value)
    assert result["transfer_per_task"][1:] == pytest.approx([30, 23]) and math.isnan(result["transfer_per_task"][0])
    assert result["average_per_task"] == pytest.approx([215 / 3, 68, 47])
    assert result["last_per_task"] == [65, 84, 95]
    assert result["forgetting_per_task"][:2] == pytest.approx([15, 6]) and math.isnan(result["forgetting_per_task"][2])


def test_one_task():
    result = mtil.stream_metrics([[50.0]])
    assert math.isnan(result["transfer"]) and math.isnan(result["forgetting"])
    assert result["average"] == result["last"] == 50


@pytest.mark.parametrize("matrix", [[], [[1.0, 2.0]], [[1.0], [2.0]]])
def test_not_square(matrix):
    with pytest.raises(ValueError, match="square"):
        mtil.stream_metrics(matrix)


def test_the_settings_differ_in_what_is_measured_only():
    known, unknown = evaluate.load(mtil.__file__), evaluate.load(mtil.__file__, "x_tail")
    given = known.compute(accuracies=MATRIX)
    for name, value in unknown.compute(accuracies=MATRIX).items():
        assert value == pytest.approx(given[name], nan_ok=True)
    assert "which is known" in known.description and "classes of all tasks" in unknown.description
    assert "2406.18868" in unknown.citation
    with pytest.raises(ValueError, match=r"Unknown setting 'cil'; there are \['mtil', 'x_tail'\]"):
        evaluate.load(mtil.__file__, "cil")
