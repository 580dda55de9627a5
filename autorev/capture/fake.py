"""Models and calls made of fake tensors: shapes, dtypes and aliasing, but no memory and no weights."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from autorev.capture.plain import plain_state, refuse_flattened
from autorev.capture.quantised import bytes_inside, on_packed_memory, quantised_linears, stand_in_for
from autorev.capture.streams import own_streams
from autorev.errors import CaptureError, one_line
from autorev.hush import logs_hushed
from autorev.integrations.quirks import quirks
from autorev.own_mode import OwnFakeMode

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
"""What a fake tensor raises when the program asks for a value it does not have."""

KEPT = 0.9999
"""What layer-drop draws while a call is recorded: a layer is dropped when the number is *below* its rate."""


def new_fake_mode() -> FakeTensorMode:
    """Fake *CPU* tensors: on the meta device attention would decompose and save other tensors than it does in truth."""
    return OwnFakeMode(allow_non_fake_inputs=True)


def fake_copy(value: Any, mode: FakeTensorMode) -> Any:
    """`value` (a module, or arguments) with every tensor replaced by a fake CPU tensor; `value` itself stays untouched.

    Tensors that occur twice (tied weights) are replaced by one. A quantised linear layer is replaced by its stand-in,
    and what libraries have put into a module to shard or to move it is left out.

    Raises:
        CaptureError: `value` holds something that `copy.deepcopy` refuses.
    """
    try:
        memo: dict[int, Any] = {}
        plain: list[tuple[nn.Module, dict[str, Any]]] = []
        stand_ins: list[tuple[nn.Module, nn.Module]] = []
        if isinstance(value, nn.Module):  # a parameter's own __deepcopy__ would copy its data
            stand_ins = list(_stand_ins(value, mode))
            owned = [*value.parameters(), *value.buffers()]
            memo = {id(tensor): _fake(tensor, mode) for tensor in owned}
            refuse_flattened(value)
            for module in value.modules():
                found = plain_state(module)
                if found is not None:
                    cls, state = found
                    memo[id(module)] = cls.__new__(cls)
                    plain.append((memo[id(module)], state))
            memo |= {id(layer): stand_in for layer, stand_in in stand_ins}
        # Generators cannot be copied by `copy.deepcopy`.
        memo |= {id(generator): generator.clone_state() for generator in _generators(value, set())}
        with _FakeDeepCopy(mode):
            for twin, state in plain:
                twin.__dict__.update(copy.deepcopy(state, memo))
            copied = copy.deepcopy(value, memo)
            for layer, stand_in in stand_ins:
                _take_up_hooks(stand_in, layer, memo)
            return tree_map_only(torch.Tensor, lambda tensor: _fake(tensor, mode), copied)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"cannot copy {type(value).__name__} onto fake tensors ({one_line(error)}); "
            "autorev analyses a copy so that the model itself stays untouched: make it copyable with copy.deepcopy"
        ) from error


def _generators(value: Any, seen: set[int]) -> Iterator[torch.Generator]:
    """Everywhere in a model or a call's arguments."""
    if isinstance(value, torch.Generator):
        yield value
    elif id(value) not in seen and not isinstance(value, torch.Tensor | type | ModuleType | FunctionType):
        seen.add(id(value))
        held = value if isinstance(value, list | tuple | dict) else getattr(value, "__dict__", ())
        for item in held.values() if isinstance(held, dict) else held:
            yield from _generators(item, seen)


def _stand_ins(model: nn.Module, mode: FakeTensorMode) -> Iterator[tuple[nn.Module, nn.Module]]:
    for _, layer, found in quantised_linears(model):
        bias = getattr(layer, "bias", None)
        with mode:
            yield layer, stand_in_for(layer, found, None if bias is None else _fake(bias, mode))


def _take_up_hooks(stand_in: nn.Module, layer: nn.Module, memo: dict[int, Any]) -> None:
    """Of the user's; a quantised layer's own are part of what the stand-in stands for."""
    for name in _HOOKS:
        hooks = {k: hook for k, hook in layer.__dict__[name].items() if getattr(hook, "__self__", None) is not layer}
        stand_in.__dict__[name].update(copy.deepcopy(hooks, memo))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class _FakeDeepCopy(TorchFunctionMode):
    """`copy.deepcopy` in which tensors become fake tensors, whatever device they are on."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__deepcopy__, nn.Parameter.__deepcopy__):
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _fake(tensor, self.mode)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    if getattr(tensor, "fake_mode", None) is mode:
        return tensor
    hidden = bytes_inside(tensor)
    with mode:
        if hidden is None:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        else:
            fake = on_packed_memory(tuple(tensor.shape), tensor.dtype, hidden)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)


@contextmanager
def every_layer_kept(drawn: list[Any] | None = None) -> Iterator[None]:
    """Layer-drop draws `KEPT`, so that one call visits every layer; nobody's random streams are moved.

    A scalar from `torch.rand`, and Python's `random.random` and `random.uniform`, are meant; each such draw is
    appended to `drawn`. It holds for the calling thread, and no other notices.
    """
    draws = drawn if drawn is not None else []

    def python_random() -> float:
        return python_uniform(0.0, 1.0)

    def python_uniform(a: float, b: float) -> float:
        draws.append("random")
        return a + (b - a) * KEPT

    with (
        # It logs a traceback for every error under fake tensors; ours is reported in one line.
        logs_hushed("torch._subclasses.fake_tensor", logging.CRITICAL + 1),
        own_streams(random=python_random, uniform=python_uniform),
        _ConstantScalarDraw(draws),
        quirks(),
    ):
        yield


class _ConstantScalarDraw(TorchFunctionMode):
    def __init__(self, drawn: list[Any]) -> None:
        super().__init__()
        self.drawn = drawn

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.rand and result.dim() <= 1 and result.numel() == 1:
            self.drawn.append("torch.rand")
            # A fake tensor made from a Python number remembers its value; comparisons of it can be decided.
            return torch.tensor(KEPT if result.dim() == 0 else [KEPT], dtype=result.dtype)
        return result


@contextmanager
def fused_attention_dropout() -> Iterator[None]:
    """While it lasts, attention runs without dropout, and keeps what a GPU keeps.

    A GPU's fused attention drops out inside the kernel and keeps a seed; the CPU's falls back to separate operations,
    which keep the whole attention matrix. A GPU's is told where the queries of a tile are; the CPU's takes a mask.
    """
    with _NoAttentionDropout():
        yield


class _NoAttentionDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            if len(args) > 3 and isinstance(args[3], CausalBias):
                args, kwargs = args[:3], {**kwargs, "is_causal": True}
            if len(args) > 4:  # query, key, value, mask, dropout, ...
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        if func is F.multi_head_attention_forward:  # a mode does not see the attention that a function calls inside
            given = inspect.signature(func).bind(*args, **kwargs)
            if not given.arguments.get("need_weights", True):  # with the weights it is not fused, on a GPU neither
                given.arguments["dropout_p"] = 0.0
            return func(*given.args, **given.kwargs)
        return func(*args, **kwargs)
