"""`autorev finetune` and `autorev export`."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from autorev.cli.ending import COMMAND
from autorev.cli.group import (
    COUNT,
    COUNT_OR_NONE,
    FILE,
    FOLDER,
    OUTPUT,
    Finite,
    base,
    main,
    optimizer,
    steps_told,
    trust_remote_code,
)
from autorev.cli.output import file_name, say
from autorev.cli.report import show
from autorev.finetuning import world


@main.command(short_help="Fine-tune MODEL reversibly, and follow its quality.")
@click.argument("model", required=False)
@click.option("--text", type=FILE, metavar="FILE", help="Text, or JSONL.  [default: CPython's language reference]")
@click.option("--validation", type=FILE, metavar="FILE", help="Held-out data.  [default: a tenth of the data]")
@click.option(
    "--method",
    metavar="SPEC",
    default="momentum:k=3",
    show_default=True,
    help="What `profile --method` takes: momentum:k=2, leapfrog, ..., and for comparison plain or checkpoint; each "
    "with :option=value (loss=chunked, keep_last=4).",
)
@click.option("--plan", type=FILE, metavar="FILE", help="Train as a plan says that `autorev fit --json` wrote.")
@click.option("--lora-rank", type=COUNT, metavar="INT", help="Train adapters of this rank.  [default: all weights]")
@click.option(
    "--quantize",
    type=click.Choice(["nf4", "int8"]),
    help="Quantise the weights beside the adapters (bitsandbytes); with --lora-rank.",
)
@click.option("--distill", is_flag=True, help="Add KL(original, model) to the loss.")
@click.option("--distill-weight", type=Finite(), metavar="W", help="Its share of the loss.  [default: 0.5]")
@click.option(
    "--schedule",
    type=click.Choice(["leapfrog", "midpoint"]),
    help="Move gamma there during training, until no side bits are needed.",
)
@click.option("--schedule-steps", type=COUNT, metavar="INT", help="Steps until there.  [default: 2/3 of all]")
@click.option(
    "--max-loss-increase",
    type=Finite(min=0),
    metavar="NATS",
    help="Choose each block's side bits such that the loss before training rises by no more.",
)
@click.option("--steps", type=COUNT, default=100, show_default=True, metavar="INT")
@click.option("--sequence", "--seq", type=COUNT, default=256, show_default=True, metavar="INT", help="Tokens in a row.")
@click.option("--batch", type=COUNT, default=1, show_default=True, metavar="INT", help="Rows in a forward pass.")
@click.option("--accumulate", type=COUNT, default=1, show_default=True, metavar="INT", help="Passes in a step.")
@click.option(
    "--learning-rate", "--lr", type=Finite(), metavar="RATE", help="[default: 2e-5; LoRA 2e-4, no weights 1e-3]"
)
@click.option("--decay", default="linear", show_default=True, help="Of the rate: linear, cosine, constant, ...")
@click.option("--warmup", type=COUNT_OR_NONE, metavar="INT", help="Steps in which it rises.  [default: 1/20]")
@click.option(
    "--clip",
    type=Finite(),
    metavar="NORM",
    help="Largest norm of the gradients; 0: any.  [default: 1; any where the optimizer takes them one by one]",
)
@optimizer
@click.option("--autocast", type=click.Choice(["bf16"]), help="Compute in it; the weights stay in fp32.")
@click.option("--pack/--pad", default=True, show_default=True, help="Several documents in a row, or one and padding.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, metavar="INT")
@click.option("--evaluate-every", type=COUNT, metavar="INT", help="Steps.  [default: 1/6 of all]")
@click.option("--save-every", type=COUNT, metavar="INT", help="Steps between checkpoints.  [default: 1/4 of all]")
@click.option("--validation-rows", type=COUNT, default=16, show_default=True, metavar="INT")
@click.option(
    "--shard",
    type=click.Choice(["none", "fsdp"]),
    default="none",
    show_default=True,
    help="In several processes (torchrun): what each holds a part of; fsdp: weights, gradients, optimizer states.",
)
@click.option("--name", metavar="NAME", help="Of the record.  [default: the folder's]")
@click.option("--out", type=FOLDER, metavar="DIR", help="The run's folder.  [default: runs/MODEL-METHOD]")
@click.option("--resume", is_flag=True, help="Go on with the run in DIR, by its own options, from its last checkpoint.")
@trust_remote_code
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON and nothing else.")
@click.option("--html", type=OUTPUT, metavar="PATH", help="Where to write the report.  [default: DIR/report.html]")
@click.pass_context
def finetune(
    ctx: click.Context,
    /,
    model: str | None,
    out: Path | None,
    as_json: bool,
    html: Path | None,
    plan: Path | None,
    **options: Any,
) -> None:
    """Convert MODEL, train it with transformers' Trainer, and say what became of its quality.

    MODEL is what `autorev analyze` takes, with a tokenizer beside its weights; without MODEL the embedded SmolLM2. A
    config without weights is trained from scratch. DIR gets the record, checkpoints while it trains, and in the end the
    model: `autorev.load(DIR)` is the converted one, `autorev export DIR` makes the plain one. The first Ctrl-C saves
    and stops.

    \b
    Examples:
      autorev finetune --steps 30
      autorev finetune my_llm --text chats.jsonl --lora-rank 16 --method momentum:k=3,loss=chunked
      autorev finetune my_llm --lora-rank 16 --quantize nf4
      autorev finetune --schedule leapfrog --distill --steps 300
      autorev finetune --max-loss-increase 0.02
      autorev finetune --resume --out runs/my_llm-momentum-k-3
    """
    command = ctx.meta[COMMAND]
    folder = out or Path("runs") / file_name(f"{model or 'smollm2'}-{options['method']}")
    for name in options:  # the defaults are for --help: a run that goes on has its own
        if ctx.get_parameter_source(name) is ParameterSource.DEFAULT and name not in ("resume", "trust_remote_code"):
            options[name] = None
    if plan is not None:
        options |= _planned(plan, options)
    page = html or folder / "report.html"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    with steps_told() as tell, redirect_stdout(sys.stderr):
        tell("starting", 0.0)
        from autorev.finetuning.folder import finished
        from autorev.finetuning.run import finetune as run

        world.join()
        record = None
        if options["resume"]:
            record = world.first(lambda: None if page.is_file() else finished(folder))  # all but its report was done
        record = record or run(model, out=folder, command=command, progress=tell, **options)
    if world.rank() == 0:
        show([record], command, as_json, page)
        if not as_json:
            say(f"Model and record: {folder}")
    world.leave()


def _planned(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a plan says of options that were not given."""
    from autorev.plan import Plan

    plan = Plan.read(path)
    if plan.method is None:
        raise click.UsageError(f"--plan {path} says that nothing fits; make one for a shorter sequence or more memory")
    if options["method"] is not None:
        raise click.UsageError("--plan says by which method; leave --method out")
    setting = plan.setting
    said: dict[str, Any] = {"sequence": setting.sequence, "batch": setting.batch, "lora_rank": setting.lora_rank}
    said |= {"accumulate": setting.accumulate, "autocast": setting.autocast, "optimizer": setting.optimizer}
    return {"method": plan.method.spec, **{name: value for name, value in said.items() if options[name] is None}}


@main.command(short_help="A fine-tuned model as the plain architecture.")
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option("--out", type=FOLDER, required=True, metavar="DIR2", help="Where the plain model goes.")
@click.option("--text", type=FILE, metavar="FILE", help="To compare on.  [default: the run's own held-out text]")
@click.option(
    "--max-loss-increase",
    type=Finite(),
    metavar="NATS",
    help="Refuse if the loss is higher by more than this without the coupling.  [default: 0.05]",
)
@click.option("--force", is_flag=True, help="Export all the same.")
@base
@trust_remote_code
@click.option("--json", "as_json", is_flag=True, help="Print the two losses as JSON and nothing else.")
def export(
    folder: Path,
    out: Path,
    text: Path | None,
    max_loss_increase: float | None,
    force: bool,
    base: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Write the model that `autorev finetune` left in DIR, or that was converted and saved by `save_pretrained`, as a
    folder of `transformers` without any trace of autorev; adapters are merged.

    \b
    Example:
      autorev export runs/smollm2-momentum-k-3 --out my_model
    """
    with steps_told() as tell, redirect_stdout(sys.stderr):
        tell("loading", 0.0)
        from autorev.finetuning.export import export as run
        from autorev.finetuning.record import EXPORT_LIMIT

        limit = EXPORT_LIMIT if max_loss_increase is None else max_loss_increase
        done = run(
            folder,
            out,
            text=text,
            max_loss_increase=limit,
            force=force,
            base=base,
            trust_remote_code=trust_remote_code,
            progress=tell,
        )
    say(done.to_json() if as_json else str(done))
