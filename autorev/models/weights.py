"""The weights that were saved into the model that its config describes: all of them, or an error that names them.

`transformers` fills what a folder lacks with random numbers, leaves out what the model has no place for, and mentions
both in a warning at most. Whoever goes on from there trains, measures and ships a model that nobody has. Here is the
one place that loads weights, and it lets pass what `transformers` itself knows to be no loss (tied weights, buffers
that the model computes, what its class says may be absent or left over) and heads that this class does not have.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autorev.errors import ModelBuildError, UnreadableError, one_line
from autorev.files import read_json
from autorev.intact import check_intact
from autorev.integrations.quirks import quiet_files
from autorev.patching import patched_here

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "module")
"""What torch.compile, FSDP, activation checkpointing and DDP put into the names of a model's weights."""
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where weights stand in a folder; of several, `transformers` takes the first."""
_SHARD = re.compile(r".+-\d+-of-\d+\.(safetensors|bin)")
_FOREIGN = (".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")
_NAMED = 3
"""Names in an error; the rest is counted."""
_COUNTERS = re.compile(r"(^|\.)num_batches_tracked$")
"""Of batch norms: old files lack them, and nothing is computed from them unless momentum is None."""
_FORMER_BUFFERS = re.compile(r"(^|\.)(masked_bias|attn\.bias|attention\.bias|inv_freq|position_ids)$")
"""Constants that models kept beside their weights once, and compute today."""
_said: set[tuple[str, tuple[str, ...]]] = set()
"""What was said already: a run loads its model several times."""


def load_weights(cls: Any, folder: str | Path, **from_pretrained: Any) -> Any:
    """The `transformers` model of class `cls` with the weights of `folder`, or of its file `gguf_file`.

    Names that torch.compile, DDP, FSDP or checkpointing lengthened are read without those prefixes, which the log of
    `autorev` says once. `from_pretrained`: keyword arguments of the method of that name.

    Raises:
        ModelBuildError: weights are missing, left over or of another shape, a file of them is missing, or
            `transformers` cannot load it.
        DamagedError: autorev wrote the folder, and its files are not what was written.
    """

    path = Path(folder)
    how = dict(from_pretrained)
    gguf = how.get("gguf_file")
    if gguf is None:
        _check_files(path)
        check_intact(path)
    reshaped = bool(how.pop("ignore_mismatched_sizes", False))  # asked for by whoever loads it
    how |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    broken: list[str] = []
    try:
        with quiet_files(), _conversions(broken):
            model, info = cls.from_pretrained(path, **how)
            wrapped = [] if gguf else [name for name in info["unexpected_keys"] if _wrappers_in(name)]
            if wrapped:
                known = set(model.state_dict())
                del model  # two copies would need twice the memory
                model, info = _without_wrappers(cls, path, known, how)
    except ModelBuildError:
        raise
    except Exception as error:
        if broken:
            raise _misfit(path, cls, [_counted(len(broken), "cannot be converted", broken)], gguf) from error
        raise ModelBuildError(f"transformers cannot load {path / (gguf or '')}: {one_line(error)}") from error
    _check(path, model, info, reshaped, gguf)
    return model


def take_up_weights(model: nn.Module, folder: str | Path) -> None:
    """Put the weights that were saved of `model` to `folder` back into it, as they would be loaded anew.

    Its names in a file may be others than in memory (experts are saved one by one and computed as one tensor), which
    `transformers` knows when it loads a model, and its Trainer does not when it goes on with one.

    Raises:
        ModelBuildError: see `load_weights`.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    saved = load_weights(type(model), folder, dtype=dtype)
    model.load_state_dict(saved.state_dict())


def check_adapters(model: nn.Module, folder: str | Path) -> None:
    """Raise unless the adapters in `folder` are those that PEFT's `model` has.

    Raises:
        ModelBuildError: some are missing, left over or of another shape, or the file cannot be read.
    """
    from peft import get_peft_model_state_dict

    path = Path(folder) / "adapter_model.safetensors"
    try:
        saved = _shapes(path)
    except Exception as error:  # the system and safetensors each have errors of their own
        raise ModelBuildError(f"the adapters in {folder} cannot be read: {one_line(error)}") from error
    own = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    parts = []
    if missing := [name for name in own if name not in saved]:
        parts.append(_counted(len(missing), f"of {len(own)} are missing", missing))
    if left := [name for name in saved if name not in own]:
        parts.append(_counted(len(left), "belong to no module that has adapters", left))
    if other := [name for name in own if name in saved and saved[name] != own[name]]:
        shapes = [f"{name} is {list(saved[name])}, not {list(own[name])}" for name in other]
        parts.append(_counted(len(other), "have another shape", shapes))
    if parts:
        raise ModelBuildError(
            f"the adapters in {folder} are not those of this model: {'; '.join(parts)}. Those that are missing would "
            "change nothing; copy the folder once more, or train them once more"
        )


def holds_weights(folder: Path) -> bool:
    """Does a folder hold weights that `transformers` reads, or an index that names some?"""
    return folder.is_dir() and any(
        path.suffix in (".safetensors", ".bin") or path.name in _FILES for path in folder.iterdir()
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that `transformers` reads the weights of a folder from.

    Raises:
        ModelBuildError: an index of them cannot be read.
    """
    first = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if first is None:
        return []
    return [folder / name for name in sorted(set(_index(first).values()))] if first.suffix == ".json" else [first]


def say_what_is_not_read(folder: Path) -> None:
    """Log that a folder's weights are in files of another kind, for whoever takes the random ones for them."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _FOREIGN) if folder.is_dir() else []
    if found:
        _say(
            str(folder),
            found,
            f"the weights are random: {folder} has {', '.join(found[:_NAMED])}, which is not read with a config beside "
            f"it; save the model by save_pretrained (or name a .gguf file itself) to have its own",
        )


# -- files


def _check_files(folder: Path) -> None:
    """Raise where an index names files that are not there, or shards have no index."""
    if not folder.is_dir():
        return
    first = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if first is None:
        shards = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
        if shards:
            raise ModelBuildError(
                f"{folder} holds {_some(shards)}, and no index that says which weights are where "
                "(model.safetensors.index.json); download or copy it, too"
            )
    elif first.suffix == ".json":
        files = sorted(set(_index(first).values()))
        gone = [name for name in files if not (folder / name).is_file()]
        if gone:
            raise ModelBuildError(
                f"{folder} lacks {len(gone)} of the {len(files)} files of weights that its {first.name} names: "
                f"{_some(gone)}; download or copy them once more"
            )


def _index(path: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = dict(read_json(path)["weight_map"])
        if not all(isinstance(file, str) and Path(file).name == file for file in found.values()):
            raise ValueError("a file that does not lie beside it")
    except (UnreadableError, ValueError, KeyError, TypeError):
        raise ModelBuildError(f"{path} is no index of weights; download or copy it once more") from None
    return found


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in a folder by the names that they have there."""
    from transformers.modeling_utils import load_state_dict

    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        found |= load_state_dict(str(file))
    return found


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no mapping


# -- prefixes


def _wrappers_in(name: str) -> list[str]:
    return [part for part in name.split(".") if part in WRAPPERS]


def _own_name(name: str, known: set[str]) -> str:
    """`name` without prefixes, where `known` are the model's own: one of its modules may be called `module`."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part in WRAPPERS]
    for count in range(len(places)):
        for gone in combinations(places, count):
            own = ".".join(part for place, part in enumerate(parts) if place not in gone)
            if own in known:
                return own
    return ".".join(part for part in parts if part not in WRAPPERS)


def _without_wrappers(cls: Any, folder: Path, known: set[str], how: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load it by a dictionary of weights under their own names.

    `from_pretrained` could rename them itself (`key_mapping`), but the model then remembers the renaming, and its
    `save_pretrained` writes every name with all prefixes.
    """
    from transformers import GenerationConfig

    found: dict[str, torch.Tensor] = {}
    stripped: dict[str, None] = {}
    for name, tensor in _tensors(folder).items():
        own = _own_name(name, known)
        stripped |= dict.fromkeys((Counter(_wrappers_in(name)) - Counter(_wrappers_in(own))).elements())
        if own in found:
            raise ModelBuildError(
                f"{folder} holds {own} twice, with and without the prefixes of a compiled or wrapped model; save the "
                "state_dict of the model itself"
            )
        found[own] = tensor
    config = how.get("config") or cls.config_class.from_pretrained(folder)
    model, info = cls.from_pretrained(None, **{**how, "config": config, "state_dict": found})
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    prefixes = [f"{part}." for part in stripped]
    _say(
        str(folder),
        prefixes,
        f"the weights in {folder} were saved from a compiled or wrapped model: their names are read without "
        f"{', '.join(prefixes)}",
    )
    return model, info


# -- what fits


def _check(folder: Path, model: Any, info: dict[str, Any], reshaped: bool, gguf: str | None) -> None:
    own = set(model.state_dict())
    missing = sorted((name for name in info["missing_keys"] if not _COUNTERS.search(name)), key=_natural)
    computed = {name for name, _ in model.named_buffers()} - own
    left = sorted(info["unexpected_keys"] - computed, key=_natural)
    left = [name for name in left if not (_is_former_buffer(model, name) or _COUNTERS.search(name))]
    # Where weights are missing, what is left over may be those by another name.
    heads = [] if missing else [name for name in left if _is_head(model, name)]
    body = [name for name in left if name not in heads]
    other = [] if reshaped else sorted(info["mismatched_keys"], key=lambda each: _natural(each[0]))
    parts = []
    if missing:
        absent = _blocks(missing) - _blocks(own.difference(missing))
        parts.append(_counted(len(missing), f"of {len(own)} are missing", missing) + _whole(absent))
    if body:
        absent = _blocks(body) - _blocks(own)
        parts.append(_counted(len(body), "have no place in the model", body) + _whole(absent))
    if other:
        shapes = [f"{name} is {list(there)}, not {list(here)}" for name, there, here in other]
        parts.append(_counted(len(other), "have another shape", shapes))
    if parts:
        raise _misfit(folder, type(model), parts, gguf)
    if heads:
        _say(
            str(folder),
            heads,
            f"{type(model).__name__} has no such head, and leaves {len(heads)} of the weights in {folder} out: "
            f"{_some(heads)}",
        )


def _misfit(folder: Path, cls: Any, parts: list[str], gguf: str | None) -> ModelBuildError:
    if gguf is None:
        advice = (
            "Give the config.json that was saved with these weights, or save or download the folder once more; for "
            "random weights give the config.json itself, or a folder without weights"
        )
    else:
        advice = "Convert or download the file once more"
    return ModelBuildError(
        f"the weights in {folder / (gguf or '')} are not those of the {cls.__name__} that its config describes: "
        f"{'; '.join(parts)}. {advice}"
    )


def _is_former_buffer(model: Any, name: str) -> bool:
    """Is it a constant of former times? A bias beside a weight is no mask, whatever its module is called."""
    try:
        owner = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        owner = None
    return _FORMER_BUFFERS.search(name) is not None and not hasattr(owner, "weight")


def _is_head(model: Any, name: str) -> bool:
    """Does a weight belong to a head that this class lacks, so that the model computes the same without it?

    Anything within the base model, within a block or of a module that is there would have changed what it computes.
    """
    base = getattr(model, "base_model", model)
    module, inside = model, base is model
    for part in name.split(".")[:-1]:
        if part.isdecimal():
            return False
        child = module._modules.get(part)
        if child is None:
            return part == "pooler" or not inside  # BERT's pooler is a head that lies within the base model
        module, inside = child, inside or child is base
    return False


def _blocks(names: Iterable[str]) -> set[str]:
    """The blocks that weights belong to: their names up to the first number."""
    found = (re.match(r"(.*?\.)?\d+(?=\.)", name) for name in names)
    return {match.group() for match in found if match}


def _whole(blocks: set[str]) -> str:
    return f", among them all of {_some(sorted(blocks, key=_natural))}" if blocks else ""


def _counted(count: int, what: str, names: list[str]) -> str:
    return f"{count} {what} ({_some(names)})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f", ... ({len(names)} in all)" if len(names) > _NAMED else "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 10 behind block 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _say(where: str, what: Iterable[str], text: str) -> None:
    key = where, tuple(sorted(what))
    if key not in _said:
        _said.add(key)
        logging.getLogger("autorev").warning("%s", text)


@contextmanager
def _conversions(broken: list[str]) -> Iterator[None]:
    """While it lasts, `broken` collects the weights that `transformers` fails to convert: its exception points to a
    report in its log, which is silenced."""
    from transformers import modeling_utils

    def listening(original: Callable[..., None]) -> Callable[..., None]:
        def report(*args: Any, **kwargs: Any) -> None:
            broken.extend(getattr(kwargs.get("loading_info"), "conversion_errors", ()))
            original(*args, **kwargs)

        return report

    with ExitStack() as stack:
        if hasattr(modeling_utils, "log_state_dict_report"):  # other versions may have no such report
            stack.enter_context(patched_here(modeling_utils, "log_state_dict_report", listening))
        yield
