"""Processes for tests: real ones, that begin with the slow imports behind them."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

PATIENCE = 300


def start(function: Callable, *args: Any) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_moe_merge.mtil.methods", "peft_moe_merge.mtil.data.digits", "accelerate"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def world(size: int) -> list[dict[str, str]]:
    """What tells each of `size` processes that it is one of several, as `torchrun` would set it."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(size)]


def _as_rank(environment: dict[str, str], function: Callable, *args: Any) -> None:
    os.environ.update(environment)
    function(*args)


def run_together(size: int, function: Callable, *args: Any) -> None:
    """Call a function in several processes that train together, and wait for them."""
    processes = [start(_as_rank, environment, function, *args) for environment in world(size)]
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size, f"exit codes {codes}; None means it did not end"
