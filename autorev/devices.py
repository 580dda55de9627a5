"""On which kinds of devices blocks are made reversible, and why not on the others: there they are refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from autorev.errors import ConversionError

if TYPE_CHECKING:
    import torch

REVERSIBLE_ON = frozenset({"cpu", "cuda", "meta"})
"""ROCm calls itself cuda, too."""
REFUSED = {
    "mps": "it has no float64, in which gradients and second runs are compared, and autorev has not run on it: whether "
    "its integers wrap round and shift as the exact inverse needs is not known",
    "xpu": "autorev has not run on it, so that nothing is known of its generators, its streams and its integers",
}
OTHER = "autorev has not run on it"


def check_device(kind: str, what: str) -> None:
    """Raise unless blocks may be made reversible on a device of that kind, where `what` lies.

    Raises:
        ConversionError: they may not.
    """
    if kind not in REVERSIBLE_ON:
        raise ConversionError(
            f"{what} lies on a device of kind {kind}, where nothing is made reversible, tiled or moved to the host: "
            f"{REFUSED.get(kind, OTHER)}. Train it on a CPU or on CUDA, or convert it with method='checkpoint', which "
            "is PyTorch's own"
        )


def check_devices(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """The same of named parameters.

    Raises:
        ConversionError: one lies where they may not; it is named.
    """
    for name, parameter in parameters:
        check_device(parameter.device.type, name)
