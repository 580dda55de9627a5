"""Running a model's constructor under fake tensors, where it finds shapes and dtypes but no values.

Constructors do three things that need values or real memory. Here each is given what it needs to go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autorev.errors import ModelBuildError
from autorev.integrations.quirks import fake_weights_replaced, quiet, replace_tensors
from autorev.patching import patched_here
from autorev.workload import Call

Build = Callable[[torch.dtype], nn.Module]
Example = Callable[[int, int | None], Call]

MOST_MODULES = 300_000
"""Three times the modules of the largest mixture of experts there is; built in minutes."""
_one_at_a_time = threading.RLock()
"""Of two threads that set the default dtype at once, one would put back the other's for good."""


@contextmanager
def building(dtype: torch.dtype) -> Iterator[None]:
    """Constructors inside run on fake tensors as they do on real ones; floating tensors are of `dtype`."""
    with (
        default_dtype(dtype),
        count_modules(),
        # It draws until every value lies within its bounds, and there is none to look at.
        patched_here(nn.init, "_no_grad_trunc_normal_", lambda original: _as_it_is),
        patched_here(nn.Module, "_apply", fake_weights_replaced),
        _RealNumbers(),
        quiet(),
    ):
        yield


@contextmanager
def count_modules() -> Iterator[None]:
    """A constructor inside that would go on making modules without end is stopped.

    Raises:
        ModelBuildError: it made more than any model has.
    """
    made = 0

    def counting(original: Callable[..., None]) -> Callable[..., None]:
        def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            nonlocal made
            made += 1
            if made > MOST_MODULES:
                raise ModelBuildError(
                    f"the model has more than {MOST_MODULES:,} modules, which is more than any there is; lower the "
                    "number of its blocks"
                )
            original(self, *args, **kwargs)

        return init

    with patched_here(nn.Module, "__init__", counting):
        yield


def in_one_dtype(build: Build, example: Example) -> tuple[Build, Example]:
    """The same two functions; the second makes floating inputs of the dtype that the first was last given."""
    latest = torch.get_default_dtype()

    def noted_build(dtype: torch.dtype) -> nn.Module:
        nonlocal latest
        latest = dtype
        return build(dtype)

    def following_example(batch: int, sequence: int | None) -> Call:
        with default_dtype(latest):
            return example(batch, sequence)

    return noted_build, following_example


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating tensors are made in `dtype` while it lasts, by other threads too: torch has one default for all."""
    with _one_at_a_time:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Put a model of fake tensors on the CPU, its floating parameters in `dtype`, whatever it chose."""

    def parameter(old: torch.Tensor) -> torch.Tensor:
        wanted = dtype if old.is_floating_point() else old.dtype
        return torch.empty_like(old, dtype=wanted, device="cpu")

    replace_tensors(model, "_parameters", parameter)
    # One whole number (a stride) may be known, and decide a shape.
    replace_tensors(model, "_buffers", lambda old: torch.empty_like(old, device="cpu") if old.dim() else old)


def _as_it_is(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


class _RealNumbers(TorchFunctionMode):
    """`torch.linspace`, `torch.tensor([2, 3, 16])` and what is computed from them is real: vision models read drop-path
    rates and depths off it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors:
            is_real = not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        else:
            is_real = func in (torch.linspace, torch.tensor)
        with unset_fake_temporarily() if is_real else nullcontext():
            return func(*args, **(kwargs or {}))
