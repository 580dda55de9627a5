"""Where the kit runs, and which record its rows belong to."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from datetime import date
from pathlib import Path

from cattrs import unstructure

from autorev.errors import SettingError
from autorev.profiler.environment import environment
from benchmarks.gpu.device import Device
from benchmarks.gpu.record import Row
from benchmarks.gpu.size import Size, size_for

FOLDER = Path(__file__).parents[2] / "runs"
"""Of no repository: a record that is kept is copied to `benchmarks/`."""


def here(device: Device, size: Size) -> Row:
    """Where this process is: asked in one of its own, as a context of CUDA takes memory."""
    count = 1 if device.kind == "cpu" else device.module.device_count()
    if not count:
        raise SettingError(f"there is no {device.kind} device")
    machine = environment(device.kind, size.threads)
    found = Device(device.kind, machine.machine, machine.memory_bytes, count, device.quick)
    return {
        "machine": unstructure(machine),
        "kind": device.kind,
        "memory": machine.memory_bytes,
        "count": count,
        "quick": device.quick,
        "size": asdict(size_for(found)),
    }


def record_of(found: Row, path: Path | None) -> Path:
    """The file that this machine's rows go to: the one asked for, one that was begun in the same setting, or a new one.

    Raises:
        SettingError: the file is of another machine, version or kind of run.
    """
    machine = found["machine"]
    name = re.sub(r"[^a-z0-9]+", "-", machine["machine"].lower()).strip("-")
    if path is None:
        begun = [file for file in sorted(FOLDER.glob(f"gpu_{name}_*.jsonl")) if not _differences(file, found)]
        return begun[-1] if begun else FOLDER / f"gpu_{name}_{date.today()}.jsonl"
    if path.is_file() and (different := _differences(path, found)):
        raise SettingError(f"{path} is of another run ({', '.join(different)}); give another --record")
    return path


def _differences(path: Path, found: Row) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines:
        return []
    try:
        first, here = json.loads(lines[0]), found["machine"]
        differ = [name for name in ("machine", "versions", "commit") if first["machine"][name] != here[name]]
        return differ + [name for name in ("kind", "quick", "count") if first[name] != found[name]]
    except (ValueError, TypeError, KeyError):
        return ["what it holds"]
