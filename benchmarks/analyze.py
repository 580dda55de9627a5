"""Time and peak memory of `autorev analyze`, each run in a fresh process: python benchmarks/analyze.py [MODEL ...]"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date

MODELS = ("gpt2", "llama-3.1-8b", "llama-3.1-70b")
REPEATS = 3


def main() -> None:
    """Print one row per model and repeat, in Markdown."""
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print("| command | run | seconds | peak memory |\n|---|---:|---:|---:|")
    for model in sys.argv[1:] or MODELS:
        command = [sys.executable, "cli.py", "analyze", model, "--json"]
        for run in range(REPEATS):
            seconds, kib = measured(command)
            print(f"| `python cli.py analyze {model} --json` | {run + 1} | {seconds:.1f} | {kib / 2**20:.2f} GiB |")


def measured(command: list[str]) -> tuple[float, int]:
    """Wall seconds of a command, and the peak resident memory (KiB) of the largest child so far."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


if __name__ == "__main__":
    main()
