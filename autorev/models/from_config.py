"""A `transformers` config -> a workload: the class it names, built without weights and called as in training."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from autorev.errors import AutorevError, ModelBuildError
from autorev.workload import Call, Workload

if TYPE_CHECKING:
    import torch

    from autorev.models.building import Build

_USUAL_SEQUENCE = 2048
"""Tokens per sample where nothing else is asked for; fewer where the model has fewer positions."""
_USUAL_IMAGES = 32


def config_workload(data: Any, name: str, source: str, depth: int | None = None) -> Workload:
    """The workload of a `transformers` config given as a dictionary; `depth`: of so many blocks instead of its own."""
    try:
        import transformers  # noqa: F401 - is it installed?
    except ImportError as error:
        raise needs_transformers(error) from None
    from autorev.models.example_call import model_class

    config = parse_config(data, source, depth)
    model_cls = model_class(config)

    def build(dtype: torch.dtype) -> torch.nn.Module:
        from autorev.models.building import building, settle

        try:
            with building(dtype):
                built: torch.nn.Module = model_cls._from_config(copy.deepcopy(config), dtype=dtype)
        except AutorevError:
            raise
        except Exception as error:
            raise ModelBuildError(
                f"{model_cls.__name__} cannot be built from {source}: {one_line(error)}; correct the config"
            ) from error
        settle(built, dtype)  # Mamba makes some of its parameters in fp32 and loads them in the weights' dtype
        return built.train()

    return transformers_workload(config, model_cls, build, name, source)


def transformers_workload(config: Any, model_cls: type[Any], build: Build, name: str, source: str) -> Workload:
    """The workload of a `transformers` class: what it is called with follows from its config."""
    from autorev.models.building import in_one_dtype
    from autorev.models.example_call import example_call, has_images, has_sequence, sequence_limit

    has_text = has_sequence(config, model_cls)
    limit = sequence_limit(config) if has_text else None

    def example(batch: int, sequence: int | None) -> Call:
        return example_call(config, model_cls, batch, sequence)

    matched_build, matched_example = in_one_dtype(build, example)
    return Workload(
        name=name,
        source=source,
        build=matched_build,
        example=matched_example,
        default_batch=_USUAL_IMAGES if has_images(model_cls) else 1,
        default_sequence=min(limit or _USUAL_SEQUENCE, _USUAL_SEQUENCE) if has_text else None,
        longest_sequence=limit,
    )


def parse_config(data: Any, source: str, depth: int | None = None) -> Any:
    """The `transformers` config of a dictionary; `depth`: with so many blocks instead of its own.

    Raises:
        ModelBuildError: it is none that this `transformers` knows, or it has no number of blocks.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from autorev.capture.transformers_quirks import quiet

    kind = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise ModelBuildError(
            f"{source} has no model_type, so it is not a transformers config; give a config.json that has one"
        )
    if kind not in CONFIG_MAPPING:
        raise ModelBuildError(
            f"{source} is of type {kind!r}, which transformers {transformers.__version__} does not know; "
            "install a version that does, or write a function that returns (model, args) and "
            "give package.module:function"
        )
    # The weights that are trained are those of the setting's dtype, however the published ones are packed.
    keys = {key: value for key, value in data.items() if key != "quantization_config"}
    try:
        with quiet():
            config = CONFIG_MAPPING[kind].from_dict(keys)
    except Exception as error:
        raise ModelBuildError(f"transformers refuses the config of {source}: {one_line(error)}; correct it") from None
    if depth is not None:
        _set_depth(config, depth, source)
    return config


def _set_depth(config: Any, depth: int, source: str) -> None:
    text = config.get_text_config()
    own = getattr(text, "num_hidden_layers", None)  # every family's own name for it is mapped to this one
    if not isinstance(own, int):
        raise ModelBuildError(f"the config of {source} has no number of blocks that could be set; leave --depth out")
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = [kinds[n % len(kinds)] for n in range(depth)]
    text.num_hidden_layers = depth


def needs_transformers(error: ImportError) -> ModelBuildError:
    return ModelBuildError(
        f"this MODEL needs transformers and gguf, and {error.name} is missing: pip install 'transformers>=5' gguf"
    )


def one_line(error: BaseException) -> str:
    """The text of an exception in one line, led by its type."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
