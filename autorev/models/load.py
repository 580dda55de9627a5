"""MODEL on the command line -> the model itself: with its weights where it has some, with random ones where not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autorev.errors import ModelBuildError, SettingError
from autorev.models.building import default_dtype
from autorev.models.from_config import one_line, parse_config
from autorev.models.resolve import config_of, embedded_file, is_embedded
from autorev.models.weights import holds_weights, load_weights, say_what_is_not_read
from autorev.workload import Call

MOST_OF_MEMORY = 0.25
"""Share of this machine's memory that the weights may take: gradients and activations come on top."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in training mode, and a call of it."""

    model: nn.Module
    call: Call
    name: str
    pretrained: bool
    """False: the weights are random."""
    example: Callable[[int, int | None], Call]
    """A call of another batch size and sequence length, where the model has such axes."""


def load_model(
    model: str | None, dtype: torch.dtype, batch: int, sequence: int | None, depth: int | None = None
) -> Loaded:
    """The model that MODEL names (`models/resolve.py` says how), in `dtype`, on the CPU.

    With a `depth`, its config is built with so many blocks and random weights.

    Raises:
        ModelNotFoundError: it names nothing.
        ModelBuildError: it names something that cannot be built or loaded.
        SettingError: it is too large for this machine.
    """
    path = Path(model or "").expanduser()
    if depth is not None:
        data, name, source = config_of(model)
        return _random(parse_config(data, source, depth), name, dtype, batch, sequence)
    if is_embedded(model):
        file = embedded_file()
        return _pretrained(file.parent, "SmolLM2-135M-Instruct", dtype, batch, sequence, gguf_file=file.name)
    if path.suffix == ".gguf" and path.is_file():
        return _pretrained(path.parent, path.stem, dtype, batch, sequence, gguf_file=path.name)
    assert model is not None
    if holds_weights(path):
        return _pretrained(path, path.resolve().name, dtype, batch, sequence)
    if ":" in model and not path.exists():
        return _from_factory(model, dtype)
    data, name, source = config_of(model)
    say_what_is_not_read(path)
    return _random(parse_config(data, source), name, dtype, batch, sequence)


def has_weights(model: str | None) -> bool:
    """Does MODEL name weights, and not only a config or code?"""
    path = Path(model or "").expanduser()
    return is_embedded(model) or (path.suffix == ".gguf" and path.is_file()) or holds_weights(path)


def tokenizer_of(model: str | None) -> Any:
    """The tokenizer that stands beside MODEL's weights; None where there is none."""
    from transformers import AutoTokenizer

    from autorev.capture.transformers_quirks import quiet_files

    path = embedded_file() if is_embedded(model) else Path(model or "").expanduser()
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif not path.is_dir():
        return None
    try:
        with quiet_files():
            found = AutoTokenizer.from_pretrained(**where)
            # Of some families, transformers makes one without any words where there is no file of it.
            return found if found("text", add_special_tokens=False).input_ids else None
    except Exception:  # no file of a tokenizer, or one that this transformers cannot read
        return None


def _pretrained(folder: Path, name: str, dtype: torch.dtype, batch: int, sequence: int | None, **how: Any) -> Loaded:
    from transformers import AutoConfig

    from autorev.capture.transformers_quirks import quiet_files
    from autorev.models.example_call import example_call_for, model_class

    try:
        with quiet_files():
            config = AutoConfig.from_pretrained(folder, **how)
            cls = model_class(config)
            _check_size(cls, config, name, dtype)
            model: Any = load_weights(cls, folder, dtype=dtype, **how)
            if "gguf_file" in how:
                _forget_quantization(model)
    except (ModelBuildError, SettingError):
        raise
    except Exception as error:
        raise ModelBuildError(f"transformers cannot load {folder}: {one_line(error)}") from error
    example = partial(example_call_for, model)
    return Loaded(model.train(), example(batch, sequence), name, pretrained=True, example=example)


def _forget_quantization(model: Any) -> None:
    """The weights of a GGUF file are dequantized when they are loaded; what `transformers` still notes of it would keep
    its Trainer from training them, and tell whoever loads a saved copy that they are packed."""
    for name in ("is_quantized", "hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)


def _random(config: Any, name: str, dtype: torch.dtype, batch: int, sequence: int | None) -> Loaded:
    from autorev.models.example_call import example_call_for, model_class

    cls = model_class(config)
    _check_size(cls, config, name, dtype)
    model = cls._from_config(config, dtype=dtype)
    example = partial(example_call_for, model)
    return Loaded(model.train(), example(batch, sequence), name, pretrained=False, example=example)


def _from_factory(spec: str, dtype: torch.dtype) -> Loaded:
    from autorev.models.example_call import example_call_for
    from autorev.models.factory import made_for_real, resized

    with default_dtype(dtype):
        model, call = made_for_real(spec)
    name = spec.partition(":")[2]
    if call is None and hasattr(model, "config") and hasattr(model, "main_input_name"):
        example = partial(example_call_for, model)
        return Loaded(model.train(), example(1, None), name, pretrained=False, example=example)
    call = call or ((), {})
    return Loaded(model.train(), call, name, pretrained=False, example=partial(resized, call))


def _check_size(cls: Any, config: Any, name: str, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in cls._from_config(config).parameters())
    needed = parameters * dtype.itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > MOST_OF_MEMORY * memory:
        raise SettingError(
            f"{name} has {needed / 2**30:.1f} GiB of weights in {str(dtype).removeprefix('torch.')}, and this machine "
            f"{memory / 2**30:.0f} GiB of memory, of which gradients and activations need a part; name a smaller model"
        )
