"""A model that was trained reversibly, back from its folder: of a run, or as `save_pretrained` left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from autorev.errors import DataError, ModelBuildError, ModelNotFoundError, SettingError
from autorev.finetuning.packing import Collator, Rows
from autorev.finetuning.record import FILE, FineTuning
from autorev.finetuning.session import HELD_OUT
from autorev.finetuning.setup import longest_sequence, read_texts
from autorev.models.from_config import one_line
from autorev.models.load import load_model, tokenizer_of
from autorev.models.weights import check_adapters
from autorev.rewrite.convert import chains_of, convert
from autorev.rewrite.recouple import recouple
from autorev.rewrite.remember import load
from autorev.variants import coupling_options

_SEQUENCE, _ROWS = 256, 16
"""Of the text that a model without a run is compared on."""


def record_in(folder: Path) -> FineTuning | None:
    """The record of a complete run; None for a folder without one.

    Raises:
        SettingError: it is no folder, or the run is not complete.
    """
    if not folder.is_dir():
        raise SettingError(f"{folder} is no folder; give the one that autorev finetune wrote")
    path = folder / FILE
    if not path.is_file():
        return None
    record = FineTuning.read(path)
    if not record.complete:
        raise SettingError(f"the run in {folder} is not complete; finish it with --resume, then export it")
    return record


def trained_model(folder: Path, record: FineTuning | None) -> tuple[nn.Module, Any]:
    """The model as it was trained, in float32, and its tokenizer.

    Raises:
        AutorevError: the folder holds none.
    """
    tokenizer = tokenizer_of(str(folder))
    if record is None or (record.chains and record.recipe.lora_rank is None):
        return load(folder), tokenizer
    if record.recipe.lora_rank is None:
        return load_model(str(folder), torch.float32, 1, None).model, tokenizer
    try:
        loaded = load_model(record.model.source, torch.float32, 1, None)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"the adapters in {folder} belong to the model {record.model.source}, which cannot be found from here: "
            f"{error}"
        ) from None
    if record.chains:
        grids = {c.name: c.fraction_bits for c in record.chains if c.fraction_bits is not None}
        args, kwargs = loaded.call
        how = {**coupling_options(record.variant), "fraction_bits": grids or None}
        convert(loaded.model, example_args=args, example_kwargs=kwargs, **how)
        if record.recipe.schedule or record.calibration is not None:
            _recoupled(loaded.model, record)
    from peft import PeftModel

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():  # PEFT would look for it on the hub
            raise ModelNotFoundError(f"{folder} holds no adapters ({name} is missing); train them once more")
    try:
        model: nn.Module = PeftModel.from_pretrained(loaded.model, str(folder))
    except Exception as error:  # safetensors and PEFT each have errors of their own
        raise ModelBuildError(f"PEFT cannot load the adapters in {folder}: {one_line(error)}") from error
    check_adapters(model, folder)
    return model, tokenizer


def _recoupled(model: nn.Module, record: FineTuning) -> None:
    states = {state.name: state for state in record.chains}
    gamma = {p: g for chain in chains_of(model) for p, g in zip(chain.paths, states[chain.name].gamma, strict=True)}
    recouple(model, gamma=gamma)


def held_out(
    folder: Path, record: FineTuning | None, text: Path | None, model: nn.Module, tokenizer: Any
) -> tuple[Rows, Collator]:
    """What it is evaluated on: the rows of its run, unless a text is given.

    Raises:
        AutorevError: there is no text, or no tokenizer to read it.
    """
    held = folder / HELD_OUT
    if text is None and held.is_file():
        try:
            rows = Rows.from_json(held.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{held}, the text that the run held out, is damaged; give another one by --text") from None
        return rows, Collator(rows.packed, rows.length, 0)
    if tokenizer is None:
        raise SettingError(f"{folder} has no tokenizer, and without one nothing can be compared; save it there, too")
    sequence = record.recipe.sequence if record else min(_SEQUENCE, longest_sequence(model) or _SEQUENCE)
    texts = read_texts(model, tokenizer, text, None, sequence, _ROWS, packed=True)
    return texts.validation, texts.collator
