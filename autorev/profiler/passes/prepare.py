"""From a job to a model that is ready to train: loaded, frozen or with adapters, on its device, with a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from autorev.capture.quantised import linear_sizes
from autorev.detection import detect_in
from autorev.errors import SettingError
from autorev.in_place import Blocks
from autorev.integrations.peft import inject, lora_config
from autorev.models.load import load_model
from autorev.prediction.training import DTYPES, choose_trained
from autorev.profiler.job import Source
from autorev.setting import Setting
from autorev.workload import Call

TEXTS = 4
"""Stretches of the text on which losses are compared."""
TEXT_TOKENS = 256

Example = Callable[[int, int | None], Call]
"""A call of a batch size and a sequence length."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model in training mode, a call of it, its blocks, and stretches of text [1, tokens] for its loss."""

    model: nn.Module
    call: Call
    example: Example | None
    """Makes calls of other sizes; None for a model and batch at hand."""
    blocks: Blocks
    texts: list[torch.Tensor]


def prepare_model(
    source: Source, setting: Setting, blocks: Blocks | None, live: tuple[nn.Module, Call] | None = None
) -> Prepared:
    """The model of `source` (or `live`, at hand) as `setting` trains it; its blocks are looked for unless given.

    Raises:
        AutorevError: it cannot be loaded, or not be trained that way.
    """
    torch.set_num_threads(source.threads)
    torch.manual_seed(0)
    example: Example | None = None
    if live is not None:
        model, call = live
    elif source.pickled is not None:
        model, args, kwargs = torch.load(source.pickled, weights_only=False)
        call = (args, kwargs)
    else:
        dtype = DTYPES[setting.dtype]
        size = setting.batch, setting.sequence
        loaded = load_model(source.model, dtype, *size, source.depth, source.trust_remote_code)
        model, example = loaded.model, loaded.example
        call = example(setting.batch, setting.sequence)
    if blocks is None:
        blocks = find_blocks(model, call)
    if setting.trains == "lora":
        _add_adapters(model, blocks, setting)
        blocks = replace(blocks, draws_random=blocks.draws_random or setting.lora_dropout > 0)
    else:
        choose_trained(model, [model.get_submodule(path) for path in blocks.paths], setting)
    texts: list[torch.Tensor] = []
    if source.tokens is not None:
        tokens = torch.load(source.tokens)
        call = with_text(call, tokens, setting.batch, setting.sequence or 1)
        texts = _stretches(tokens, min(TEXT_TOKENS, setting.sequence or TEXT_TOKENS))
    model = model.to(source.on).train()
    moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to(source.on), (call, texts))
    return Prepared(model, moved[0], example, blocks, moved[1])


def with_text(call: Call, tokens: torch.Tensor, batch: int, sequence: int) -> Call:
    """`call` on the first tokens of the text, and the labels that go with them; repeated where the text is short."""
    needed = batch * sequence
    ids = tokens.repeat(-(-needed // tokens.numel()))[:needed].view(batch, sequence).clone()  # without the rest
    return on_tokens(call, ids)


def on_tokens(call: Call, ids: torch.Tensor) -> Call:
    """`call` on these tokens [batch, tokens], which are its labels, too; a picture in front of its own stays there."""
    args, kwargs = call
    picture = kwargs["input_ids"].shape[1] - ids.shape[1] if "pixel_values" in kwargs else 0
    if picture > 0:
        labels = torch.cat([kwargs["labels"][:, :picture], ids], dim=1)
        return args, {
            **kwargs,
            "input_ids": torch.cat([kwargs["input_ids"][:, :picture], ids], dim=1),
            "labels": labels,
        }
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in kwargs else {}
    return args, {**kwargs, "input_ids": ids, "labels": ids, **decoder}


def find_blocks(model: nn.Module, call: Call) -> Blocks:
    """The residual blocks of a live model, in calling order."""

    detection, _ = detect_in(model, *call)
    found = [*(f for chain in detection.chains for f in chain), *detection.refused]
    chains, refused = detection.public()
    random = any(block.draws_random for chain in chains for block in chain.blocks)
    random = random or any(block.draws_random for block in refused)
    return Blocks(
        in_order(model, [f.path for f in found if not f.inline]),
        inline=any(f.inline for f in found),
        draws_random=random,
    )


def in_order(model: nn.Module, paths: list[str]) -> tuple[str, ...]:
    """`paths`, each once, in the order of the model's modules."""
    return tuple(path for path, _ in model.named_modules() if path in set(paths))


def _add_adapters(model: nn.Module, blocks: Blocks, setting: Setting) -> None:
    """PEFT's LoRA beside every linear layer of the blocks; everything else is frozen."""
    rank = setting.lora_rank or 16
    inject(model, lora_config(linear_layers(model, blocks), rank, lora_dropout=setting.lora_dropout))
    for parameter in model.parameters() if setting.adapter_dtype else ():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[setting.adapter_dtype or ""])


def linear_layers(model: nn.Module, blocks: Blocks) -> list[str]:
    """The names of the linear layers of the blocks, to put adapters beside.

    Raises:
        SettingError: there is none.
    """
    found = [
        f"{path}.{name}"
        for path in blocks.paths
        for name, module in model.get_submodule(path).named_modules()
        if linear_sizes(module) is not None
    ]
    if not found:
        raise SettingError("LoRA needs linear layers inside the blocks, and this model has none there")
    return found


def _stretches(tokens: torch.Tensor, length: int) -> list[torch.Tensor]:
    """`TEXTS` stretches spread over the whole text, each [1, length]."""
    if tokens.numel() <= length:
        return [tokens.view(1, -1)]
    starts = [n * (tokens.numel() - length) // TEXTS for n in range(TEXTS)]
    return [tokens[start : start + length].view(1, -1) for start in dict.fromkeys(starts)]
