"""The click group, and what its commands share: options, and how they tell what they do."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from autorev import __version__
from autorev.cli.ending import Group
from autorev.cli.output import check_place, say
from autorev.errors import SettingError, UnreadableError
from autorev.files import path_of
from autorev.finetuning import world
from autorev.format import visible
from autorev.optimizers import KINDS, Optimizer
from autorev.setting import resolve_lora

_SECONDS_BETWEEN_LINES = 10.0
COUNT, COUNT_OR_NONE = click.IntRange(1, 2**31 - 1), click.IntRange(0, 2**31 - 1)
"""Of samples, tokens, steps: PyTorch counts no further in places."""


class Where(click.Path):
    """A path, `~` being the home folder."""

    def __init__(self, file_okay: bool = True, dir_okay: bool = True) -> None:
        super().__init__(file_okay=file_okay, dir_okay=dir_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click's, and one that the system can look up."""
        try:
            return path_of(os.fsdecode(super().convert(value, param, ctx)))
        except UnreadableError as error:
            self.fail(str(error), param, ctx)


class Output(Where):
    """A file that will be written."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As any path, and one that can be written to."""
        path = super().convert(value, param, ctx)
        check_place(path)
        return path


FILE, FOLDER, ANYWHERE, OUTPUT = Where(dir_okay=False), Where(file_okay=False), Where(), Output(dir_okay=False)
trust_remote_code = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run code that stands beside MODEL's config, or that it names.  [default: refuse it]",
)
base = click.option(
    "--base",
    metavar="MODEL",
    help="The model that a run's adapters belong to, where it is not the one that the run's record names.",
)


class Finite(click.FloatRange):
    """A number that is neither nan nor infinite."""

    name = "number"

    def _describe_range(self) -> str:
        """click writes `x<=None` where there is no bound."""
        return super()._describe_range() if (self.min, self.max) != (None, None) else "finite"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click's, but for nan, which lies within every range."""
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is no finite number", param, ctx)
        return found


class Spelled(click.ParamType[str]):
    """An optimiser by its spelling."""

    name = "spec"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Its one spelling."""
        try:
            return str(Optimizer.parse(value))
        except SettingError as error:
            self.fail(str(error), param, ctx)


optimizer = click.option(
    "--optimizer",
    type=Spelled(),
    metavar="SPEC",
    help=f"{', '.join(KINDS)}; all but adamw-host with :step=backward.  [default: adamw; of fit "
    "whatever of its numbers makes room]",
)


def lora_details(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of adapters beside their rank."""
    dtype = click.option(
        "--adapter-dtype",
        type=click.Choice(["fp32"]),
        help="Of adapters beside 16-bit weights; PEFT's own default is fp32.  [default: the weights']",
    )
    dropout = click.option(
        "--lora-dropout",
        type=Finite(min=0, max=1, max_open=True),
        default=0.0,
        show_default=True,
        metavar="SHARE",
        help="Of the adapters' inputs.",
    )
    return dropout(dtype(command))


def training_step(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the training step that is predicted, beside its size."""
    options = (
        click.option(
            "--dtype",
            type=click.Choice(["fp32", "bf16", "fp16"]),
            help="Of weights, activations and gradients.  [default: bf16; with --autocast fp32]",
        ),
        click.option(
            "--autocast", type=click.Choice(["bf16"]), help="Compute in it, over fp32 weights (Trainer's bf16=True)."
        ),
        click.option(
            "--accumulate",
            type=COUNT,
            default=1,
            show_default=True,
            metavar="INT",
            help="Passes whose gradients one optimizer step adds up.",
        ),
        optimizer,
        click.option(
            "--trains",
            type=click.Choice(["full", "lora", "head"]),
            help="Everything, adapters, or the output layer.  [default: full]",
        ),
        click.option(
            "--lora-rank",
            type=COUNT,
            metavar="INT",
            help="Rank of the adapters; implies --trains lora.  [default: 16]",
        ),
        lora_details,
        click.option(
            "--weights",
            type=click.Choice(["nf4", "nf4-double", "int8", "torchao-int8"]),
            help="Quantise linear layers: by bitsandbytes to 4 bits, without and with scales quantised, too, or to 8; "
            "by torchao to 8.  [default: as they are]",
        ),
        click.option(
            "--loss",
            type=click.Choice(["full", "chunked"]),
            default="full",
            show_default=True,
            help="Materialise all logits, or never more than a chunk.",
        ),
        click.option(
            "--gpus",
            type=COUNT,
            default=1,
            show_default=True,
            metavar="INT",
            help="That train together; figures are per GPU, and so is --batch.",
        ),
        click.option(
            "--shard",
            type=click.Choice(["none", "fsdp", "zero1", "zero2", "zero3"]),
            default="none",
            show_default=True,
            help="Divide weights, gradients and optimizer state among them, as FSDP2 or DeepSpeed.",
        ),
        click.option(
            "--sequence-parallel",
            type=COUNT,
            default=1,
            show_default=True,
            metavar="DEGREE",
            help="GPUs that share the tokens of a sample (Ulysses).",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="autorev")
def main() -> None:
    """Memory of PyTorch training: what can be made reversible, what that saves, and what every way to train costs."""


def what_trains(trains: str | None, lora_rank: int | None) -> tuple[str, int | None]:
    """`resolve_lora` in the command line's own words."""
    if lora_rank is not None and trains in ("full", "head"):
        raise click.UsageError(f"--lora-rank has no meaning with --trains {trains}; leave one of them out")
    return resolve_lora(trains, lora_rank)


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal's stderr; nothing where nobody watches."""
    if not sys.stderr.isatty():
        yield lambda message, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda message, fraction: bar.update(task, description=visible(message), completed=fraction)


@contextmanager
def steps_told() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal; a line now and then where the output goes to a file. One process speaks for all of them."""
    if world.rank() > 0:
        yield lambda message, fraction: None
        return
    if sys.stderr.isatty():
        with progress() as tell:
            yield tell
        return
    last = [0.0]

    def line(message: str, fraction: float) -> None:
        now = time.monotonic()
        if now - last[0] >= _SECONDS_BETWEEN_LINES or fraction >= 1:
            last[0] = now
            say(message, err=True)

    yield line
