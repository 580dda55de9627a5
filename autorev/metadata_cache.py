"""What operations on fake tensors return, remembered by what they are given.

A fake tensor is a shape, strides, a dtype and a device, and so is all that decides what an operation makes of it. Torch
remembers that, too, but takes 100 microseconds for an answer, and a simulated training step asks a thousand times: this
takes a third. What is remembered is what torch answered the first time. Torch is asked each time where more than that
decides or changes: values that are known, an argument of another size afterwards (`out=`), kernels of other libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.types import IntLikeType

MOST_ENTRIES = 2**15
"""Then all of it is forgotten, and the next answers come from torch."""


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor of its own memory, or, of the tensor at a position among the arguments, a view."""

    shape: Sequence[IntLikeType]
    stride: Sequence[IntLikeType]
    dtype: torch.dtype
    device: torch.device
    offset: IntLikeType
    view_of: int | None

    def again(self, mode: FakeTensorMode, tensors: list[FakeTensor]) -> FakeTensor:
        """Another one."""
        with in_kernel_invocation_manager(mode):
            made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
            if self.view_of is not None:
                made.set_(tensors[self.view_of].untyped_storage(), self.offset, self.shape, self.stride)
        return FakeTensor(mode, made, self.device)


@dataclass(frozen=True, slots=True)
class _Argument:
    """The very tensor at a position among the arguments: an operation in place returns it."""

    at: int

    def again(self, mode: FakeTensorMode, tensors: list[FakeTensor]) -> FakeTensor:
        """That one."""
        return tensors[self.at]


_Output = _Made | _Argument | None
_Sequence = Callable[[list[Any]], Any]
_known: dict[tuple[Any, ...], tuple[_Sequence | None, list[_Output]] | None] = {}
"""By operation and arguments, the type of the sequence that it returns, or None for one tensor, and the outputs; None
where torch has to answer."""
_unasked: Any = object()


def answer(mode: FakeTensorMode, func: Any, args: Any, kwargs: Mapping[str, Any], asked: Callable[[], Any]) -> Any:
    """What `func` returns in `mode`: as remembered, or as `asked` from torch."""
    tensors: list[FakeTensor] = []
    key: list[Any] = [
        func,
        torch.get_default_dtype(),
        torch._C._get_default_device(),
        torch.is_inference_mode_enabled(),
    ]
    whole = mode.shape_env is None and _is_known_by_its_arguments(func) and _described(mode, args, key, tensors)
    if kwargs:
        key.extend(kwargs)
        whole = whole and _described(mode, kwargs.values(), key, tensors)
    if not whole:
        return asked()
    given = tuple(key)
    try:
        known = _known.get(given, _unasked)
    except TypeError:  # an argument that no dict takes as a key
        known = None
    if known is _unasked:
        result = asked()
        if len(_known) >= MOST_ENTRIES:
            _known.clear()
        _known[given] = _remembered(result, tensors)
        return result
    if known is None:
        return asked()
    sequence, outputs = known
    found = [None if output is None else output.again(mode, tensors) for output in outputs]
    return found[0] if sequence is None else sequence(found)


@cache
def _is_known_by_its_arguments(func: Any) -> bool:
    if not isinstance(func, OpOverload) or func.namespace not in ("aten", "prims"):
        return False  # a kernel of another library may answer as it likes
    changes_sizes = torch.Tag.inplace_view in func.tags or any(argument.is_out for argument in func._schema.arguments)
    return not changes_sizes


def _described(mode: FakeTensorMode, values: Iterable[Any], key: list[Any], tensors: list[FakeTensor]) -> bool:
    """Append to `key` all of `values` that an answer may depend on, and to `tensors` those that are tensors."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.fake_mode is not mode or not _is_plain(value):
                return False
            tensors.append(value)
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype, value._fake_device)
            key += (value.is_conj(), value.is_neg(), value.is_inference())
        elif kind is list or kind is tuple:
            key += (kind, len(value))
            if not _described(mode, value, key, tensors):
                return False
        elif isinstance(value, torch.Tensor):
            return False
        else:
            key += (kind, value)  # 1 and 1.0 are the same to a dict
    return True


def _remembered(result: Any, tensors: list[FakeTensor]) -> tuple[_Sequence | None, list[_Output]] | None:
    several = type(result) if type(result) in (list, tuple) else None
    outputs: list[_Output] = []
    given = [tensor.untyped_storage()._cdata for tensor in tensors]
    own: set[int] = set()
    for value in [result] if several is None else result:
        if value is None:
            outputs.append(None)
            continue
        if type(value) is not FakeTensor or not _is_plain(value):
            return None
        if value.requires_grad or value.is_conj() or value.is_neg():
            return None
        memory = value.untyped_storage()._cdata
        if memory in own or given.count(memory) > 1:
            return None  # of whose memory it is cannot be told
        view_of = given.index(memory) if memory in given else None
        if view_of is not None and tensors[view_of] is value:
            outputs.append(_Argument(view_of))
            continue
        if view_of is None:
            own.add(memory)
        made = _Made(value.shape, value.stride(), value.dtype, value._fake_device, value.storage_offset(), view_of)
        if not _is_like(made.again(value.fake_mode, tensors), value):
            return None
        outputs.append(made)
    return several, outputs


def _is_plain(tensor: FakeTensor) -> bool:
    return tensor.constant is None and tensor.layout is torch.strided and not tensor.is_quantized


def _is_like(again: FakeTensor, first: FakeTensor) -> bool:
    """Does torch treat it as what it answered?"""
    return (
        torch._C._dispatch_key_set(again) == torch._C._dispatch_key_set(first)
        and again.untyped_storage().nbytes() == first.untyped_storage().nbytes()
        and again.storage_offset() == first.storage_offset()
    )
