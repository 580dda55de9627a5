"""`autorev.load`: a converted model, back from the folder that `save_pretrained` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from autorev.conversion import config_entry
from autorev.conversion.convert import convert
from autorev.errors import ConversionError, ModelNotFoundError, one_line
from autorev.files import path_of
from autorev.models.load import class_in
from autorev.models.weights import load_weights


def load(folder: str | Path, *, trust_remote_code: bool = False, **from_pretrained: Any) -> nn.Module:
    """A model saved by `save_pretrained`, converted as it was when it was saved.

    `trust_remote_code`: code that stands beside its config, or that the config names, may run. `from_pretrained`:
    further keyword arguments of the `transformers` function of that name.

    Raises:
        ModelNotFoundError: the folder holds no config.json.
        ModelBuildError: transformers cannot load it, or its weights are not those of its config.
        UntrustedCodeError: it names code, which is not trusted.
        ConversionError: it was not converted when it was saved, or cannot be converted that way any more.
    """
    path = path_of(folder)
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"{path} holds no config.json; give the folder that save_pretrained wrote")
    cls, _ = class_in(path, trust_remote_code)
    model: nn.Module = load_weights(cls, path, **from_pretrained)
    settings = config_entry.read(model)
    if settings is None:
        raise ConversionError(
            f"{path} holds a model that was not converted; use transformers' from_pretrained, and autorev.convert"
        )
    config_entry.remove(model)
    try:
        convert(model, **config_entry.for_base_model(settings))
    except TypeError as error:
        raise ConversionError(
            f"{path}/config.json has an autorev entry of another version: {one_line(error)}"
        ) from None
    return model
