"""`autorev analyze`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from autorev.cli.ending import COMMAND
from autorev.cli.group import COUNT, OUTPUT, main, progress, training_step, trust_remote_code, what_trains
from autorev.cli.output import REPORTS, check_place, file_name, say, write
from autorev.cli.report import show


@main.command(short_help="Residual blocks, verdicts, and predicted training memory.")
@click.argument("model", required=False)
@click.option(
    "--batch",
    type=COUNT,
    metavar="INT",
    help="Samples per step.  [default: 1, images 32]",
)
@click.option(
    "--sequence",
    "--seq",
    type=COUNT,
    metavar="INT",
    help="Tokens per sample.  [default: 2048, or the model's limit]",
)
@training_step
@click.option(
    "--device",
    default="h100-80gb",
    show_default=True,
    metavar="NAME",
    help="Device profile: a name of profiles/devices, or a JSON file.",
)
@trust_remote_code
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option(
    "--html",
    type=OUTPUT,
    metavar="PATH",
    help="Where to write the report.  [default: reports/analyze-MODEL.html; with --json: nowhere]",
)
@click.option("--no-html", is_flag=True, help="Write no HTML report.")
@click.option(
    "--markdown",
    type=OUTPUT,
    metavar="PATH",
    help="Also write the report as Markdown.",
)
@click.pass_context
def analyze(
    ctx: click.Context,
    /,
    model: str | None,
    trust_remote_code: bool,
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
    setting["trains"], setting["lora_rank"] = what_trains(setting["trains"], setting["lora_rank"])
    if html and no_html:
        raise click.UsageError("--html and --no-html contradict each other; give one of them")
    page_of_its_own = html is None and not no_html and not as_json
    if page_of_its_own:
        check_place(REPORTS / "analyze-MODEL.html")
    # Before anything slow: a mistyped device is told at once.
    from autorev.profiles import load_device

    load_device(setting["device"])
    # What the user's own code prints must not mix with what this command prints.
    with progress() as tell, redirect_stdout(sys.stderr):
        tell("reading the model", 0.0)
        from autorev.models.resolve import EMBEDDED, resolve

        workload = resolve(model, trust_remote_code=trust_remote_code)
        from autorev.pipeline import analyze_workload

        analysis = analyze_workload(workload, named=model or EMBEDDED, **setting, progress=tell)
    if page_of_its_own:
        html = REPORTS / f"analyze-{file_name(analysis.model.name)}.html"
    show([analysis], ctx.meta[COMMAND], as_json, html)
    if markdown:
        from autorev.report.render import render_markdown

        write(markdown, render_markdown([analysis]))
        if not as_json:
            say(f"Report: {markdown}")
