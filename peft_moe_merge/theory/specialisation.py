"""What has the gate made of its experts? Who hears which cluster, how cleanly, and how evenly.

Shapes: S seeds, T rounds, N tasks, C clusters, M experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .simulate import Run


def gate_gap(run: Run) -> Tensor:
    """How far apart the experts' scores of a task's signal are, highest minus lowest, mean over tasks; `[S, T]`."""
    return (run.scores_STMN.amax(2) - run.scores_STMN.amin(2)).mean(-1)


def loads(run: Run, first_round: int = 1) -> Tensor:
    """How many rounds of each task each expert heard, from round `first_round` on; `[S, M, N]`."""
    S, M, N = len(run.experts_ST), run.setting.experts, run.setting.tasks
    tasks_ST = run.tasks_ST[:, first_round - 1 :]
    cell_ST = run.experts_ST[:, first_round - 1 :] * N + tasks_ST
    counts_SX = torch.zeros(S, M * N, dtype=torch.long)
    return counts_SX.scatter_add_(1, cell_ST, torch.ones_like(cell_ST)).view(S, M, N)


def cluster_loads(run: Run, first_round: int = 1) -> Tensor:
    """`loads`, summed over the tasks of each cluster; `[S, M, C]`."""
    loads_SMN = loads(run, first_round)
    loads_SMC = loads_SMN.new_zeros(*loads_SMN.shape[:2], run.setting.clusters)
    return loads_SMC.index_add_(2, run.setting.cluster_of_task, loads_SMN)


def purity(loads_SMC: Tensor) -> Tensor:
    """Share of rounds whose expert hears their cluster more than any other cluster.

    1 when no expert mixes clusters; about 1 over the number of clusters when routing is random.

    Args:
        loads_SMC: rounds of each expert and cluster.

    Returns:
        `[S]`.
    """
    return loads_SMC.amax(2).sum(1) / loads_SMC.sum((1, 2))


def expert_sets(run: Run) -> Tensor:
    """The cluster whose signal each expert's final gate vector scores highest: the expert sets of the theory; `[S, M]`."""
    best_SM = run.scores_STMN[:, -1].argmax(-1)
    return run.setting.cluster_of_task[best_SM]


def at_home(loads_SMC: Tensor, sets_SM: Tensor) -> Tensor:
    """Share of rounds that an expert of their cluster's own set hears; `[S]`."""
    return loads_SMC.gather(2, sets_SM.unsqueeze(2)).sum((1, 2)) / loads_SMC.sum((1, 2))


def evenness(loads_SMC: Tensor, sets_SM: Tensor) -> Tensor:
    """How evenly the rounds of a cluster are spread over the experts of its set.

    The entropy of the experts' shares of the rounds that the set hears of its cluster, over the entropy of equal shares:
    1 is even, 0 is one expert doing everything. Mean over the sets of more than one expert that hear anything.

    Args:
        loads_SMC: rounds of each expert and cluster.
        sets_SM: set of each expert, see `expert_sets`.

    Returns:
        `[S]`; nan for a seed without such a set.
    """
    members_SMC = one_hot(sets_SM, loads_SMC.shape[2])
    heard_SMC = (loads_SMC * members_SMC).double()
    total_SC = heard_SMC.sum(1)
    share_SMC = heard_SMC / total_SC.clamp_min(1).unsqueeze(1)
    entropy_SC = -torch.xlogy(share_SMC, share_SMC).sum(1)
    size_SC = members_SMC.sum(1)
    relative_SC = torch.where((size_SC > 1) & (total_SC > 0), entropy_SC / size_SC.clamp_min(2).log(), torch.nan)
    return relative_SC.nanmean(1)


def _explored(run: Run) -> Tensor:
    return cluster_loads(run, run.setting.exploration_rounds + 1)


# Each `[S]`, over the rounds after exploration, whether or not the gate stopped then.
MEASURES: dict[str, Callable[[Run], Tensor]] = {
    "purity": lambda run: purity(_explored(run)),
    "rounds at home": lambda run: at_home(_explored(run), expert_sets(run)),
    "evenness": lambda run: evenness(_explored(run), expert_sets(run)),
}
