"""The command line: parses, calls one function, prints. Heavy imports stand inside, so that `--help` is instant."""

from autorev.cli import analyze, finetune, profile, report, verify
from autorev.cli.group import main

__all__ = ["analyze", "finetune", "main", "profile", "report", "verify"]
