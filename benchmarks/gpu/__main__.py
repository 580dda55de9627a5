"""What one CUDA card says of autorev, within 25 minutes: python -m benchmarks.gpu

    python -m benchmarks.gpu                          # writes runs/gpu_MACHINE_DATE.jsonl and .md
    python -m benchmarks.gpu --only context --minutes 60
    python -m benchmarks.gpu --device cpu --quick     # the same code with a CPU's counterparts, as CI runs it

Correctness, memory, speed, the longest context, the coupling's kernels, QLoRA, DDP and FSDP2. Every piece of work is a
process with a limit, and a row of the record; the same command goes on where it was stopped. The report is made from
the rows. Linux; `pip install -e ".[test]"` brings what it needs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from autorev.errors import AutorevError, SettingError
from benchmarks.gpu.device import Device
from benchmarks.gpu.machine import FOLDER, here, record_of
from benchmarks.gpu.record import DONE, Record, in_a_process
from benchmarks.gpu.report import ENVIRONMENT, markdown, wrong
from benchmarks.gpu.sections import EVERYWHERE, SECTIONS
from benchmarks.gpu.size import size_for

MINUTES = 25.0
"""Of a run that is not asked for more."""
MEASURED = ("cpu", "cuda")
"""Kinds of devices whose allocators the profiler reads."""


def main(arguments: list[str] | None = None) -> int:
    """Run what is left, and write the report. 1: something is wrong."""
    given = _arguments(arguments)
    try:
        return _run(given)
    except AutorevError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def _arguments(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu", "xpu", "mps"), help="default: cuda, where there is one")
    parser.add_argument("--quick", action="store_true", help="try everything on a toy, in a minute")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all that is left to do ({MINUTES:g})")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument(
        "--record", type=Path, help="a file of JSON lines that is read and added to; default: by machine"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as a JSON array, not the report")
    return parser.parse_args(arguments)


def _run(given: Any) -> int:
    kind = given.device or ("cuda" if torch.cuda.is_available() else None)
    if kind is None:
        raise SettingError(
            "there is no CUDA device; `--device cpu --quick` runs the CPU's counterparts of all sections"
        )
    ends = time.monotonic() + 60 * given.minutes
    asked = Device(kind, "", 0, 1, given.quick)
    log = Path(given.record or FOLDER / "gpu").with_suffix(".log")
    found = in_a_process(here, (asked, size_for(asked)), 120, log)
    if found["status"] != DONE:
        raise SettingError(f"{kind} cannot be used: {found['reason']}")
    device = Device(kind, found["machine"]["machine"], found["memory"], found["count"], given.quick)
    record = Record(record_of(found, given.record), device)
    if not record.of(ENVIRONMENT):
        record.add({"section": ENVIRONMENT, "piece": kind, **found, "took": 0.0})
    names = given.only or list(SECTIONS)
    for number, name in enumerate(names):
        share = SECTIONS[name].SHARE / sum(SECTIONS[other].SHARE for other in names[number:])
        now = time.monotonic()
        record.section, record.deadline = name, now + share * (ends - now)
        if kind not in MEASURED and name not in EVERYWHERE:
            record.refuse(
                "all of it", f"the profiler reads the allocators of {' and '.join(MEASURED)}, and not of {kind}"
            )
            continue
        SECTIONS[name].run(device, size_for(device), record)
    rows = list(record.rows.values())
    page = markdown(rows)
    record.path.with_suffix(".md").write_text(page, encoding="utf-8")
    print(f"{record.path} and {record.path.with_suffix('.md').name} are written", file=sys.stderr)
    print(json.dumps(rows, indent=1) if given.json else page, end="")
    return 1 if wrong(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
