"""What is known of accelerate's hooks, which fetch a module's weights for each call from wherever they lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

HOOK = "_hf_hook"
"""Where a module has its hook; `forward` is then a wrapper of what is called `_old_forward`."""
OWN_FORWARD = "_old_forward"
_MOVERS = frozenset({"AlignDevicesHook", "CpuOffload", "UserCpuOffloadHook"})
"""Those that do nothing but move weights and activations."""


def is_mover(hook: Any) -> bool:
    """Is that one of accelerate's hooks, and one that moves weights?"""
    if type(hook).__name__ == "SequentialHook":
        return all(map(is_mover, hook.hooks))
    return type(hook).__name__ in _MOVERS


def fetched(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of the parameters and buffers that a hook of accelerate fetches for every call, and that are on
    the meta device until then."""
    for path, module in model.named_modules():
        for one in _hooks_of(module):
            if getattr(one, "offload", False) and is_mover(one):
                deep = bool(getattr(one, "place_submodules", False))
                named = [*module.named_parameters(recurse=deep), *module.named_buffers(recurse=deep)]
                yield from ((".".join(filter(None, (path, name))), tensor) for name, tensor in named if tensor.is_meta)


def execution_device(model: nn.Module) -> torch.device:
    """The device that a call's arguments belong on; of a model whose weights are fetched, the one they come to."""
    import torch

    for module in model.modules():
        for one in _hooks_of(module):
            if is_mover(one) and getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    first = next(iter(model.parameters()), None)
    return torch.device("cpu") if first is None else first.device


def _hooks_of(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get(HOOK)
    found: list[Any] = getattr(hook, "hooks", [hook])
    return found
