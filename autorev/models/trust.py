"""Code that a model's files bring or name. It runs where the user said so (`trust_remote_code`), and not otherwise.

A config may name Python files beside it or on the hub (`auto_map`), and kernels of the hub in place of attention or of
experts; adapters may name a module that is imported for them. `transformers` asks on the terminal about the first, and
loads the others without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autorev.errors import ModelBuildError, UnreadableError, UntrustedCodeError
from autorev.files import read_json
from autorev.packages import is_installed

_REMEDY = "code that comes with a model runs only with `trust_remote_code`"
_KERNEL = re.compile(r"(?:[^|]*\|)?[^/:]+/.+")
"""`org/repo`, `org/repo@revision:function`, `paged|org/repo`: what `transformers` takes for a kernel of the hub."""
_FLASH = re.compile(r"(?:[^|]*\|)?flash_attention_\d+")
"""Attention of a package of its own. Where it is missing, `transformers` takes a kernel of the hub instead, if the
package `kernels` is."""
_ADAPTERS = "adapter_config.json"
_MEGATRON = "megatron.core"


def check_config(data: Any, source: str, trusted: bool) -> None:
    """Raise where the config `data` names code that would run, unless it is `trusted`.

    `auto_map` beside a type that `transformers` knows stays unused: its own class is taken.

    Raises:
        UntrustedCodeError: it names code.
    """
    if trusted:
        return
    for where, owner, key, value in _entries(data, ""):
        for name in value.values() if isinstance(value, dict) else [value]:
            if not key.endswith("_implementation") or not isinstance(name, str):
                continue
            if _KERNEL.fullmatch(name) or _from_the_hub(name):
                raise UntrustedCodeError(
                    f"{source} asks for the kernel {name} of the hub ({where}), which would be downloaded and run; "
                    f"{_REMEDY}. Read it first, or take the entry out"
                )
        if key == "auto_map" and not _is_known(owner, top=owner is data):
            raise UntrustedCodeError(
                f"{source} describes a model that transformers does not know, with code of its own ({_file(value)}); "
                f"{_REMEDY}. Read it first"
            )


def check_tokenizer(folder: Path, trusted: bool) -> None:
    """Raise where a folder's tokenizer is code of its own; asked once `transformers` could not make it without.

    Raises:
        UntrustedCodeError: it is.
    """
    try:
        data = read_json(folder / "tokenizer_config.json")
    except UnreadableError:
        return
    if not trusted and isinstance(data, dict) and "auto_map" in data:
        raise UntrustedCodeError(f"the tokenizer in {folder} is code of its own; {_REMEDY}. Read it first")


def check_adapter_code(folder: Path) -> None:
    """Raise where PEFT would import what the adapters' config in `folder` names; without such a file, nothing is wrong.

    Raises:
        UntrustedCodeError: it names a module.
        ModelBuildError: it is no config of adapters.
    """
    path = folder / _ADAPTERS
    if not path.is_file():
        return
    try:
        data = read_json(path)
    except UnreadableError as error:
        raise ModelBuildError(f"{path} {error}; copy the folder once more") from None
    if not isinstance(data, dict):
        raise ModelBuildError(f"{path} is no config of adapters; copy the folder once more")
    if data.get("megatron_config") is not None or data.get("megatron_core") not in (None, _MEGATRON):
        raise UntrustedCodeError(
            f"{path} asks PEFT to import the module {data.get('megatron_core')!r} (megatron_core, megatron_config), "
            "and no code runs because a file names it; set both to null, as in adapters of `autorev finetune`"
        )


def _from_the_hub(attention: str) -> bool:
    """Would `transformers` fetch this attention as a kernel, as its package is missing?"""
    if not _FLASH.fullmatch(attention) or not is_installed("kernels"):
        return False
    from transformers.utils import import_utils

    here = getattr(import_utils, f"is_flash_attn_{attention[-1]}_available", None)
    return here is None or not here()


def _is_known(part: dict[str, Any], top: bool) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    kind = part.get("model_type")
    # Nested parts are built as their type's base model, which a few types lack.
    return isinstance(kind, str) and kind in CONFIG_MAPPING and (top or kind in MODEL_MAPPING_NAMES)


def _file(auto_map: Any) -> str:
    named = next(iter(auto_map.values()), None) if isinstance(auto_map, dict) else auto_map
    return f"{named.rpartition('.')[0]}.py" if isinstance(named, str) else "auto_map"


def _entries(data: Any, prefix: str) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """(path, the object, key, value) of every entry of every object within `data`."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        where = f"{prefix}{key}"
        if isinstance(data, dict):
            yield where, data, str(key), value
        yield from _entries(value, f"{where}.")
