"""What is known of models of `transformers`: they are recognised by what they have, and never by the name of a family.

Nothing is imported: a model of another kind is asked for attributes that it lacks, and is none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from autorev.workload import Call

CHECKPOINTING_METHODS = ("gradient_checkpointing_enable", "activation_checkpointing_enable")
"""What switches checkpointing on; the first is to go in its version 6."""


def is_transformers(model: Any) -> bool:
    """Is it a model of `transformers`, or one that an adapter wraps, so that a call of it follows from its config?"""
    try:
        return hasattr(model.config, "get_text_config") and isinstance(model.main_input_name, str)
    except Exception:  # nothing of that name, or a property of the user's own that raises
        return False


# -- layers


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits; None where there is none, or `model` is of another kind."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head if isinstance(head, nn.Module) else None


def known_tokens(model: nn.Module) -> int:
    """How many tokens the model has an embedding of."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]  # its method


def transposed_linear(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of GPT-2's linear layer, whose weight lies the other way round; None for any other."""
    weight = module._parameters.get("weight")
    if hasattr(module, "nf") and hasattr(module, "nx") and weight is not None and weight.dim() == 2:
        return int(weight.shape[0]), int(weight.shape[1])
    return None


def decoder_inputs(model: nn.Module, labels: Any) -> Any | None:
    """What an encoder-decoder model makes its decoder read when it is given `labels`; None for any other model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    return getattr(model, "prepare_decoder_input_ids_from_labels", lambda labels: labels)(labels)


# -- key-value caches


def is_cache(value: Any) -> bool:
    """Is it a key-value cache?"""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def is_asked_for(cache: Any, call: Call) -> bool:
    """Is the cache among the arguments of `call`, or does it ask for one?"""
    args, kwargs = call
    return kwargs.get("use_cache") is True or any(value is cache for value in (*args, *kwargs.values()))


def without_cache(model: nn.Module, call: Call) -> Call:
    """`call` as in training, which fills no key-value cache; one that was asked for is left.

    A model makes one by default, and a block that is run a second time would append to it again.
    """
    args, kwargs = call
    makes_one = getattr(getattr(model, "config", None), "use_cache", None) is True and hasattr(model, "main_input_name")
    return (args, {**kwargs, "use_cache": False}) if makes_one and "use_cache" not in kwargs else call


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """A model fills a key-value cache by default, in training too, where nobody reads it.

    Switched off in copies of the configs, as a model that was copied or built may still share its config with another.
    """
    named = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    filling = {key: config for key, config in named.items() if getattr(config, "use_cache", None) is True}
    copies = dict(zip(filling, copy.deepcopy(list(filling.values())), strict=True))
    for config in copies.values():
        config.use_cache = False
    with ExitStack() as stack:
        for module in model.modules():
            attributes = vars(module)
            held = {name: copies[id(value)] for name, value in attributes.items() if id(value) in copies}
            if id(getattr(module, "config", None)) in copies:  # it may be the class that has it
                held["config"] = copies[id(module.config)]
            stack.callback(_set, attributes, {name: attributes.get(name, _nothing) for name in held})
            _set(attributes, held)
        yield


_nothing = object()


def _set(attributes: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is _nothing:
            del attributes[name]
        else:
            attributes[name] = value


# -- checkpointing and the config


def is_checkpointed(module: nn.Module) -> bool:
    """Is checkpointing switched on in this very module?"""
    return getattr(module, "gradient_checkpointing", False) is True


def stop_checkpointing(module: nn.Module) -> None:
    """Switch it off there."""
    module.gradient_checkpointing = False  # type: ignore[assignment]  # its flag


def saved_config(model: nn.Module) -> Any | None:
    """The config that `save_pretrained` writes beside the weights; None where the model has none."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "to_dict") else None
