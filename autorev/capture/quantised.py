"""Quantised linear layers: recognised by what they are, and stood for by plain ones where nothing is computed.

A library packs a layer's weight into small integers (bitsandbytes, GPTQ, AWQ, HQQ) or hides them behind a tensor of a
class of its own (torchao, quanto), and multiplies by kernels of its own, most of which know nothing of fake tensors.
Analysis and prediction need little of such a layer: what shapes it maps, how many bytes it holds, and what it keeps for
backward. `StandIn` has that and nothing else. No library is named here: a layer that holds the numbers of a linear map
in something else than floating ones of 16 bits or more is quantised, and what it keeps, it is asked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef

from autorev.hush import warnings_hushed
from autorev.integrations.transformers import transposed_linear

_PLAIN = (torch.Tensor, nn.Parameter)
_DEPTH = 3
"""Objects inside objects (bitsandbytes' state of the state) in which tensors are looked for."""
_ROWS = 2
"""Of the input on which a layer is asked what it keeps."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised linear layer, seen from outside."""

    inputs: int
    outputs: int
    dtype: torch.dtype
    """Of the unpacked weight, as far as the layer says."""
    bytes: int
    """Of all that the layer holds, its bias aside."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a quantised linear layer keeps for backward, besides itself."""

    input: bool
    unpacked: bool
    """The weight in the input's dtype; otherwise it is unpacked once more."""
    hidden: bool = False
    """Is the input none of the tensors that it tells autograd of? Then torch's checkpointing does not let go of it."""


INPUT = Kept(input=True, unpacked=False)
"""Taken for granted of a layer that cannot be asked here, as its kernels want another device."""


# -- recognised


def is_quantised(module: nn.Module) -> bool:
    """Is `module` a quantised linear layer?"""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(inputs, int) or not isinstance(outputs, int) or any(True for _ in module.children()):
        return False  # an adapter around a linear layer has its sizes, too
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    tensors.pop("bias", None)
    weight = tensors.get("weight")
    if weight is None:  # GPTQ and AWQ have a `qweight`; what trains is not packed
        return any(map(is_packed, tensors.values())) and not any(t.requires_grad for t in tensors.values())
    foreign = type(weight).__module__.partition(".")[0] != "torch"
    return is_packed(weight) or (foreign and weight.numel() != inputs * outputs)  # packed into floats, as FSDP wants it


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_quantised(module):
        layer: Any = module  # of a library whose layers are no nn.Linear
        return int(layer.in_features), int(layer.out_features)
    return transposed_linear(module)


def packed(module: nn.Module) -> Packed | None:
    """What `module` is as a quantised linear layer; None if it is none."""
    if not is_quantised(module):
        return None
    bias: Any = getattr(module, "bias", None)
    own = set() if bias is None else set(map(_storage, plain_tensors(bias)))
    held = {_storage(t): t.untyped_storage().nbytes() for t in plain_tensors(module)}
    layer: Any = module  # of a class of some library
    inputs, outputs = int(layer.in_features), int(layer.out_features)
    return Packed(inputs, outputs, _unpacked_dtype(module), sum(n for s, n in held.items() if s not in own))


def is_packed(tensor: torch.Tensor) -> bool:
    """Does it hold integers, or floating numbers of 8 bits, whatever dtype it says it has?"""
    if hasattr(tensor, "fake_mode"):
        return False  # a stand-in already
    return any(not t.dtype.is_floating_point or t.dtype.itemsize == 1 for t in plain_tensors(tensor, depth=0))


def bytes_inside(tensor: torch.Tensor) -> int | None:
    """Of a tensor that wraps packed ones (an embedding's weight, a convolution's): their bytes. None for any other."""
    if type(tensor) in _PLAIN or not hasattr(tensor, "__tensor_flatten__") or not is_packed(tensor):
        return None
    return sum({_storage(t): t.untyped_storage().nbytes() for t in plain_tensors(tensor, depth=0)}.values())


def quantised_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, Packed]]:
    """(path, layer, what it is) of every quantised linear layer of `model`, each once."""
    for path, module in model.named_modules():
        found = packed(module)
        if found is not None:
            yield path, module, found


def parameters_of(model: nn.Module) -> int:
    """How many parameters a model has, the quantised ones counted as what they stand for."""
    layers = list(quantised_linears(model))
    packed_away = {id(p) for _, layer, _ in layers for name, p in layer.named_parameters() if name != "bias"}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in packed_away)
    return rest + sum(found.inputs * found.outputs for _, _, found in layers)


def held_by(model: nn.Module) -> list[torch.Tensor]:
    """The ordinary tensors that a model's parameters and buffers, and its quantised layers, consist of."""
    own = [t for tensor in [*model.parameters(), *model.buffers()] for t in plain_tensors(tensor)]
    return own + [t for _, layer, _ in quantised_linears(model) for t in plain_tensors(layer)]


def plain_tensors(thing: Any, depth: int = _DEPTH) -> Iterator[torch.Tensor]:
    """The ordinary tensors in which a tensor of a class of its own, a module or an object has its numbers.

    `depth`: so many objects inside one another are looked into.
    """
    if isinstance(thing, torch.Tensor):
        if type(thing) in _PLAIN or hasattr(thing, "fake_mode"):
            yield thing
            return
        if hasattr(thing, "__tensor_flatten__"):  # it wraps others, and has no memory of its own
            for name in thing.__tensor_flatten__()[0]:
                yield from plain_tensors(getattr(thing, name), depth)
            return
        yield thing
    if not depth:
        return
    if isinstance(thing, nn.Module):
        inside: list[Any] = [*thing.parameters(), *thing.buffers()]
        inside += [value for name, value in vars(thing).items() if not name.startswith("_")]
    elif isinstance(thing, dict | list | tuple):
        inside = list(thing.values() if isinstance(thing, dict) else thing)
    else:
        inside = list(getattr(thing, "__dict__", {}).values())
    for value in inside:
        if isinstance(value, torch.Tensor) or _is_data(value):
            yield from plain_tensors(value, depth - 1)


def _is_data(value: Any) -> bool:
    """Something that may hold tensors and is no module, class or function, which others own."""
    if isinstance(value, dict | list | tuple):
        return len(value) < 100
    return hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _unpacked_dtype(module: nn.Module) -> torch.dtype:
    """As the weight says, or the state that it is unpacked with, or its scales."""
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    for found in (weight, state, *plain_tensors(module)):
        dtype = getattr(found, "dtype", None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.get_default_dtype()


# -- stood for


class StandIn(nn.Linear):
    """A linear layer of fake tensors in place of a quantised one: its shapes, its bytes, and what it keeps.

    `weight` has the shape and the dtype of the unpacked weight, over as much memory as the packed one takes.
    """

    def __init__(self, inputs: int, outputs: int, weight: torch.Tensor, bias: torch.Tensor | None, kept: Kept) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kept = inputs, outputs, kept
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        self.register_parameter("bias", bias if bias is None else nn.Parameter(bias, bias.requires_grad))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs], in the input's dtype"""
        if self.weight.requires_grad:
            return F.linear(input, self.weight.to(input.dtype), self._bias(input))
        multiply: Any = _Multiply.apply  # which torch leaves untyped
        out: torch.Tensor = multiply(input, self.weight, self._bias(input), self.kept)
        return out

    def _bias(self, input: torch.Tensor) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(input.dtype)


class _Multiply(torch.autograd.Function):
    """Multiplies by a weight that is unpacked for this one product."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kept: Kept
    ) -> torch.Tensor:
        unpacked = weight.new_empty(
            weight.shape, dtype=input.dtype
        )  # of the input, tiles would ask where its tokens are
        told = kept.input and not kept.hidden
        ctx.save_for_backward(weight, input if told else None, unpacked if kept.unpacked else None)
        ctx.hidden = input if kept.hidden else None
        return F.linear(input, unpacked, bias).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, _, unpacked = ctx.saved_tensors
        needs_input, _, needs_bias, _ = ctx.needs_input_grad
        if unpacked is None:
            unpacked = grad.new_empty(weight.shape)
        of_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        return (grad @ unpacked if needs_input else None), None, of_bias, None


def on_packed_memory(shape: tuple[int, ...], dtype: torch.dtype, size: int) -> torch.Tensor:
    """A tensor of `shape` whose storage has `size` bytes; its elements lie on top of one another. Under a fake mode."""
    count = max(-(-size // dtype.itemsize), shape[-1] if shape else 1)
    return torch.empty(count, dtype=dtype).as_strided(shape, (*(0 for _ in shape[:-1]), *(1 for _ in shape[-1:])))


def stand_in_for(module: nn.Module, found: Packed, fake_bias: torch.Tensor | None) -> StandIn:
    """What a fake copy of a model has in place of its layer `module`. Under a fake mode."""
    kept = kept_by(module, found)
    weight = on_packed_memory((found.outputs, found.inputs), found.dtype, found.bytes)
    trains = getattr(module._parameters.get("weight"), "requires_grad", False)
    made = StandIn(found.inputs, found.outputs, weight.requires_grad_(trains), fake_bias, kept)
    made.training = module.training
    return made


# -- asked

_known: dict[Any, Kept] = {}


def kept_by(module: nn.Module, found: Packed) -> Kept:
    """What `module` keeps for backward: a copy of it is called on two rows of ones, once for each kind of layer."""
    tensors = list(plain_tensors(module))
    kind = (
        type(module),
        *((type(p), name) for name, p in module.named_parameters()),
        *((t.dtype, t.device.type) for t in tensors),
    )
    if kind not in _known:
        try:
            _known[kind] = _asked(module, found, tensors[0].device)
        except Exception:  # kernels for another device, or a layer on the meta device
            _known[kind] = INPUT
    return _known[kind]


def _asked(module: nn.Module, found: Packed, device: torch.device) -> Kept:
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.update({_storage(t): t.untyped_storage().nbytes() for t in plain_tensors(tensor, depth=0)})
        return tensor.detach()  # with its graph, what a node returned and saved would never be freed

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with unset_fake_temporarily(), torch.enable_grad(), hooks, warnings_hushed(".*"):
        probe = copy.deepcopy(module).train()
        owned = set(map(_storage, plain_tensors(probe)))
        leaf = torch.ones(_ROWS, found.inputs, dtype=found.dtype, device=device, requires_grad=True)
        given = leaf * 1
        storage, key = StorageWeakRef(given.untyped_storage()), _storage(given)
        out = probe(given)
        del given
        alive = not storage.expired()
    del out
    whole = found.inputs * found.outputs
    unpacked = any(n >= whole for s, n in kept.items() if s not in owned and s != key)
    return Kept(input=alive, unpacked=unpacked, hidden=alive and key not in kept)
