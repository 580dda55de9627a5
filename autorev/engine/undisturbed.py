"""Run a model for autorev's own purposes (the probe of a grid, verify) as if it had not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from autorev.capture.generators import set_generator
from autorev.engine.digest import looked_at
from autorev.engine.modules import SHARDED, TORCH_DICTS, ModuleStates, put_back, same_entries
from autorev.engine.owned import is_fake
from autorev.engine.plain_data import copied, is_generator
from autorev.engine.surroundings import RandomStates, devices_of


@contextmanager
def undisturbed(model: nn.Module, call: Any = ()) -> Iterator[None]:
    """Whatever runs inside, the modules' attributes, flags and buffers and the random streams are afterwards as before;
    and so are the generators among the arguments of a `call`.

    Weights and gradients are not looked after: nothing that runs here writes to them.
    """
    states = ModuleStates()
    for module in model.modules():
        states.hold(module, "")
    for leaf in tree_leaves(call):
        if is_generator(leaf):
            states.hold_object(leaf, "")
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    attributes = [(owned.tensor, value) for _, _, owned, value in states.small]
    tensors = [*model.parameters(), *model.buffers()]
    streams = (
        RandomStates(devices_of(*(t.device for t in tensors)))
        if looked_at() and not any(map(is_fake, tensors))
        else None
    )
    before = [(held.home, dict(held.home)) for held in states.held]
    fresh: dict[int, tuple[Any, Any]] = {}
    try:
        for held in states.held:  # what is written inside is written to copies
            held.home.update({key: copied(held.home[key], fresh) for key in held.containers - TORCH_DICTS})
        yield
    finally:
        if streams is not None:
            streams.put_back()
        for home, entries in before:
            put_back(home, entries)
        for held in states.held:
            # fully_shard goes by its own record of which parameters, whole ones or its part of them, are in place.
            sharded = {"_parameters"} if SHARDED in held.home else set()
            for key in (held.containers & TORCH_DICTS) - sharded:
                if not same_entries(held.home[key], held.attributes[key]):
                    held.home[key].clear()
                    held.home[key].update(held.attributes[key])
        for generator, state in states.generators:
            set_generator(generator, state)
        with torch.no_grad():
            for tensor, value in (*buffers, *attributes):
                if is_fake(tensor) or not torch.equal(tensor, value):  # writing the same would count as a change
                    tensor.copy_(value)
