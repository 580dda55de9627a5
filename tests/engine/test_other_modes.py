"""Converted models against the same coupling under ordinary autograd: without gradients, and with other transforms.

python -m pytest tests/engine/test_other_modes.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autorev
from autorev.engine.mode import running
from autorev.errors import AutorevError, ConversionError
from tests.helpers.blocks import (
    DOUBLE,
    EXACT,
    EXACT_LEAPFROG,
    TOKENS,
    Chain,
    Mlp,
    Results,
    Setting,
    assert_like_oracle,
    assert_same,
    converted,
    each_setting,
    gradients_of,
    mean_square,
    small,
    states,
    step,
)


@pytest.mark.parametrize("setting", [EXACT, EXACT_LEAPFROG, DOUBLE], ids=lambda s: s.name)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_computes_what_training_does(mode: Callable[[], Any], setting: Setting) -> None:
    """The output without gradients is bit-equal to that of the training forward."""
    model = converted(setting, small)
    trained = model(TOKENS)
    with mode():
        inferred = model(TOKENS)

    assert torch.equal(inferred, trained)
    with running("original"):
        assert not torch.equal(model(TOKENS), trained)


@each_setting
@pytest.mark.parametrize("scaled", [False, True], ids=["leaves", "computed"])
def test_functional_call_with_other_parameters(scaled: bool, setting: Setting) -> None:
    """Parameters lent for one call are there again in backward, which runs when they are gone from the model."""
    model = converted(setting, small)
    torch.manual_seed(4)
    leaves = {name: torch.randn_like(p).div_(4).requires_grad_() for name, p in model.named_parameters()}

    def run() -> Results:
        for leaf in leaves.values():
            leaf.grad = None
        lent = {name: leaf * 2 if scaled else leaf for name, leaf in leaves.items()}
        loss = mean_square(torch.func.functional_call(model, lent, (TOKENS,)))
        lent.clear()
        loss.backward()
        return {"loss": loss.detach(), **{name: leaf.grad.clone() for name, leaf in leaves.items()}}

    assert_like_oracle(model, setting, run)
    assert not gradients_of(model)


def _vmap(model: nn.Module) -> Any:
    return torch.func.vmap(model)(states(EXACT)[:, None])


def _jvp(model: nn.Module) -> Any:
    return torch.func.jvp(model, (states(EXACT),), (states(EXACT),))


def _jvp_of_parameters(model: nn.Module) -> Any:
    parameters = dict(model.named_parameters())
    return torch.func.jvp(
        lambda lent: torch.func.functional_call(model, lent, (states(EXACT),)), (parameters,), (parameters,)
    )


def _func_grad(model: nn.Module) -> Any:
    return torch.func.grad(lambda x: model(x).sum())(states(EXACT))


def _func_grad_of_parameters(model: nn.Module) -> Any:
    return torch.func.grad(lambda lent: torch.func.functional_call(model, lent, (states(EXACT),)).sum())(
        dict(model.named_parameters())
    )


def _dual_input(model: nn.Module) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return model(torch.autograd.forward_ad.make_dual(states(EXACT), states(EXACT)))


def _dual_parameter(model: nn.Module, number: int = 1) -> Any:
    with torch.autograd.forward_ad.dual_level():
        weight = model.get_parameter(f"blocks.{number}.norm1.weight").detach()
        lent = {f"blocks.{number}.norm1.weight": torch.autograd.forward_ad.make_dual(weight, weight)}
        return torch.func.functional_call(model, lent, (states(EXACT),))


def _dual_parameter_of_the_last_block(model: nn.Module) -> Any:
    return _dual_parameter(model, 3)


def _dual_parameter_without_gradients(model: nn.Module) -> Any:
    with torch.no_grad():
        return _dual_parameter(model, 3)


def _trace(model: nn.Module) -> Any:
    return torch.jit.trace(model, (states(EXACT),))


@pytest.mark.parametrize(
    "transform",
    [
        _vmap,
        _jvp,
        _jvp_of_parameters,
        _func_grad,
        _func_grad_of_parameters,
        _dual_input,
        _dual_parameter,
        _dual_parameter_of_the_last_block,
        _dual_parameter_without_gradients,
        _trace,
    ],
)
@pytest.mark.parametrize("setting", [EXACT, EXACT_LEAPFROG], ids=lambda s: s.name)
@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")  # of script: by PyTorch itself, in forward mode
def test_function_transforms_are_refused(transform: Callable[[nn.Module], Any], setting: Setting) -> None:
    """vmap, forward mode, torch.func.grad and torch.jit.trace raise an error that names the block and the way out."""
    model = converted(setting, lambda: Chain(*(Mlp() for _ in range(4))), states(setting))
    with pytest.raises(AutorevError, match=r"blocks\..*autorev\.revert"):
        transform(model)
    step(model, states(setting))


class Within(nn.Module):
    """Another model around a converted one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(tokens)


EXPORTS: dict[str, Callable[[nn.Module], Any]] = {
    "export": lambda model: torch.export.export(model, (TOKENS,)),
    "export of a model around it": lambda model: torch.export.export(Within(model), (TOKENS,)),
    "strict export": lambda model: torch.export.export(model, (TOKENS,), strict=True),
    "script": torch.jit.script,
    "trace": lambda model: torch.jit.trace(model, (TOKENS,)),
}


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
@pytest.mark.parametrize("options", [{}, {"granularity": "sublayer"}], ids=str)
@pytest.mark.parametrize("name", EXPORTS)
def test_a_converted_model_says_how_it_is_exported(name: str, options: dict[str, Any]) -> None:
    """Of a reversible forward neither operators nor code can be written down; of the reverted model both can."""
    model = converted(EXACT, lambda: small(2), keep_last=0, **options).eval()
    kind = torch._dynamo.exc.Unsupported if "strict" in name else AutorevError
    with pytest.raises(kind, match=r"autorev\.revert\(model\)"):
        EXPORTS[name](model)
    assert not hasattr(model.forward, "__code__")  # as compilers ask
    step(model)
    autorev.revert(model)
    EXPORTS[name](model)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_a_model_that_is_one_graph_is_not_traced_either() -> None:
    """The error is ours, before the compiler's."""
    model = converted(EXACT, lambda: small(2), keep_last=0, compile="graph")
    with pytest.raises(AutorevError, match=r"autorev\.revert\(model\)"):
        EXPORTS["trace"](model)
    autorev.revert(model)
    EXPORTS["script"](model)  # which reads every attribute that is left


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
@pytest.mark.parametrize("options", [{"method": "checkpoint"}, {"method": "plain", "tile": 4}], ids=str)
@pytest.mark.parametrize("name", ["export", "trace"])
def test_what_only_runs_otherwise_is_exported_as_it_is(name: str, options: dict[str, Any]) -> None:
    """Checkpoints and tiles compute the model's own function."""
    model = converted(EXACT, lambda: small(2), **options).eval()
    exported = EXPORTS[name](model)
    run = exported.module() if name == "export" else exported
    assert torch.allclose(run(TOKENS), model(TOKENS), atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # the compiler warns of what it meets in itself
@each_setting
def test_a_compiled_model_is_right(setting: Setting) -> None:
    """torch.compile of the whole model: the converted blocks run eagerly, with the same loss and gradients."""
    model = converted(setting, small)
    expected = step(model)
    compiled = torch.compile(model, backend="aot_eager")

    model.zero_grad(set_to_none=True)
    loss = mean_square(compiled(TOKENS))
    loss.backward()

    assert_same({"loss": loss.detach(), **gradients_of(model)}, expected, setting.tolerance)


def stack() -> nn.Sequential:
    """Blocks behind something that has a gradient to pass on, in training."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *(Cumulative() for _ in range(4)))


class Cumulative(nn.Module):
    """Its averages are those of all batches so far: the forward reads how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.linear(self.norm(x)))
        return x + torch.sin(x)


ROWS = torch.linspace(-1, 1, 48).reshape(6, 8)
each_way = pytest.mark.parametrize("how", [{}, {"granularity": "sublayer"}, {"method": "hamiltonian"}], ids=str)


@each_way
def test_averages_over_all_batches_are_counted_once(how: dict[str, Any]) -> None:
    """By the probe and the second run not at all."""
    model, oracle = stack(), stack()
    for one in (model, oracle):
        autorev.convert(one, batch=(ROWS,), **how)
    for factor in (1.0, 2.0, 3.0):
        found = step(model, factor * ROWS)
        with running("oracle"):
            expected = step(oracle, factor * ROWS)
        assert_same(found, expected, 1e-5)
    assert int(model[1].norm.num_batches_tracked) == 3
    assert_same(dict(model.named_buffers()), dict(oracle.named_buffers()), 1e-6)


@each_way
def test_inference_mode_around_a_conversion_or_before_training(how: dict[str, Any]) -> None:
    """Tensors made in it count no writes, and autograd takes none: what is kept from one call to the next is made so
    that training follows."""
    model = stack()
    with torch.inference_mode():
        autorev.convert(model, batch=(ROWS,), **how)
        model(ROWS)
    assert_same(step(model, ROWS), step_of_oracle(stack(), how), 1e-5)


def step_of_oracle(model: nn.Module, how: dict[str, Any]) -> Results:
    """One step of a fresh model by ordinary autograd, after an inference."""
    autorev.convert(model, batch=(ROWS,), **how)
    with torch.no_grad():
        model(ROWS)
    with running("oracle"):
        return step(model, ROWS)


def test_inference_tensors_in_training_are_an_error() -> None:
    """As an input torch's own, as weights one that says what to do."""
    model = stack()
    autorev.convert(model, batch=(ROWS,))
    with torch.inference_mode():
        rows, other = ROWS.clone(), stack()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        model(rows)
    with pytest.raises(ConversionError, match=r"were made under torch\.inference_mode.*load the model outside"):
        autorev.convert(other, batch=(ROWS,))
