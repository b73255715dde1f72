"""What one call of a WEMoE model passes from a block to the linear layers in it, each thread its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Call(threading.local):
    """The innermost block that is running in this thread.

    Thread-local attributes in place of a context variable: torch.compile follows these and not those. A block sets its
    gates anew when gradient checkpointing recomputes it, in whichever thread.

    Attributes:
        gates_BT: the block's gates.
        recorded: where gates are collected, if somebody asked for them.
    """

    def __init__(self) -> None:
        self.gates_BT: torch.Tensor | None = None
        self.recorded: list[torch.Tensor] | None = None


CALL = Call()


@contextmanager
def recorded_gates() -> Iterator[list[torch.Tensor]]:
    """Collect the gates `[B, T]` of every block that runs inside the context in this thread, in the order of the calls."""
    before, CALL.recorded = CALL.recorded, []
    try:
        yield CALL.recorded
    finally:
        CALL.recorded = before
