"""A module as its author wrote it, where a library has put its own workings into it.

Analysis runs a weightless copy of the model in one process, and there is nothing in it to gather, to reduce or to move:
`fully_shard` and `replicate` have given the module a class that refuses to be copied, sharded parameters, and hooks;
accelerate a forward that fetches weights from another device, from memory or from disk.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from autorev.errors import CaptureError
from autorev.integrations.accelerate import HOOK, OWN_FORWARD, is_mover

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SAVING = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def refuse_flattened(model: nn.Module) -> None:
    """FSDP of the first kind keeps the parameters of many modules in one, and nothing of theirs can be analysed.

    Raises:
        CaptureError: `model` is of that kind.
    """
    for path, module in model.named_modules():
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            raise CaptureError(
                f"{path or 'the model'} is wrapped by FullyShardedDataParallel, which keeps the parameters of many "
                "modules in one, so its blocks cannot be analysed; convert the model first and wrap it then, or shard "
                "it by fully_shard (FSDP2), before or after"
            )


def plain_state(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """(class, attributes) of `module` without what libraries have put there; None where they have put nothing."""
    home = module.__dict__
    cls = _own_class(type(module))
    ours = {name: _without_distributed(home[name]) for name in (*_HOOKS, *_SAVING) if home.get(name)}
    theirs = [name for name in home if str(name).startswith("__composable_api_state_key")]
    moved = is_mover(home.get(HOOK))
    if (
        cls is type(module)
        and not (theirs or moved)
        and all(len(kept) == len(home[name]) for name, kept in ours.items())
    ):
        return None
    state = {**home, **ours}
    for name in (*theirs, "_is_fsdp_managed_module", "_compiled_call_impl"):
        state.pop(name, None)
    if moved:
        forward = home.get(OWN_FORWARD)
        for name in (HOOK, OWN_FORWARD, "forward"):
            state.pop(name, None)
        if getattr(forward, "__func__", None) is not cls.forward:
            state["forward"] = forward
    return cls, state


def _own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class before `fully_shard` or `replicate` derived theirs from it."""
    while getattr(cls.__dict__.get("__deepcopy__"), "__module__", "").startswith("torch.distributed."):
        cls = cls.__bases__[-1]
    return cls


def _without_distributed(hooks: dict[int, Any]) -> dict[int, Any]:
    return type(hooks)((key, hook) for key, hook in hooks.items() if not _is_distributed(hook))


def _is_distributed(hook: Any) -> bool:
    if type(hook).__name__ == "_WrappedHook":  # of those for a state_dict
        hook = hook.hook
    while isinstance(hook, functools.partial):
        hook = hook.func
    owner = getattr(hook, "__self__", None)
    where = getattr(hook, "__module__", "") if owner is None else type(owner).__module__
    return str(where).startswith("torch.distributed.")
