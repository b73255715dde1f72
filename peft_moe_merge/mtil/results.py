"""`results.json`: what runs leave behind for reports and other programs."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .checkpoint import Progress
from .metrics.mtil import stream_metrics

PACKAGES = ("peft-moe-merge", "torch", "transformers", "peft", "accelerate", "datasets")


def run_result(seed: int, progress: Progress) -> dict[str, Any]:
    """Sum up one finished run. Accuracies in percent, `matrix[i][j]` on task j after training task i."""
    return {
        "seed": seed,
        "matrix": progress.matrix,
        **stream_metrics(progress.matrix),
        "seconds": progress.seconds,
        "trainable_parameters": progress.trainable_parameters,
        "stored_bytes": progress.stored_bytes,
        "losses": progress.losses,
        "merges": progress.merges,
        "frozen": progress.frozen,
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results.json` whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1))
    os.replace(partial, path)


def empty_results(suite: str, tasks: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Start a results document without runs."""
    return {
        "suite": suite,
        "tasks": tasks,
        "settings": settings,
        "versions": {package: version(package) for package in PACKAGES},
        "methods": {},
    }
