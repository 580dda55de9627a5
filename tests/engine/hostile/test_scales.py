"""Streams of any size: the grid fits both ends, coarsens by itself, and float arithmetic is watched while it trains.

python -m pytest tests/engine/hostile/test_scales.py
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import autorev
from autorev.conversion.convert import chains_of
from autorev.engine.mode import running
from autorev.errors import FixedPointRangeError, ReconstructionError
from tests.engine.hostile.by_hand import LEAPFROG, assert_close, results_of, run_blocks


class Scaled(nn.Module):
    """A block whose stream is of size s."""

    def __init__(self, s: float, d: int = 16) -> None:
        super().__init__()
        self.a, self.s = nn.Linear(d, d), s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.s * torch.tanh(self.a(x / self.s))


def scaled(*sizes: float) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(Scaled(s) for s in sizes)), sizes[0] * torch.randn(64, 16)


@pytest.mark.parametrize("size", [1e-20, 1e-12, 1e-7, 1e-6, 1e-4, 1.0, 1e3, 1e6, 1e12])
def test_a_stream_of_any_size_keeps_its_digits(size: float) -> None:
    """Output and gradients are leapfrog's, written down, to the digits of a float32."""
    model, x = scaled(*[size] * 4)
    plain = copy.deepcopy(model)
    autorev.convert(model, batch=(x,), keep_last=0, **LEAPFROG)
    out, expected = model(x), run_blocks(plain, x)
    assert float((out - expected).detach().norm() / expected.detach().norm()) < 1e-5
    found = results_of(model, lambda: model(x) / size)
    assert_close(found, results_of(plain, lambda: run_blocks(plain, x) / size), 1e-4)


@pytest.mark.parametrize("probed", [1.0, 1e-5, 1e5])
@pytest.mark.parametrize("given", [1e-7, 1.0, 1e7])
def test_an_input_of_another_size_than_the_example(probed: float, given: float) -> None:
    """A block that is linear in the scale, converted on one size and called with another."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Relative() for _ in range(4)))
    x = torch.randn(8, 16)
    plain = copy.deepcopy(model)
    autorev.convert(model, batch=(x * probed,), keep_last=0, **LEAPFROG)
    found = results_of(model, lambda: model(x * given) / given)
    assert_close(found, results_of(plain, lambda: run_blocks(plain, x * given) / given), 1e-4)


class Relative(nn.Module):
    """x + A x."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.a = nn.Linear(d, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a(x)


@pytest.mark.parametrize("how", [LEAPFROG, {"gamma": 1 / 8}, {"method": "hamiltonian"}], ids=str)
def test_a_stream_that_grows_within_a_forward_keeps_both_ends(how: dict[str, Any]) -> None:
    """From 1e-6 to 1e6 in one chain: the grid is coarsened on the way, and rebuilt to the last bit."""
    model, x = scaled(1e-6, 1e-4, 1e-1, 1e2, 1e4, 1e6)
    autorev.convert(model, batch=(x,), keep_last=0, **how)
    found = results_of(model, lambda: model(x) / 1e6)
    assert autorev.drift(model) == {"(the model itself)": 0.0}
    with running("oracle"):
        assert_close(found, results_of(model, lambda: model(x) / 1e6))
    if how is LEAPFROG:
        autorev.revert(model)
        assert_close(found, results_of(model, lambda: run_blocks(model, x) / 1e6), 1e-3)


class Normalised(nn.Module):
    """A branch that reads every token at the same size, and returns it at the token's own."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.a = nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.detach().square().mean(-1, keepdim=True).sqrt()
        return x + size * torch.tanh(self.a(x / size))


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e5, 1e6])
def test_tokens_of_different_sizes_keep_their_digits(ratio: float) -> None:
    """Half of them are far larger than the others, which count as much in the loss."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Normalised() for _ in range(4))), torch.randn(2, 4, 16)
    x[:, :2] *= ratio
    plain = copy.deepcopy(model)
    autorev.convert(model, batch=(x,), keep_last=0, **LEAPFROG)

    def alike(out: torch.Tensor) -> torch.Tensor:
        return torch.tanh(out / out.detach().square().mean(-1, keepdim=True).sqrt() - 1)

    assert_close(
        results_of(model, lambda: alike(model(x))), results_of(plain, lambda: alike(run_blocks(plain, x))), 0.1
    )


def test_training_that_outgrows_its_grid_goes_on() -> None:
    """Weights that grow by half at each of forty steps: never an error, and the losses are float leapfrog's."""
    losses: dict[str, list[float]] = {}
    for arithmetic in ("exact", "float"):
        model, x = scaled(*[1.0] * 4)
        autorev.convert(model, batch=(x,), arithmetic=arithmetic, **LEAPFROG)
        losses[arithmetic] = []
        for _ in range(40):
            with running("reversible" if arithmetic == "exact" else "oracle"):
                loss = model(x).square().mean()
                loss.backward()
            losses[arithmetic].append(float(loss.detach()))
            for block in model:
                block.s *= 1.5
    assert losses["exact"] == pytest.approx(losses["float"], rel=1e-3)
    assert chains_of(model)[0].name == "(the model itself)"


def test_the_config_remembers_a_coarser_grid() -> None:
    """What is saved and loaded goes on where training was."""
    from tests.helpers.tiny_llm import tiny_model

    model = tiny_model("llama", 4)
    autorev.convert(model, **LEAPFROG)
    (chain,) = chains_of(model)
    before = model.config.autorev["fraction_bits"]["model.layers"]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(1e6)
        model(torch.arange(8)[None])
    assert model.config.autorev["fraction_bits"]["model.layers"] == chain.arithmetic.fraction_bits < before  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_no_number_is_an_error(value: float) -> None:
    """In the input as in a branch."""
    model, x = scaled(*[1.0] * 4)
    autorev.convert(model, batch=(x,), **LEAPFROG)
    x[3, 3] = value
    with pytest.raises(FixedPointRangeError, match=r"the input of .* not numbers"):
        model(x)


def test_what_is_no_number_in_float_arithmetic_is_no_rounding() -> None:
    """The error names what is wrong."""
    model, x = scaled(*[1.0] * 4)
    autorev.convert(model, batch=(x,), arithmetic="float", keep_last=0, **LEAPFROG)
    x[3, 3] = float("nan")
    with pytest.raises(ReconstructionError, match=r"holds values that are not numbers"):
        model(x).sum().backward()


def test_float_arithmetic_is_watched_in_training() -> None:
    """A branch that has grown until rounding drowns the reconstruction: an error, no gradient."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Growing() for _ in range(24))), torch.randn(4, 16)
    autorev.convert(model, batch=(x,), arithmetic="float", **LEAPFROG)
    results_of(model, lambda: model(x))
    raised = False
    for _ in range(12):
        for block in model:
            block.factor *= 2.0
        try:
            found = results_of(model, lambda: model(x))
        except ReconstructionError as error:
            assert "arithmetic='exact'" in str(error) or "computed something else" in str(error)
            raised = True
            break
        with running("oracle"):
            assert_close(found, results_of(model, lambda: model(x)), 3e-2)
    assert raised


def test_float_arithmetic_is_watched_where_backward_ends_early() -> None:
    """Gradients of the upper blocks alone: nothing comes to the beginning, where it is looked at what is left over."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Growing() for _ in range(24))), torch.randn(4, 16)
    autorev.convert(model, batch=(x,), arithmetic="float", **LEAPFROG)
    upper = dict(model[10:].named_parameters())

    def gradients() -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(model(x).square().mean(), list(upper.values()))
        return dict(zip(upper, found, strict=True))

    raised = False
    for step in range(14):
        for block in model:
            block.factor = 0.25 * 1.35**step
        try:
            found = gradients()
        except ReconstructionError as error:
            assert "arithmetic='exact'" in str(error)
            raised = True
            continue
        with running("oracle"):
            assert_close(found, gradients(), 3e-2)
    assert raised


class Growing(nn.Module):
    """A branch with a factor; its derivative amplifies what is off."""

    factor = 0.25

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.a = nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.factor * torch.sin(self.a(x) * self.factor)


def test_channels_last_stays() -> None:
    """Convolutions run in the memory format that the user chose, in training and without gradients."""

    class Convolution(nn.Module):
        def __init__(self, c: int = 8) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.is_contiguous(memory_format=torch.channels_last)
            return x + self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    model = nn.Sequential(*(Convolution() for _ in range(4))).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    autorev.convert(model, batch=(x,), keep_last=0, **LEAPFROG)
    found = results_of(model, lambda: model(x))
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert_close(found, results_of(plain, lambda: run_blocks(plain, x)))
