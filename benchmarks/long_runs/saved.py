"""What a long run writes: its state, to go on exactly, and its line of a record, to be shown as far as it came.

Both are replaced whole, so that `kill -9` at any moment costs the steps since the last save and nothing else. The
state has the line in it: after a kill the record may be a save ahead, and is set back with the state.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autorev.lock import held
from autorev.records import drop_parts, write_whole

Line = dict[str, Any]
"""One run in a record: `name`, `status`, and what is known of it."""
DONE = ("done", "does not fit")
"""Statuses of a line that has nothing left to run."""


class Lines:
    """A record of JSON lines, one a run, in the order in which they were begun."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self.by_name: dict[str, Line] = {line["name"]: line for line in map(json.loads, text.splitlines())}

    def put(self, line: Line) -> None:
        """Write the run's line in the place of its old one."""
        self.by_name[line["name"]] = line
        write_whole(self.path, "".join(json.dumps(each) + "\n" for each in self.by_name.values()))

    def left(self, names: list[str]) -> list[str]:
        """Those of `names` that have something left to run."""
        return [name for name in names if self.by_name.get(name, {}).get("status") not in DONE]


class State:
    """One run's file: model, optimiser, random draws, and its line."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.pt"

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, draws: torch.Generator, line: Line) -> None:
        """Replace what is saved."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        held = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "draws": draws.get_state()}
        with part.open("wb") as file:
            torch.save({**held, "line": json.dumps(line)}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, draws: torch.Generator) -> Line | None:
        """Take up what is saved and return the line; None: nothing is, and nothing was changed."""
        drop_parts(self.path)
        if not self.path.is_file():
            return None
        held = torch.load(self.path, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        draws.set_state(held["draws"])
        line: Line = json.loads(held["line"])
        return line

    def drop(self) -> None:
        """The run is over."""
        self.path.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Have a folder of states for this process alone.

    Raises:
        SettingError: another process is at work there.
    """
    with held(folder, "long_run", str(folder), "name another `--folder`"):
        yield
