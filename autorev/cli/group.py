"""The click group: every way a command can fail, and what the commands share."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from autorev import __version__
from autorev.errors import AutorevError

COMMAND = "autorev.command"
"""Where the command as it was typed is kept in click's context: a report says how it was made."""
_SECONDS_BETWEEN_LINES = 10.0
_INTERRUPTED = 130
"""What a shell reports for a program that Ctrl-C ended."""


class _Group(click.Group):
    """Every way a command can fail, in one place: what the user sees, and the exit code."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        program = ["python", info_name] if info_name and info_name.endswith(".py") else ["autorev"]
        command = shlex.join([*program, *args])
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[COMMAND] = command
        return context

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(_INTERRUPTED)
        except AutorevError as error:
            _show_traceback()
            raise click.ClickException(str(error)) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of a pipe went away, which click ends quietly
            _show_traceback()
            text = " ".join(str(error).split())
            raise click.ClickException(
                f"autorev failed on {type(error).__name__}: {text}. This is a bug in autorev: please report "
                "it with the command, and set AUTOREV_TRACEBACK=1 for the traceback."
            ) from None


def _show_traceback() -> None:
    if os.environ.get("AUTOREV_TRACEBACK"):
        traceback.print_exc()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="autorev")
def main() -> None:
    """Memory of PyTorch training: what can be made reversible, what that saves, and what every way to train costs."""


def what_trains(trains: str | None, lora_rank: int | None) -> tuple[str, int | None]:
    """A rank alone means LoRA, and LoRA alone means rank 16."""
    if lora_rank is None:
        return trains or "full", 16 if trains == "lora" else None
    if trains in ("full", "head"):
        raise click.UsageError(f"--lora-rank has no meaning with --trains {trains}; leave one of them out")
    return "lora", lora_rank


def write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.FileError(str(path), f"{error.strerror}; name another file") from None


def file_name(model: str) -> str:
    """A model's name without what a file system, or a shell, reads as something else."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal's stderr; nothing where nobody watches."""
    if not sys.stderr.isatty():
        yield lambda message, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda message, fraction: bar.update(task, description=message, completed=fraction)


@contextmanager
def steps_told() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal; a line now and then where the output goes to a file."""
    if sys.stderr.isatty():
        with progress() as tell:
            yield tell
        return
    last = [0.0]

    def line(message: str, fraction: float) -> None:
        now = time.monotonic()
        if now - last[0] >= _SECONDS_BETWEEN_LINES or fraction >= 1:
            last[0] = now
            click.echo(message, err=True)

    yield line
