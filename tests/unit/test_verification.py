"""`verify`, `load_model` and the summary: what they say is true, and nothing of the user's is touched.

python -m pytest tests/unit/test_verification.py
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import autorev
from autorev.cli import main
from autorev.conversion.convert import forwards_of
from autorev.couplings.velocity import Velocity
from autorev.errors import ConversionError
from tests.helpers import handwritten as hand

TOKENS = torch.arange(16).reshape(2, 8)


def make() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A factory for the command line: `tests.unit.test_verification:make`."""
    torch.manual_seed(0)
    return hand.stack_of(hand.Dropping, 4), (TOKENS,)


def converted(**options: Any) -> nn.Module:
    model, args = make()
    autorev.convert(model, batch=args, **options)
    return model.train()


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "leapfrog"}, {"method": "hamiltonian"}, {"granularity": "sublayer"}, {"method": "bdia"}],
    ids=str,
)
def test_a_right_conversion_passes(options: dict[str, Any]) -> None:
    """With dropout on, every gradient is the oracle's."""
    found = autorev.verify(converted(**options), TOKENS)
    assert found.passed
    assert found.gradient_error <= 1e-5
    assert found.gradient_cosine == pytest.approx(1)
    assert found.loss == found.oracle_loss
    assert found.drift == {"blocks": 0.0}
    assert not found.missing
    assert "PASSED" in str(found)


@pytest.mark.parametrize("break_it", ["wrong factor", "dropped partner"])
def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch, break_it: str) -> None:
    """A vjp that is off by one part in a thousand, or that forgets the velocity, is seen and named."""
    right = Velocity.vjp

    def wrong(self: Velocity, grad_stream: Any, grad_partner: Any) -> Any:
        into, velocity, out = right(self, grad_stream, grad_partner)
        if break_it == "wrong factor":
            return into, velocity, out * 1.001
        return into, None, out

    model = converted(keep_last=0)
    monkeypatch.setattr(Velocity, "vjp", wrong)
    found = autorev.verify(model, TOKENS)
    assert not found.passed
    assert found.gradient_error > 1e-5
    assert found.worst[0][0] in str(found)
    assert "FAILED" in str(found)


def test_nothing_of_the_user_s_is_touched() -> None:
    """Gradients, random streams, buffers and hooks that step the optimiser are as before."""
    torch.manual_seed(0)
    model = hand.PreActivationResNet()
    images = torch.randn(2, 3, 16, 16)
    autorev.convert(model, batch=(images,))
    model.train()
    fired = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: fired.append(p))
    state, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]

    found = autorev.verify(model, images)

    assert found.passed
    assert not fired
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda logits: logits.sum() * float("inf"), "the loss is inf|the loss is -inf"),
        (lambda logits: logits.sum() * float("nan"), "the loss is nan"),
        (lambda logits: (logits - logits.detach()).sqrt().sum(), r"the gradient of \S+ is not finite"),
    ],
)
def test_what_is_not_finite_is_no_difference(loss: Any, said: str) -> None:
    """Where the oracle has no gradients, nothing is compared, and the conversion is not blamed."""
    with pytest.raises(ConversionError, match=rf"^({said}) under ordinary autograd, so there is nothing to compare"):
        autorev.verify(converted(), TOKENS, loss=loss)


def test_what_is_not_finite_in_the_chain_alone_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that the reversible blocks spoil."""
    right = Velocity.vjp

    def spoilt(self: Velocity, grad_stream: Any, grad_partner: Any) -> Any:
        into, velocity, out = right(self, grad_stream, grad_partner)
        return into, velocity, out * float("inf")

    model = converted(keep_last=0)
    monkeypatch.setattr(Velocity, "vjp", spoilt)
    assert not autorev.verify(model, TOKENS).passed


def test_the_loss_may_be_the_user_s_own() -> None:
    """`loss` takes what the model returns; a batch may be a dict."""
    model = converted()
    found = autorev.verify(model, {"tokens": TOKENS}, loss=lambda logits: logits[..., 0].sum())
    assert found.passed


def test_a_model_that_is_not_converted_is_refused() -> None:
    """The message says what to call."""
    model, _ = make()
    with pytest.raises(ConversionError, match=r"autorev\.convert"):
        autorev.verify(model, TOKENS)
    model = converted()
    model.requires_grad_(False)
    with pytest.raises(ConversionError, match="unfreeze"):
        autorev.verify(model, TOKENS)


def test_the_summary_says_what_was_done() -> None:
    """Chains, numbers, grid, saving, reasons, and whether the function is preserved; as text and as JSON."""
    model, args = make()
    done = autorev.convert(model, batch=args, exclude="blocks.3")
    (chain,) = done.chains
    assert chain.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert chain.gamma == (1 / 8,) * 3
    assert chain.side_bits == (3,) * 3
    assert done.preserves_function
    assert done.not_converted == (("blocks.3", "excluded: a pattern of exclude= matches it"),)
    assert done.memory is not None
    assert done.memory.plain.kept > done.memory.checkpoint.kept > 3 * 2 * 8 * hand.WIDTH * 4
    for text in ("3 blocks reversible", "gamma 0.125", "preserved", "Not converted: blocks.3"):
        assert text in str(done)
    told = json.loads(done.to_json())
    assert told["chains"][0]["fraction_bits"] == chain.fraction_bits
    assert told["memory"]["plain"]["peak"] == done.memory.plain.peak


@pytest.mark.parametrize(("coupling", "gamma"), [("leapfrog", None), ("hamiltonian", None), ("momentum", 0.5)])
def test_a_lost_function_is_said_to_be_lost(coupling: str, gamma: float | None) -> None:
    """Couplings away from the residual network need fine-tuning, and the summary says so."""
    model, args = make()
    done = autorev.convert(model, batch=args, method=coupling, gamma=gamma)
    assert not done.preserves_function
    assert "NOT preserved" in str(done)


def test_the_command_verifies_a_factory() -> None:
    """`verify package.module:factory` prints the conversion and the verdict, and --json both as one object."""
    spec = "tests.unit.test_verification:make"
    run = CliRunner().invoke(main, ["verify", spec])
    assert run.exit_code == 0, run.output
    assert "4 blocks reversible" in run.stdout
    assert "PASSED" in run.stdout
    run = CliRunner().invoke(main, ["verify", spec, "--method", "revnet", "--json"])
    data = json.loads(run.stdout)
    assert data["conversion"]["coupling"] == "revnet"
    assert data["verification"]["passed"] is True
    assert data["pretrained"] is False


def test_the_command_fails_with_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit code says so."""
    monkeypatch.setattr(Velocity, "vjp", lambda self, stream, partner: (stream, None, stream))
    run = CliRunner().invoke(main, ["verify", "tests.unit.test_verification:make"])
    assert run.exit_code == 1
    assert "FAILED" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "neither a file nor a profile"),
        (["llama-3.1-70b"], "name a smaller model"),
        (["tests.unit.test_verification:make", "--method", "momentum:gamma=0.1"], "n / 2^k"),
        (
            ["tests.unit.test_verification:make", "--method", "momentum:arithmetic=float,gamma=0.0078125"],
            "arithmetic='exact'",
        ),
        (["tests.unit.test_verification:absent"], "absent"),
    ],
    ids=["unknown", "too large", "gamma", "float", "factory"],
)
def test_the_command_ends_in_one_line(arguments: list[str], message: str) -> None:
    """Bad input never ends in a traceback."""
    run = CliRunner().invoke(main, ["verify", *arguments])
    assert run.exit_code == 1
    assert message in run.output
    assert "Traceback" not in run.output
    assert "bug in autorev" not in run.output


def test_an_unknown_method_is_told_at_once() -> None:
    """It is told before anything is built."""
    run = CliRunner().invoke(main, ["verify", "vit-large", "--json", "--method", "sideways"])
    assert run.exit_code == 1
    assert "there is no method 'sideways'" in run.output


def test_the_forwards_of_a_model_are_found() -> None:
    """One per converted block, in the model's order."""
    assert [forward.path for forward in forwards_of(converted())] == [f"blocks.{i}" for i in range(4)]
