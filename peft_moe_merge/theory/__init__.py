"""When should a router stop learning? Mixture-of-experts theory of continual learning, simulated and in closed form.

`simulate` runs the model, `closed_forms` predicts it, `specialisation` measures what the gate made of its experts, `study`
lists the runs that the theory's claims need, `claims` checks them, and `figures` and `page` show them.
"""

from .closed_forms import (
    expected_curves,
    expected_error,
    mean_task_gap,
    mean_task_power,
    single_expert_error,
    single_expert_forgetting,
)
from .simulate import Run, Setting, simulate

__all__ = [
    "Run",
    "Setting",
    "expected_curves",
    "expected_error",
    "mean_task_gap",
    "mean_task_power",
    "simulate",
    "single_expert_error",
    "single_expert_forgetting",
]
