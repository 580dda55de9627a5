"""MODEL on the command line -> the model itself: with its weights where it has some, with random ones where not."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autorev.errors import AutorevError, ModelBuildError, SettingError, one_line
from autorev.files import path_of
from autorev.integrations.building import count_modules, default_dtype
from autorev.integrations.example_call import example_call_for
from autorev.integrations.model_class import model_class
from autorev.integrations.quirks import quiet_files
from autorev.integrations.transformers import is_transformers
from autorev.models.factory import made_for_real, resized
from autorev.models.from_config import assumed_sizes, check_counts, parse_config
from autorev.models.gguf_file import check_sizes, check_whole
from autorev.models.quantization import Scheme, quantise, scheme_of
from autorev.models.resolve import NamedConfig, config_of, embedded_file, is_embedded, names_factory
from autorev.models.trust import check_adapter_code, check_config, check_tokenizer
from autorev.models.weights import holds_weights, load_weights, say_what_is_not_read
from autorev.workload import Call, check_step

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
    model: str | None,
    dtype: torch.dtype,
    batch: int,
    sequence: int | None,
    depth: int | None = None,
    trust_remote_code: bool = False,
    quantization: Any = None,
) -> Loaded:
    """The model that MODEL names (`models/resolve.py` says how), in `dtype`, on the CPU.

    With a `depth`, its config is built with so many blocks and random weights. `trust_remote_code`: code that stands
    beside a config, or that it names, may run. `quantization`: a quantization config of `transformers`, by which the
    weights are quantised while they are loaded; those that are saved quantised come so, wherever their library wants
    them.

    Raises:
        ModelNotFoundError: it names nothing.
        ModelBuildError: it names something that cannot be built or loaded.
        UntrustedCodeError: it names code, which is not trusted.
        SettingError: it is too large for this machine.
    """
    check_step(batch, sequence)
    path = path_of(model or "")
    trusted = trust_remote_code
    if depth is not None:
        return _random(config_of(model), dtype, batch, sequence, depth, trusted)
    how = dtype, batch, sequence, trusted, quantization
    if is_embedded(model):
        file = embedded_file()
        return _pretrained(file.parent, "SmolLM2-135M-Instruct", *how, gguf_file=file.name)
    if path.suffix == ".gguf" and path.is_file():
        return _pretrained(path.parent, path.stem, *how, gguf_file=path.name)
    assert model is not None
    if holds_weights(path):
        return _pretrained(path, path.resolve().name, *how)
    if quantization is not None:
        raise SettingError(f"{model} has no weights to quantise; give a folder or a GGUF file that has some")
    if names_factory(model):
        return _from_factory(model, dtype)
    say_what_is_not_read(path)
    return _random(config_of(model), dtype, batch, sequence, None, trusted)


def has_weights(model: str | None) -> bool:
    """Does MODEL name weights, and not only a config or code?"""
    path = path_of(model or "")
    return is_embedded(model) or (path.suffix == ".gguf" and path.is_file()) or holds_weights(path)


def tokenizer_of(model: str | None, trust_remote_code: bool = False) -> Any:
    """The tokenizer that stands beside MODEL's weights; None where there is none.

    Raises:
        UntrustedCodeError: it is code of its own, which is not trusted.
    """
    from transformers import AutoTokenizer

    path = embedded_file() if is_embedded(model) else path_of(model or "")
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif not path.is_dir():
        return None
    try:
        with quiet_files():
            found = AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code)
            # Of some families, transformers makes one without any words where there is no file of it.
            return found if found("text", add_special_tokens=False).input_ids else None
    except Exception:  # no file of a tokenizer, or one that this transformers cannot read
        check_tokenizer(path, trust_remote_code)
        return None


def class_in(folder: Path, trust_remote_code: bool, **how: Any) -> tuple[type[Any], Any]:
    """The class of the model that was saved to `folder`, and its config. `how`: more of `from_pretrained`'s keywords.

    Raises:
        ModelBuildError: transformers cannot read the config, or has no such model.
        UntrustedCodeError: it names code, which is not trusted.
    """
    from transformers import AutoConfig

    if "gguf_file" not in how:
        check_adapter_code(folder)
        named = config_of(str(folder))
        check_config(named.data, named.source, trust_remote_code)
        check_counts(named.data, named.source)
    try:
        with quiet_files():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **how)
    except Exception as error:
        raise ModelBuildError(f"transformers cannot load {folder}: {one_line(error)}") from error
    return model_class(config, str(folder) if trust_remote_code else None), config


def _pretrained(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    batch: int,
    sequence: int | None,
    trusted: bool,
    quantization: Any,
    **how: Any,
) -> Loaded:

    if "gguf_file" in how:
        file = folder / how["gguf_file"]
        check_sizes(file, check_whole(file))
    cls, config = class_in(folder, trusted, **how)
    if "gguf_file" in how:
        _check_size(cls, config, name, dtype)
        model: Any = load_weights(cls, folder, dtype=dtype, **how)
        _forget_quantization(model)
        if quantization is not None:  # transformers does not do both at once
            model = _quantised(model, dtype, quantization)
    else:
        own = _scheme(getattr(config, "quantization_config", None))
        if own is not None and quantization is not None:
            raise SettingError(f"the weights of {name} are quantised already ({own.title}); leave `quantize` out")
        _check_size(cls, config, name, dtype, own or _scheme(quantization))
        more = {} if quantization is None else {"quantization_config": quantization}
        model = load_weights(cls, folder, dtype=dtype, **more)
    example = partial(example_call_for, model)
    return Loaded(model.train(), _called(example, batch, sequence, name), name, pretrained=True, example=example)


def _forget_quantization(model: Any) -> None:
    """The weights of a GGUF file are dequantized when they are loaded; what `transformers` still notes of it would keep
    its Trainer from training them, and tell whoever loads a saved copy that they are packed."""
    for name in ("is_quantized", "hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)


def _quantised(model: Any, dtype: torch.dtype, quantization: Any) -> Any:

    weights = model.state_dict()
    with quiet_files():
        return type(model).from_pretrained(
            None, config=model.config, state_dict=weights, dtype=dtype, quantization_config=quantization
        )


def _scheme(said: Any) -> Scheme | None:
    return scheme_of({"quantization_config": said if said is None or isinstance(said, dict) else said.to_dict()})


def _random(
    named: NamedConfig, dtype: torch.dtype, batch: int, sequence: int | None, depth: int | None, trusted: bool
) -> Loaded:

    code_from = named.home if trusted else None
    config = parse_config(named.data, named.source, depth, code_from)
    for note in assumed_sizes(config, named.data, named.source):
        logging.getLogger("autorev").warning("%s", note)
    cls = model_class(config, code_from)
    _check_size(cls, config, named.name, dtype)
    model = cls._from_config(config, dtype=dtype)
    example = partial(example_call_for, model)
    call = _called(example, batch, sequence, named.name)
    return Loaded(model.train(), call, named.name, pretrained=False, example=example)


def _called(example: Callable[[int, int | None], Call], batch: int, sequence: int | None, name: str) -> Call:
    try:
        return example(batch, sequence)
    except AutorevError:
        raise
    except Exception as error:  # torch's, on the config's numbers, or as there is not so much memory
        raise ModelBuildError(
            f"{name} cannot be called: {one_line(error)}; correct its config, or ask for less"
        ) from error


def _from_factory(spec: str, dtype: torch.dtype) -> Loaded:

    with default_dtype(dtype):
        model, call = made_for_real(spec)
    name = spec.partition(":")[2]
    if call is None and is_transformers(model):
        example = partial(example_call_for, model)
        return Loaded(model.train(), _called(example, 1, None, name), name, pretrained=False, example=example)
    call = call or ((), {})
    return Loaded(model.train(), call, name, pretrained=False, example=partial(resized, call))


def _check_size(cls: Any, config: Any, name: str, dtype: torch.dtype, scheme: Scheme | None = None) -> None:
    unquantised = copy.deepcopy(config)
    unquantised.__dict__.pop("quantization_config", None)
    try:
        with torch.device("meta"), count_modules():
            model = cls._from_config(unquantised, dtype=dtype)
            if scheme is not None and scheme.bits:
                quantise(model, scheme)
            held = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}
    except AutorevError:
        raise
    except Exception as error:
        raise ModelBuildError(
            f"{cls.__name__} cannot be built from the config of {name}: {one_line(error)}; correct the config"
        ) from error
    needed = sum(held.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > MOST_OF_MEMORY * memory:
        raise SettingError(
            f"{name} has {needed / 2**30:.1f} GiB of weights in {str(dtype).removeprefix('torch.')}, and this machine "
            f"{memory / 2**30:.0f} GiB of memory, of which gradients and activations need a part; name a smaller model"
        )
