"""Transfer, Average, Last and forgetting of a stream of tasks: a module for `evaluate.load(<this file>)`.

The settings of the benchmark differ in what the accuracies are of, not in what is computed from them:
`evaluate.load(<this file>, "x_tail")` says so of X-TAIL, where nobody names an image's task.

Shapes: T tasks. `a[i][j]` is the accuracy on task j after training task i.
"""

import datasets
import evaluate
import numpy as np

SETTINGS = {
    "mtil": "An image is classified among the classes of its task, which is known.",
    "x_tail": "An image is classified among the classes of all tasks of the stream, learnt or not; its task is not known.",
}
"""What `accuracies` are of, by the configuration's name."""

DESCRIPTION = """
How a model fares that learns T tasks one after another, from its accuracies a[i][j] on task j after training task i.
Transfer of task j > 0: mean of a[i][j] over i < j, what it could do before it learnt the task. Average of task j: mean
over all i. Last of task j: a[T-1][j]. Forgetting of task j < T-1: max_i a[i][j] - a[T-1][j].
"""
INPUTS = """
Args:
    accuracies: the T x T matrix, one list per trained task, all in one unit (percent, say).
Returns:
    `transfer`, `average`, `last`, `forgetting`: means over the tasks that have them (NaN where no task has), and
    `<name>_per_task`: lists of T with NaN for the first task's transfer and the last task's forgetting.
"""
CITATIONS = {
    "mtil": "Zheng et al., Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models, 2023",
    "x_tail": "Xu et al., Advancing Cross-domain Discriminability in Continual Learning of Vision-Language Models, 2024 "
    "(arXiv 2406.18868)",
}


def stream_metrics(accuracies: list[list[float]]) -> dict[str, float | list[float]]:
    """Compute what `INPUTS` says.

    Raises:
        ValueError: the matrix is not square, or empty.
    """
    a_TT = np.asarray(accuracies, dtype=np.float64)
    if a_TT.ndim != 2 or a_TT.shape[0] != a_TT.shape[1] or not a_TT.size:
        raise ValueError(f"`accuracies` must be a square matrix, task by task; got shape {a_TT.shape}.")
    tasks = len(a_TT)
    per_task = {
        "transfer": [np.nan, *(a_TT[:task, task].mean() for task in range(1, tasks))],
        "average": list(a_TT.mean(axis=0)),
        "last": list(a_TT[-1]),
        "forgetting": [*(a_TT[:, task].max() - a_TT[-1, task] for task in range(tasks - 1)), np.nan],
    }
    means = {}
    for name, values in per_task.items():
        known = [float(value) for value in values if not np.isnan(value)]
        means[name] = float(np.mean(known)) if known else float("nan")
    return {**means, **{f"{name}_per_task": [float(value) for value in values] for name, values in per_task.items()}}


class Mtil(evaluate.Metric):
    """Transfer, Average, Last and forgetting, in the setting `mtil` (the default) or `x_tail`."""

    def _info(self) -> evaluate.MetricInfo:
        setting = "mtil" if self.config_name == "default" else self.config_name
        if setting not in SETTINGS:
            raise ValueError(f"Unknown setting {setting!r}; there are {list(SETTINGS)}.")
        return evaluate.MetricInfo(
            description=f"{DESCRIPTION}{SETTINGS[setting]}\n",
            citation=CITATIONS[setting],
            inputs_description=INPUTS,
            features=datasets.Features({"accuracies": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, accuracies: list[list[float]]) -> dict[str, float | list[float]]:
        return stream_metrics(accuracies)
