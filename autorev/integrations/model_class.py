"""Which class of `transformers` trains a config."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from autorev.errors import ModelBuildError, one_line
from autorev.integrations.pictures import mixes_in_tokens

# Searched in this order: a CLIP is trained on pairs and a BERT to fill gaps, though the one is also an image
# classifier and the other also a causal model. `MODEL_MAPPING_NAMES` holds the headless classes.
_TASKS = (
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)

_OWN = (
    *("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForImageClassification"),
    *("AutoModelForSequenceClassification", "AutoModel"),
)
"""What a config's own code is searched for, in this order."""


def model_class(config: Any, code_from: str | None = None) -> type[Any]:
    """The class to build for `config`: the one it names, else its type's usual class with a training loss.

    `code_from`: the folder or hub id whose own code may run, where the config names some; None: none may.

    Raises:
        ModelBuildError: this `transformers` has no model of the config's type, or its own code has none.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    if code_from is not None and isinstance(getattr(config, "auto_map", None), dict):
        return _own_class(config.auto_map, code_from)
    named = list(getattr(config, "architectures", None) or [])
    first = ["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"] if getattr(config, "is_decoder", False) else []
    tasks = [*first, *(["MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"] if mixes_in_tokens(config) else []), *_TASKS]
    for task in tasks:
        classes = getattr(modeling_auto, task, {}).get(config.model_type, ())
        named += [classes] if isinstance(classes, str) else list(classes)
    for name in named:
        found = getattr(transformers, name, None)
        if not (isinstance(found, type) and hasattr(found, "main_input_name")):
            continue
        if isinstance(config, getattr(found, "config_class", None) or object):  # else it is of a part of the model
            return found
    if (found := _beside(config)) is not None:
        return found
    raise ModelBuildError(
        f"transformers {transformers.__version__} has no model of type {config.model_type!r}; "
        "install a version that has it, or write a function that builds it and give package.module:function"
    )


def _own_class(auto_map: dict[str, str], code_from: str) -> type[Any]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = next((name for name in _OWN if name in auto_map), None)
    if name is None:
        raise ModelBuildError(f"{code_from} brings code of its own and no model in it ({', '.join(auto_map)})")
    try:
        found: type[Any] = get_class_from_dynamic_module(auto_map[name], code_from)
    except Exception as error:  # code of others
        raise ModelBuildError(f"the code of {code_from} cannot be imported: {one_line(error)}") from error
    return found


def _beside(config: Any) -> type[Any] | None:
    """The class made for just this config in the module that stands beside its own, where no task lists one: a model
    for depth, or a tower by itself. One that has a loss comes first."""
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    if not module.startswith("transformers.models."):
        return None
    try:
        beside = vars(importlib.import_module(module))
    except ImportError:
        return None
    made_for_it: list[type[Any]] = [
        found
        for name, found in beside.items()
        if isinstance(found, type)
        and getattr(found, "config_class", None) is type(config)
        and found.__module__ == module
        and not name.endswith("PreTrainedModel")
    ]
    return min(made_for_it, key=lambda found: "labels" not in inspect.signature(found.forward).parameters, default=None)
