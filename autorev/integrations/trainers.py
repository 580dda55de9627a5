"""What is known of `transformers.Trainer` and the trainers of trl: which references they hold, and what they compute
elsewhere.

Nothing is imported: whoever has made a trainer has imported it.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from torch import nn

from autorev.integrations.peft import base_model, has_adapters

_REFERENCE = re.compile(r"_?ref(erence)?(_|$)")
"""What trainers call the attribute: ref_model, reference_model, ref_policy, ..."""
_PRECOMPUTED = re.compile(r"ref(erence)?_.*log_?p")
"""What they call the columns of a data set that hold the reference's log-probabilities."""
_SERVERS = re.compile(r"use_(vllm|sglang)$")
_WITHIN = ("module", "_orig_mod", "_fsdp_wrapped_module")
"""Where DDP, DeepSpeed, torch.compile and FSDP keep the model."""


def is_trainer(owner: Any) -> bool:
    """Is it a `transformers.Trainer`?"""
    module = sys.modules.get("transformers.trainer")
    return module is not None and isinstance(owner, module.Trainer)


def is_reference(name: str) -> bool:
    """Is that what trainers call a reference model?"""
    return _REFERENCE.match(name) is not None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself within what wraps it for training: compiled, spread over processes, with adapters."""
    while True:
        inner = next((m for name in _WITHIN if isinstance(m := model._modules.get(name), nn.Module)), None)
        if inner is None and has_adapters(model):
            inner = base_model(model)
        if inner is None or inner is model:
            return model
        model = inner


def compares(trainer: Any) -> bool:
    """Does its loss compare the policy with a reference?"""
    return any(map(is_reference, vars(trainer))) and getattr(trainer, "beta", None) != 0


def servers_of(trainer: Any) -> list[str]:
    """Other programs that make samples of the same weights: vllm, sglang."""
    on = [name for name, value in vars(trainer.args).items() if _SERVERS.match(name) and value is True]
    return [name.removeprefix("use_") for name in on]


def precomputed_columns(trainer: Any) -> list[str]:
    """Columns of its data set with log-probabilities of the reference, before training has begun; else none."""
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    return [] if trainer.state.global_step else [name for name in columns if _PRECOMPUTED.match(name)]


def reference_log_probs(trainer: Any, most_rows: int) -> list[list[float]]:
    """Of the data set's first rows, in a batch like the one that they were computed in: it rounds the same.

    Raises:
        Exception: whatever another version of trl raises.
    """
    args = trainer.args
    count = min(getattr(args, "precompute_ref_batch_size", None) or args.per_device_train_batch_size, most_rows)
    rows = [trainer.train_dataset[n] for n in range(min(count, len(trainer.train_dataset)))]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad():
        return [[] if v is None else v.tolist() for v in trainer.compute_ref_log_probs(reference_of(trainer), batch)]


def reference_of(trainer: Any) -> nn.Module:
    """The model whose log-probabilities they are."""
    model: nn.Module = getattr(trainer, "ref_model", None) or trainer.model
    return model
