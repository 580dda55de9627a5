"""What is known of PEFT: how a model with adapters is told, what is inside it, and how its names differ.

PEFT is imported where adapters are made or loaded, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autorev.packages import require

if TYPE_CHECKING:
    from torch import nn

_PREFIX = "base_model.model."
"""Where a PEFT model holds the model."""
_LAYERS = (".base_layer", ".original_module")
"""Where an adapter holds the layer that it is beside."""


def has_adapters(model: nn.Module) -> bool:
    """Does PEFT wrap it?"""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, within adapters that wrap it."""
    if not hasattr(model, "get_base_model"):
        return model
    base: nn.Module = model.get_base_model()  # type: ignore[operator]  # PEFT's method
    return base


def name_in_base(name: str) -> str:
    """A module's or a parameter's name in a model with adapters, as the model without them has it."""
    for part in _LAYERS:
        name = name.replace(part, "")
    return name.removeprefix(_PREFIX)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model computes what it computed before adapters were put into it."""
    if not hasattr(model, "disable_adapter"):
        yield
        return
    with model.disable_adapter():  # type: ignore[operator]  # PEFT's method
        yield


def lora_config(targets: Sequence[str], rank: int, **more: Any) -> Any:
    """PEFT's `LoraConfig` of the layers named `targets`.

    Raises:
        MissingPackageError: PEFT is not installed.
    """
    require("training LoRA", "peft")
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), **more)


def inject(model: nn.Module, config: Any) -> None:
    """Put adapters into the model, in place; everything else is frozen."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)


def wrap(model: nn.Module, config: Any) -> nn.Module:
    """The model with adapters, as PEFT's own class, which saves them by themselves."""
    from peft import get_peft_model

    wrapped: nn.Module = get_peft_model(model, config)
    return wrapped


def load_adapters(base: nn.Module, folder: Path) -> nn.Module:
    """`base` with the adapters that were saved in `folder`."""
    from peft import PeftModel

    model: nn.Module = PeftModel.from_pretrained(base, str(folder))
    return model


def merged(model: nn.Module) -> nn.Module:
    """The model itself, its adapters added to its weights."""
    base: nn.Module = model.merge_and_unload()  # type: ignore[operator]  # PEFT's method
    return base
