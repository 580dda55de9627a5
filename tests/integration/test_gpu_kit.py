"""The GPU kit on a CPU, as a user runs it: every section runs its counterpart, or says why it has none.

python -m pytest tests/integration/test_gpu_kit.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.report import markdown
from benchmarks.gpu.sections import SECTIONS

WITHOUT_TWIN = {"attention, efficient", "attention, cudnn", "two devices"}
pytestmark = pytest.mark.slow  # a process for each of 30 pieces, with two more for each of the last


QUICK = ("--device", "cpu", "--quick", "--minutes", "60")


def test_every_section_runs_on_a_cpu_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is wrong, nothing is passed over in silence, and what is done is not done again."""
    file = tmp_path / "rows.jsonl"
    words = [sys.executable, "-m", "benchmarks.gpu", *QUICK, "--record", str(file)]
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr[-2000:] + file.with_suffix(".log").read_text()[-4000:]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["piece"] for row in rows if row["status"] != "done"} == WITHOUT_TWIN
    assert all(row["reason"] for row in rows if row["status"] == "refused")
    assert {row["section"] for row in rows if row["status"] == "done"} == {"environment", *SECTIONS}
    assert done.stdout == markdown(rows) == file.with_suffix(".md").read_text()
    assert all(f"{row['section']} {row['piece']}: {row['status']}" in done.stderr for row in rows)

    by = {(row["section"], row["piece"]): row for row in rows}
    lengths = {row["method"]: row["tokens"] for row in rows if row["section"] == "context"}
    assert lengths["momentum:k=3,keep_last=0"] > lengths["plain"] > 0
    assert all(row["peak"] <= row["memory"] for row in rows if row["section"] == "context")
    plain = by["memory", "plain"]
    assert abs(plain["predicted"] / plain["peak"] - 1) < 0.05
    assert all(row["ranks"] == 2 for row in rows if row["section"] == "ranks")
    assert "aot_eager" in by["speed", "quick"]["compiler"]

    monkeypatch.setattr(command, "in_a_process", lambda *args: rows[0])  # where it runs: asked above
    assert command.main([*QUICK, "--record", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows and len(file.read_text().splitlines()) == len(rows)
