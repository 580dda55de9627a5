"""`autorev verify`."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout

import click

from autorev.cli.group import COUNT, main, progress, trust_remote_code
from autorev.cli.output import say
from autorev.methods import Method


@main.command(short_help="Check a converted model's gradients against ordinary autograd.")
@click.argument("model", required=False)
@click.option(
    "--method",
    metavar="SPEC",
    default="momentum:k=3",
    show_default=True,
    help="A coupling: momentum:k=2, leapfrog, midpoint, midpoint_a, bdia, hamiltonian, revnet, each with :option=value "
    "(keep_last=4, arithmetic=float, granularity=sublayer, c=1).",
)
@click.option("--batch", type=COUNT, default=1, show_default=True, metavar="INT")
@click.option(
    "--sequence",
    "--seq",
    type=COUNT,
    metavar="INT",
    help="Tokens per sample.  [default: 128, or the model's limit]",
)
@click.option("--dtype", type=click.Choice(["fp32", "fp64", "bf16", "fp16"]), default="fp32", show_default=True)
@trust_remote_code
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    model: str | None,
    batch: int,
    sequence: int | None,
    dtype: str,
    trust_remote_code: bool,
    method: str,
    as_json: bool,
) -> None:
    """Convert MODEL, and check its gradients on one batch of random tokens or images.

    MODEL is what `autorev analyze` takes. A GGUF file and a folder with weights are loaded; of a profile, a config or
    a factory the weights are random. Exits with 1 if the gradients are not those of ordinary autograd.

    \b
    Examples:
      autorev verify
      autorev verify my_folder --method leapfrog:arithmetic=float
      autorev verify my_package.model:make --json
    """
    how = Method.parse(method)  # before anything slow
    with progress() as tell, redirect_stdout(sys.stderr):
        tell("loading the model", 0.0)
        import torch

        from autorev.conversion.convert import convert
        from autorev.models.load import load_model
        from autorev.prediction.training import DTYPES
        from autorev.verification import verify_call

        precision = {**DTYPES, "fp64": torch.float64}[dtype]
        loaded = load_model(model, precision, batch, sequence, trust_remote_code=trust_remote_code)
        tell("converting", 0.3)
        conversion = convert(loaded.model, loaded.call, method=how)
        tell("running both ways", 0.6)
        found = verify_call(loaded.model, *loaded.call)
    if as_json:
        fields = {"model": loaded.name, "pretrained": loaded.pretrained}
        parts = {"conversion": json.loads(conversion.to_json()), "verification": json.loads(found.to_json())}
        say(json.dumps({**fields, **parts}, indent=1))
    else:
        weights = "its weights" if loaded.pretrained else "random weights"
        say(f"{loaded.name}, {weights}, {dtype}\n{conversion}\n{found}")
    if not found.passed:
        ctx.exit(1)
