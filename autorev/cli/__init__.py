"""The command line: parses, calls one function, prints. Heavy imports stand inside, so that `--help` is instant."""

from autorev.cli import analyze, evaluate, finetune, fit, profile, report, verify
from autorev.cli.group import main

__all__ = ["analyze", "evaluate", "finetune", "fit", "main", "profile", "report", "verify"]
