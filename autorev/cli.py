"""The command line: parses, calls one function, prints. Heavy imports stand inside: `--help` is instant."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autorev import __version__
from autorev.errors import AutorevError

if TYPE_CHECKING:
    from autorev.analysis import Analysis

_COMMAND = "autorev.command"
"""Where the command as it was typed is kept in click's context: a report says how it was made."""
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
        context.meta[_COMMAND] = command
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
    """Find what of a PyTorch model can be trained reversibly, and what that saves."""


@main.command(short_help="Residual blocks, verdicts, and predicted training memory.")
@click.argument("model", required=False)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="INT",
    help="Samples per step.  [default: 1, images 32]",
)
@click.option(
    "--sequence",
    "--seq",
    type=click.IntRange(min=1),
    metavar="INT",
    help="Tokens per sample.  [default: 2048, or the model's limit]",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="bf16",
    show_default=True,
    help="Of weights, activations and gradients.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "adamw-8bit", "sgd", "sgd-momentum"]),
    default="adamw",
    show_default=True,
    help="Whose state is counted.",
)
@click.option(
    "--trains",
    type=click.Choice(["full", "lora", "head"]),
    help="Everything, adapters, or the output layer.  [default: full]",
)
@click.option(
    "--lora-rank",
    type=click.IntRange(min=1),
    metavar="INT",
    help="Rank of the adapters; implies --trains lora.  [default: 16]",
)
@click.option(
    "--loss",
    type=click.Choice(["full", "chunked"]),
    default="full",
    show_default=True,
    help="Materialise all logits, or never more than a chunk.",
)
@click.option(
    "--device",
    default="h100-80gb",
    show_default=True,
    metavar="NAME",
    help="Device profile: a name of profiles/devices, or a JSON file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PATH",
    help="Where to write the report.  [default: reports/analyze-MODEL.html; with --json: nowhere]",
)
@click.option("--no-html", is_flag=True, help="Write no HTML report.")
@click.option(
    "--markdown",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PATH",
    help="Also write the report as Markdown.",
)
@click.pass_context
def analyze(
    ctx: click.Context,
    /,
    model: str | None,
    as_json: bool,
    html: Path | None,
    no_html: bool,
    markdown: Path | None,
    **setting: Any,
) -> None:
    """Say which blocks of MODEL can be made reversible, and predict its training memory.

    MODEL is a profile name, a GGUF file, a folder with a transformers config.json, a hub id, or
    package.module:factory. Without it, the embedded SmolLM2 is analysed. No weights are read.

    \b
    Examples:
      autorev analyze
      autorev analyze llama-3.1-8b --lora-rank 16 --sequence 32768 --device h100-80gb
      autorev analyze my_package.model:make --batch 8 --json > analysis.json
    """
    setting["trains"], setting["lora_rank"] = _what_trains(setting["trains"], setting["lora_rank"])
    if html and no_html:
        raise click.UsageError("--html and --no-html contradict each other; give one of them")
    # Before anything slow: a mistyped device is told at once.
    from autorev.profiles import load_device

    load_device(setting["device"])
    # What the user's own code prints must not mix with what this command prints.
    with _progress() as progress, redirect_stdout(sys.stderr):
        progress("reading the model", 0.0)
        from autorev.models.resolve import resolve

        workload = resolve(model)
        from autorev.pipeline import analyze_workload

        analysis = analyze_workload(workload, **setting, progress=progress)
    if html is None and not no_html and not as_json:
        html = Path("reports") / f"analyze-{_file_name(analysis.model.name)}.html"
    if as_json:
        click.echo(analysis.to_json())
    else:
        from rich.console import Console

        from autorev.report.terminal import print_analysis

        print_analysis(analysis, Console())
    _write_reports(analysis, ctx.meta[_COMMAND], html, markdown, quiet=as_json)


@main.command(short_help="Check a converted model's gradients against ordinary autograd.")
@click.argument("model", required=False)
@click.option(
    "--coupling",
    type=click.Choice(["momentum", "leapfrog", "midpoint", "midpoint_a", "bdia", "hamiltonian", "revnet"]),
    default="momentum",
    show_default=True,
)
@click.option("--gamma", type=float, metavar="FLOAT", help="Of momentum: n / 2^k.  [default: 0.125]")
@click.option("--c", type=float, metavar="FLOAT", help="Factor of the branches.  [default: the coupling's own]")
@click.option("--arithmetic", type=click.Choice(["exact", "float"]), default="exact", show_default=True)
@click.option("--granularity", type=click.Choice(["block", "sublayer"]), default="block", show_default=True)
@click.option(
    "--keep-last",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    metavar="INT",
    help="Blocks at the end of each chain that are stored.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, metavar="INT")
@click.option(
    "--sequence",
    "--seq",
    type=click.IntRange(min=1),
    metavar="INT",
    help="Tokens per sample.  [default: 128, or the model's limit]",
)
@click.option("--dtype", type=click.Choice(["fp32", "fp64", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    model: str | None,
    batch: int,
    sequence: int | None,
    dtype: str,
    as_json: bool,
    **how: Any,
) -> None:
    """Convert MODEL, and check its gradients on one batch of random tokens or images.

    MODEL is what `autorev analyze` takes. A GGUF file and a folder with weights are loaded; of a profile, a config or
    a factory the weights are random. Exits with 1 if the gradients are not those of ordinary autograd.

    \b
    Examples:
      autorev verify
      autorev verify my_folder --coupling leapfrog --arithmetic float
      autorev verify my_package.model:make --json
    """
    with _progress() as progress, redirect_stdout(sys.stderr):
        progress("loading the model", 0.0)
        import torch

        from autorev.models.load import load_model
        from autorev.predict.training import DTYPES
        from autorev.rewrite.convert import convert
        from autorev.verification import verify_call

        loaded = load_model(model, {**DTYPES, "fp64": torch.float64}[dtype], batch, sequence)
        args, kwargs = loaded.call
        progress("converting", 0.3)
        conversion = convert(loaded.model, example_args=args, example_kwargs=kwargs, **how)
        progress("running both ways", 0.6)
        found = verify_call(loaded.model, args, kwargs)
    if as_json:
        fields = {"model": loaded.name, "pretrained": loaded.pretrained}
        parts = {"conversion": json.loads(conversion.to_json()), "verification": json.loads(found.to_json())}
        click.echo(json.dumps({**fields, **parts}, indent=1))
    else:
        weights = "its weights" if loaded.pretrained else "random weights"
        click.echo(f"{loaded.name}, {weights}, {dtype}\n{conversion}\n{found}")
    if not found.passed:
        ctx.exit(1)


def _what_trains(trains: str | None, lora_rank: int | None) -> tuple[str, int | None]:
    """A rank alone means LoRA, and LoRA alone means rank 16."""
    if lora_rank is None:
        return trains or "full", 16 if trains == "lora" else None
    if trains in ("full", "head"):
        raise click.UsageError(f"--lora-rank has no meaning with --trains {trains}; leave one of them out")
    return "lora", lora_rank


def _write_reports(analysis: Analysis, command: str, html: Path | None, markdown: Path | None, quiet: bool) -> None:
    if html:
        from autorev.report.html import render_html

        _write(html, render_html(analysis, command))
    if markdown:
        from autorev.report.markdown import render_markdown

        _write(markdown, render_markdown(analysis))
    for path in (html, markdown):
        if path and not quiet:
            click.echo(f"Report: {path}")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.FileError(str(path), f"{error.strerror}; name another file") from None


def _file_name(model: str) -> str:
    """A model's name without what a file system, or a shell, reads as something else."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
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
