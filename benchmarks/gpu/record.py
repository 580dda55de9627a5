"""Rows of JSON that are added to a file as they are made, each by a process of its own, within a limit.

Whatever becomes of a piece of work (an error, a lack of memory, a crash, a hang) is a row with its reason, and costs
the others nothing. A piece that has a row is not run again, but for one that there was no time for; to run one again,
delete its line.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from autorev.errors import AutorevError, SettingError, first_line, is_out_of_memory
from autorev.in_place import NotApplicable
from benchmarks.gpu.device import Device, NoTwin
from benchmarks.gpu.size import Size

Row = dict[str, Any]
"""section, piece, status, reason and took (seconds), and what the piece found."""
DONE, REFUSED, NO_TIME = "done", "refused", "no time"
WRONG = ("failed", "crashed", "stopped")
"""What should not happen, on any device."""
LIMIT = 240
"""Seconds of one piece, where nothing else is said."""
LEAST = 2.0
"""A piece is not begun with less than that left."""
AT_ITS_END = 5.0
"""Seconds for a process that has told what it found."""
PRELOADED = (
    *("benchmarks.gpu.sections", "torch._dynamo", "torch._inductor.compile_fx", "peft", "bitsandbytes"),
    *("torch.distributed.fsdp", "torch.distributed.tensor"),
)
"""What the processes of a CPU begin with, in place of importing it one by one; what is not installed is passed over."""


@dataclass(eq=False)
class Record:
    """The file, and what is in it: the latest row of every piece, by section and name."""

    path: Path
    device: Device
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    deadline: float = float("inf")
    """Of the section that runs, by the monotonic clock."""
    section: str = ""

    def __post_init__(self) -> None:
        if self.path.is_file():
            whole = self.path.read_bytes()
            lines = whole[: whole.rfind(b"\n") + 1]
            if lines != whole:  # the last one was being written when the machine went down
                self.path.write_bytes(lines)
            self.rows = {(row["section"], row["piece"]): row for row in self._read(lines)}

    def _read(self, lines: bytes) -> Iterator[Row]:
        for number, line in enumerate(lines.splitlines(), 1):
            try:
                row = json.loads(line)
                row["section"], row["piece"], row["status"]
            except (ValueError, TypeError, KeyError):
                raise SettingError(
                    f"line {number} of {self.path} is no row of this kit; give another --record"
                ) from None
            yield row

    def of(self, section: str) -> list[Row]:
        """Its rows, in the order in which they were first made."""
        return [row for (name, _), row in self.rows.items() if name == section]

    def piece(self, name: str, work: Callable[..., Row], size: Size, *args: Any, limit: float = LIMIT) -> Row:
        """The row of `work(device, size, *args)`, which is run in a fresh process unless it has one."""
        known = self.rows.get((self.section, name))
        if known is not None and known["status"] != NO_TIME:
            return known
        began = time.monotonic()
        left = self.deadline - began
        row: Row = {"status": NO_TIME, "reason": "the section's share of the minutes was used up"}
        if left >= LEAST:
            row = in_a_process(work, (self.device, size, *args), min(limit, left), self.path.with_suffix(".log"))
            if row["status"] == "stopped" and left < limit:
                row = {"status": NO_TIME, "reason": f"it was stopped after the {left:.0f} s that were left"}
        row = {"section": self.section, "piece": name, **row, "took": round(time.monotonic() - began, 1)}
        self.add(row)
        return row

    def refuse(self, name: str, reason: str) -> None:
        """A piece that this device or machine has no use for."""
        if (self.section, name) not in self.rows:
            self.add({"section": self.section, "piece": name, "status": REFUSED, "reason": reason, "took": 0.0})

    def add(self, row: Row) -> None:
        """Write it, and say so."""
        self.rows[row["section"], row["piece"]] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        reason = f": {row['reason']}" if row.get("reason") else ""
        print(
            f"{row['section']} {row['piece']}: {row['status']}{reason} ({row['took']} s)",
            file=sys.stderr,
            flush=True,
        )


# -- a process


def in_a_process(work: Callable[..., Row], args: tuple[Any, ...], limit: float, log: Path) -> Row:
    """`work(*args)`, of which the first is the device, within `limit` seconds; what it prints goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context(args[0].start_method)
    if args[0].start_method == "forkserver":
        context.set_forkserver_preload([*PRELOADED])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, work, args, str(log)))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return {"status": "stopped", "reason": f"it was stopped after {limit:.0f} s"}
        row: Row = receiver.recv()
        process.join(AT_ITS_END)
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
        return {"status": "crashed", "reason": f"its process ended with {how}; {log.name} has its last words"}
    finally:
        _end(process)
    return row


def _end(process: Any) -> None:
    """With what it began itself: compilers, ranks."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _child(sender: Any, work: Callable[..., Row], args: tuple[Any, ...], log: str) -> None:
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Path(log).open("a", buffering=1, encoding="utf-8") as file:  # a line at a time: it may crash
        sys.stdout = sys.stderr = file
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        faulthandler.enable()
        warnings.simplefilter("ignore")
        sender.send(outcome(work, *args))
        sender.close()
        faulthandler.disable()
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)


def outcome(work: Callable[..., Row], device: Device, size: Size, *args: Any) -> Row:
    """What `work` found, or what became of it."""
    import torch

    torch.set_num_threads(size.threads)
    try:
        with device.allowed():
            return {"status": DONE, "reason": "", **work(device, size, *args)}
    except (NoTwin, NotApplicable) as reason:
        return {"status": REFUSED, "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        if is_out_of_memory(error):
            return {"status": "out of memory", "reason": first_line(error)}
        return {"status": "failed", "reason": str(error) if isinstance(error, AutorevError) else first_line(error)}
