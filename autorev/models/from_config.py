"""A `transformers` config -> a workload: the class it names, built without weights and called as in training."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autorev.errors import AutorevError, ModelBuildError, one_line
from autorev.integrations.example_call import example_call, has_images, has_sequence, picture_in, sequence_limit
from autorev.integrations.inputs import text_config
from autorev.integrations.model_class import model_class
from autorev.integrations.pictures import reads_pictures
from autorev.models.quantization import scheme_of
from autorev.models.trust import check_config
from autorev.packages import require
from autorev.workload import Call, Workload

if TYPE_CHECKING:
    import torch

    from autorev.integrations.building import Build

_USUAL_SEQUENCE = 2048
"""Tokens per sample where nothing else is asked for; fewer where the model has fewer positions."""
_USUAL_IMAGES = 32
_MOST_BLOCKS = 10_000
"""Layers or experts that a config may ask for: ten times the deepest model there is, and built in minutes."""
_COUNT = re.compile(r"(num|n|encoder|decoder)_(.*_)?(layer|block|expert)s?|(encoder|decoder)?_?(layers|depths?)")
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
"""What a model's memory follows from, by the names that every family's own are mapped to."""


def config_workload(
    data: Any, name: str, source: str, depth: int | None = None, code_from: str | None = None
) -> Workload:
    """The workload of a `transformers` config given as a dictionary.

    Args:
        data: the config.
        name: of the model.
        source: where it came from, in words.
        depth: so many blocks instead of its own.
        code_from: the folder or hub id whose own code may run; None: none may.
    """

    config = parse_config(data, source, depth, code_from)
    model_cls = model_class(config, code_from)

    def build(dtype: torch.dtype) -> torch.nn.Module:
        from autorev.integrations.building import building, settle

        try:
            with building(dtype):
                built: torch.nn.Module = model_cls._from_config(copy.deepcopy(config), dtype=dtype)
        except AutorevError:
            raise
        except ImportError as error:  # it is for `transformers` to say of what
            raise ModelBuildError(
                f"{model_cls.__name__} cannot be built: {one_line(error)}; install what it needs"
            ) from error
        except Exception as error:
            raise ModelBuildError(
                f"{model_cls.__name__} cannot be built from {source}: {one_line(error)}; correct the config"
            ) from error
        settle(built, dtype)  # Mamba makes some of its parameters in fp32 and loads them in the weights' dtype
        return built.train()

    workload = transformers_workload(config, model_cls, build, name, source, assumed_sizes(config, data, source))
    return replace(workload, scheme=scheme_of(data))


def transformers_workload(
    config: Any, model_cls: type[Any], build: Build, name: str, source: str, notes: tuple[str, ...] = ()
) -> Workload:
    """The workload of a `transformers` class: what it is called with follows from its config."""

    from autorev.integrations.building import in_one_dtype

    has_text = has_sequence(config, model_cls)
    limit = sequence_limit(config, model_cls) if has_text else None
    shown = picture_in(config, model_cls) if has_text and reads_pictures(config, model_cls) else None
    if shown is not None:
        notes = (*notes, shown.note)
        limit = limit and max(limit - len(shown.ids), 1)

    def example(batch: int, sequence: int | None) -> Call:
        try:
            return example_call(config, model_cls, batch, sequence)
        except AutorevError:
            raise
        except Exception as error:  # torch's, on the config's numbers
            raise ModelBuildError(
                f"no inputs of {model_cls.__name__} can be made from {source}: {one_line(error)}; correct the config"
            ) from error

    matched_build, matched_example = in_one_dtype(build, example)
    return Workload(
        name=name,
        source=source,
        build=matched_build,
        example=matched_example,
        default_batch=_USUAL_IMAGES if has_images(model_cls) else 1,
        default_sequence=min(limit or _USUAL_SEQUENCE, _USUAL_SEQUENCE) if has_text else None,
        longest_sequence=limit,
        walks_batch=shown is not None,
        notes=notes,
    )


def parse_config(data: Any, source: str, depth: int | None = None, code_from: str | None = None) -> Any:
    """The `transformers` config of a dictionary; see `config_workload` for the arguments.

    Raises:
        ModelBuildError: it is none that this `transformers` knows, asks for too much, or has no number of blocks.
        UntrustedCodeError: it names code.
    """
    require("a transformers model", "transformers")
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from autorev.integrations.quirks import quiet

    kind = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise ModelBuildError(
            f"{source} has no model_type, so it is not a transformers config; give a config.json that has one"
        )
    check_config(data, source, trusted=code_from is not None)
    check_counts(data, source)
    if code_from is not None and "auto_map" in data:
        return _own_config(code_from, source, depth)
    if kind not in CONFIG_MAPPING:
        raise ModelBuildError(
            f"{source} is of type {kind!r}, which transformers {transformers.__version__} does not know; "
            "install a version that does, or write a function that returns (model, args) and "
            "give package.module:function"
        )
    # Built as it is computed; how the published weights are packed, `models/quantization.py` adds.
    keys = {key: value for key, value in data.items() if key != "quantization_config"}
    try:
        with quiet():
            config = CONFIG_MAPPING[kind].from_dict(keys)
    except Exception as error:
        raise ModelBuildError(f"transformers refuses the config of {source}: {one_line(error)}; correct it") from None
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None and not hasattr(part, "get_text_config"):
            raise ModelBuildError(f"{name} in {source} is a {type(part).__name__}, and no config; correct it")
    if depth is not None:
        _set_depth(config, depth, source)
    return config


def check_counts(data: Any, source: str) -> None:
    """Raise where a config asks for more blocks or experts than could be built, or its class is no name.

    Raises:
        ModelBuildError: it does.
    """
    if isinstance(data, list):
        for part in data:
            check_counts(part, source)
    if not isinstance(data, dict):
        return
    named = data.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ModelBuildError(f"{source} has architectures that are no list of names; correct the config")
    for key, value in data.items():
        counts = value if isinstance(value, list) else [value]
        if _COUNT.fullmatch(key) and any(isinstance(n, int | float) and n > _MOST_BLOCKS for n in counts):
            raise ModelBuildError(
                f"{source} asks for {key} = {value}, and autorev builds {_MOST_BLOCKS:,} at most; correct the config"
            )
        check_counts(value, source)


def assumed_sizes(config: Any, data: dict[str, Any], source: str) -> tuple[str, ...]:
    """A note on the sizes that the config `data` leaves to `transformers`, if there are any."""
    text = text_config(config)
    key = next((name for name, part in vars(config).items() if part is text), None)
    part = data if key is None else data.get(key)
    given = part if isinstance(part, dict) else {}
    declared = vars(text)
    own = {getattr(text, "attribute_map", {}).get(name, name): name for name in _SIZES}
    left = [name for name, usual in own.items() if name in declared and not {name, usual} & given.keys()]
    if not left:
        return ()
    values = ", ".join(f"{name} = {declared[name]}" for name in left)
    return (f"{source} does not say {values}: these are what {type(text).__name__} has by itself",)


def _own_config(code_from: str, source: str, depth: int | None) -> Any:
    """The config that code beside it defines, which the user lets run."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(code_from, trust_remote_code=True)
    except Exception as error:  # code of others
        raise ModelBuildError(f"the code beside {source} cannot make its config: {one_line(error)}") from error
    if depth is not None:
        _set_depth(config, depth, source)
    return config


def _set_depth(config: Any, depth: int, source: str) -> None:
    text = text_config(config)
    own = getattr(text, "num_hidden_layers", None)  # every family's own name for it is mapped to this one
    if not isinstance(own, int):
        raise ModelBuildError(f"the config of {source} has no number of blocks that could be set; leave `depth` out")
    if depth > _MOST_BLOCKS:
        raise ModelBuildError(f"autorev builds {_MOST_BLOCKS:,} blocks at most, not a depth of {depth:,}")
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = [kinds[n % len(kinds)] for n in range(depth)]
    text.num_hidden_layers = depth
