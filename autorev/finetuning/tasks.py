"""Benchmarks of the Language Model Evaluation Harness (`lm_eval`), for who has it and its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from autorev.errors import SettingError, one_line
from autorev.packages import require


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], folder: Path | None, limit: int | None
) -> dict[str, dict[str, float]]:
    """Every figure of every task; `folder` holds task files of the user's own, `limit` is of examples a task.

    Raises:
        SettingError: lm_eval knows no such task, or cannot reach its data.
        MissingPackageError: it is not installed.
    """
    require("a benchmark task", "lm_eval")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
            tasks=list(tasks),
            task_manager=TaskManager(include_path=None if folder is None else str(folder)),
            limit=limit,
        )
    except Exception as error:  # the harness, its data sets and their hosts each have errors of their own
        raise SettingError(f"the harness cannot run {', '.join(tasks)}: {one_line(error)}") from error
    results: dict[str, dict[str, Any]] = found["results"]
    return {
        task: {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        for task, figures in results.items()
    }
