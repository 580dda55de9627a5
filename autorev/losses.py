"""A number to train on, of whatever a model returns: its own loss, where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autorev.detect.ends import flatten_with_path


def returned_loss(returned: Any) -> torch.Tensor | None:
    """The loss that a model returned, as an attribute or an item of that name."""
    loss = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", None)
    return loss if isinstance(loss, torch.Tensor) else None


def floating_outputs(returned: Any) -> list[torch.Tensor]:
    """The floating tensors that a model returned, in order."""
    leaves = (leaf for _, leaf in flatten_with_path(returned))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
