"""`autorev profile`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from autorev.cli.ending import COMMAND
from autorev.cli.group import (
    ANYWHERE,
    COUNT,
    FOLDER,
    OUTPUT,
    Finite,
    lora_details,
    main,
    optimizer,
    progress,
    trust_remote_code,
    what_trains,
)
from autorev.cli.output import REPORTS, check_place, say
from autorev.cli.report import show

_RECORDS = Path("profiles/recorded")
_QUICK = ("plain", "checkpoint", "momentum:k=3")
_QUICK_TOKENS = 128
"""Without MODEL: a first look, of about two minutes on two cores."""


@main.command(short_help="Measured memory and throughput of every way to train.")
@click.argument("model", required=False)
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="SPEC",
    help="A way to train, repeatable: plain, checkpoint, sac, offload, compile, momentum:k=2, leapfrog, midpoint, "
    "hamiltonian, ..., each with :option=value (keep_last=4, arithmetic=float, loss=chunked); `all` for all.  "
    "[default: plain, checkpoint, momentum, momentum with a chunked loss]",
)
@click.option("--batch", type=COUNT, metavar="INT", help="Samples per step.  [default: 1, images 32]")
@click.option(
    "--sequence",
    "--seq",
    type=COUNT,
    metavar="INT",
    help="Tokens per sample.  [default: 256, or the model's limit; without MODEL 128]",
)
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="[default: fp32 on a CPU, bf16 on a GPU]")
@click.option("--autocast", type=click.Choice(["bf16"]), help="Compute in it, over fp32 weights (Trainer's bf16=True).")
@optimizer
@click.option("--trains", type=click.Choice(["full", "lora", "head"]), help="[default: full]")
@click.option(
    "--lora-rank",
    type=COUNT,
    metavar="INT",
    help="Rank of the adapters; implies --trains lora.  [default: 16]",
)
@lora_details
@click.option("--depth", type=COUNT, metavar="INT", help="So many blocks, with random weights, of a config.")
@click.option(
    "--text",
    type=ANYWHERE,
    metavar="FILE",
    help="Text to train on.  [default: CPython's language reference, where MODEL has a tokenizer]",
)
@click.option(
    "--rounds",
    type=COUNT,
    metavar="INT",
    help="Fresh processes per method; they take turns.  [default: 2; without MODEL 1]",
)
@click.option("--timed-steps", type=COUNT, default=3, show_default=True, metavar="INT", help="Timed steps in each.")
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="AXIS[=N,N,...]",
    help="Along batch, sequence or depth, up to the largest that fits; repeatable.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="The budget: 2GiB, or +128MiB beside parameters, gradients and optimiser state.  [default: the GPU's]",
)
@click.option(
    "--longest-step",
    type=Finite(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="A sweep ends before steps that take longer.",
)
@click.option(
    "--goal",
    type=click.Choice(["memory", "throughput", "context"]),
    default="memory",
    show_default=True,
    help="What the recommendation is for.",
)
@click.option("--device", metavar="NAME", help="Device profile for utilisation.  [default: this machine's]")
@click.option("--predict", is_flag=True, help="Predict every method and run none.")
@click.option("--name", metavar="NAME", help="Of the record.  [default: made of model and setting]")
@click.option(
    "--out",
    type=FOLDER,
    default=_RECORDS,
    show_default=True,
    help="Where the record goes.",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@trust_remote_code
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON and nothing else.")
@click.option(
    "--html",
    type=OUTPUT,
    metavar="PATH",
    help="Where to write the report.  [default: reports/profile-NAME.html; with --json: nowhere]",
)
@click.option("--no-html", is_flag=True, help="Write no HTML report.")
@click.pass_context
def profile(
    ctx: click.Context,
    /,
    model: str | None,
    methods: tuple[str, ...],
    as_json: bool,
    html: Path | None,
    no_html: bool,
    **options: Any,
) -> None:
    """Run real training steps of MODEL under every method, in fresh processes, and say what each costs.

    MODEL is what `autorev analyze` takes. A GGUF file and a folder with weights are loaded; of a profile, a config or
    a factory the weights are random. Without MODEL, the embedded SmolLM2 is fine-tuned for a few steps of 128 tokens,
    plain, checkpointed and reversibly, which takes about two minutes.

    \b
    Examples:
      autorev profile
      autorev profile --lora-rank 16 --sequence 512 --method all
      autorev profile gpt2 --depth 24 --sweep batch --memory +256MiB --goal throughput
      autorev profile my_package.model:make --method plain --method momentum:k=2
    """
    options["trains"], options["lora_rank"] = what_trains(options["trains"], options["lora_rank"])
    if html and no_html:
        raise click.UsageError("--html and --no-html contradict each other; give one of them")
    page_of_its_own = html is None and not no_html and not as_json
    if page_of_its_own:
        check_place(REPORTS / "profile-NAME.html")
    if model is None:
        methods = methods or _QUICK
        options["sequence"] = options["sequence"] or _QUICK_TOKENS
    options["rounds"] = options["rounds"] or (1 if model is None else 2)
    command = ctx.meta[COMMAND]
    with progress() as tell, redirect_stdout(sys.stderr):
        tell("starting", 0.0)
        from autorev.profiler.run import profile as run

        record = run(model, methods=methods or ("default",), command=command, progress=tell, **options)
    if page_of_its_own:
        html = REPORTS / f"profile-{record.name}.html"
    show([record], command, as_json, html)
    if not as_json:
        say(f"Record: {Path(options['out']) / record.name}.json")
    if record.why_empty:
        raise click.ClickException(f"no method of {record.model.name} has a result: {record.why_empty}")
