"""A model that was trained reversibly, back from its folder: of a run, or as `save_pretrained` left it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autorev.conversion.convert import chains_of, convert
from autorev.conversion.load import load
from autorev.conversion.recouple import recouple
from autorev.errors import (
    DamagedError,
    DataError,
    ExportError,
    ModelBuildError,
    ModelNotFoundError,
    SettingError,
    UnreadableError,
    one_line,
)
from autorev.files import read_bytes
from autorev.finetuning.packing import Collator, Rows
from autorev.finetuning.record import FILE, HELD_OUT, FineTuning
from autorev.finetuning.setup import longest_sequence, read_texts
from autorev.intact import FILE as MARK
from autorev.intact import check_intact, read_mark
from autorev.integrations.peft import load_adapters, merged
from autorev.integrations.quirks import quiet_files
from autorev.integrations.transformers import known_tokens
from autorev.models.fingerprint import fingerprint
from autorev.models.load import load_model, tokenizer_of
from autorev.models.quantization import bitsandbytes_config, quantised_by
from autorev.models.resolve import recorded_model
from autorev.models.trust import check_adapter_code
from autorev.models.weights import check_adapters

_SEQUENCE, _ROWS = 256, 16
"""Of the text that a model without a run is compared on."""
_SHOWN = 12
"""Digits of a digest."""
_log = logging.getLogger("autorev")


def record_in(folder: Path) -> FineTuning | None:
    """The record of a complete run; None for a folder without one.

    Raises:
        SettingError: it is no folder, or the run is not complete.
        DamagedError: what the folder holds is not what was written there.
    """
    if not folder.is_dir():
        raise SettingError(f"{folder} is no folder; give the one that autorev finetune wrote")
    path = folder / FILE
    if not path.is_file():
        _without_record(folder)
        return None
    record = FineTuning.read(path)
    if not record.complete:
        raise SettingError(f"the run in {folder} is not complete; finish it with `resume`, then export it")
    if not record.run:
        _log.warning("%s is of an earlier autorev, which kept no digests: whether it was damaged is not known", folder)
        return record
    mark = read_mark(folder)
    if mark is None:
        raise DamagedError(
            f"{folder / MARK}, which says what the trained model is, is missing; copy the whole folder once more"
        )
    if (mark.run, mark.step) != (record.run, record.recipe.steps):
        raise DamagedError(
            f"the model in {folder} is not the one that its run left there: {folder / MARK} is of another run or step; "
            "copy the whole folder once more"
        )
    check_intact(folder)
    return record


def _without_record(folder: Path) -> None:
    """A checkpoint, a part of a run's folder, or no run's at all: what its files say of themselves.

    Raises:
        DamagedError: they are not what was written, or adapters that belong to a model which only a record names.
    """
    check_intact(folder)
    mark = read_mark(folder)
    if mark is None:
        return
    if (folder / "adapter_config.json").is_file():
        raise DamagedError(
            f"{folder / FILE}, which says what model these adapters belong to, is missing; copy the whole folder once "
            "more, or, if they are a checkpoint's, finish its run with `resume`"
        )
    _log.warning(
        "%s has no %s: it is taken for the model of a run after step %d; whether that was its last step, and on what "
        "it was trained, is not known",
        folder,
        FILE,
        mark.step,
    )


def trained_model(
    folder: Path, record: FineTuning | None, base: str | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """The model as it was trained, in float32, and its tokenizer.

    Args:
        folder: of the run, or of a converted model.
        record: of the run.
        base: the model that its adapters belong to; None: the one that the record names, which is no code.
        trust_remote_code: code that stands beside a config, or that it names, may run.

    Raises:
        AutorevError: the folder holds none.
    """
    if base is not None and (record is None or record.recipe.lora_rank is None):
        raise SettingError(f"{folder} holds a whole model, and no adapters that belong to another; leave `base` out")
    tokenizer = tokenizer_of(str(folder), trust_remote_code)
    if record is None or (record.chains and record.recipe.lora_rank is None):
        return load(folder, trust_remote_code=trust_remote_code), tokenizer
    if record.recipe.lora_rank is None:
        whole = load_model(str(folder), torch.float32, 1, None, trust_remote_code=trust_remote_code)
        return whole.model, tokenizer
    source = base or recorded_model(record.model.source, folder / FILE, "`base`")
    try:
        quantization = bitsandbytes_config(record.recipe.quantize, record.recipe.dtype == "bf16")
        loaded = load_model(
            source, torch.float32, 1, None, trust_remote_code=trust_remote_code, quantization=quantization
        )
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"the adapters in {folder} belong to the model {source}, which cannot be found from here (`base` "
            f"says where it is): {error}"
        ) from None
    found = fingerprint(source)
    if record.base and found != record.base:
        raise DamagedError(
            f"the adapters in {folder} were trained on other weights than those of {source} "
            f"(digest {record.base[:_SHOWN]}, here {found[:_SHOWN]}), and do not fit them; give the model that they "
            "were trained on by `base`"
        )
    if record.chains:
        grids = {c.name: c.fraction_bits for c in record.chains if c.fraction_bits is not None}
        convert(loaded.model, loaded.call, method=replace(record.method, loss="full", fraction_bits=grids or None))
        if record.recipe.schedule or record.calibration is not None:
            _recoupled(loaded.model, record)
    return _with_adapters(loaded.model, folder), tokenizer


def unquantised_model(
    folder: Path, record: FineTuning, base: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The plain model of adapters that were trained beside quantised weights: merged into unquantised ones, as merged
    into quantised ones they would be rounded away. Those are the weights that were quantised when they were loaded; of
    weights that were saved quantised, what they are unpacked to.

    Raises:
        ExportError: the library that quantised them does not unpack them.
    """
    source = base or recorded_model(record.model.source, folder / FILE, "`base`")
    model: Any = load_model(source, torch.float32, 1, None, trust_remote_code=trust_remote_code).model
    if title := quantised_by(model):
        try:
            with quiet_files():
                model = _unpacked(model)
        except Exception as error:  # each library has its own
            raise ExportError(
                f"the adapters in {folder} belong to weights quantised by {title}, which transformers cannot unpack "
                f"({one_line(error)}), and merged into them they would be rounded away; load {source}, and the "
                "adapters by peft.PeftModel.from_pretrained"
            ) from error
    return merged(_with_adapters(model, folder))


def _unpacked(model: Any) -> Any:
    """A model of the same weights, unpacked, which `transformers` saves: what it unpacks in place it does not."""
    model = model.dequantize(dtype=torch.float32)
    config, weights = model.config, model.state_dict()
    config.__dict__.pop("quantization_config", None)
    return type(model).from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)


def _with_adapters(base: nn.Module, folder: Path) -> nn.Module:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():  # PEFT would look for it on the hub
            raise ModelNotFoundError(f"{folder} holds no adapters ({name} is missing); train them once more")
    check_adapter_code(folder)
    try:
        model = load_adapters(base, folder)
    except Exception as error:  # safetensors and PEFT each have errors of their own
        raise ModelBuildError(f"PEFT cannot load the adapters in {folder}: {one_line(error)}") from error
    check_adapters(model, folder)
    return model


def _recoupled(model: nn.Module, record: FineTuning) -> None:
    states = {state.name: state for state in record.chains}
    gamma = {p: g for chain in chains_of(model) for p, g in zip(chain.paths, states[chain.name].gamma, strict=True)}
    recouple(model, gamma=gamma)


def held_out(
    folder: Path, record: FineTuning | None, text: Path | None, model: nn.Module, tokenizer: Any
) -> tuple[Rows, Collator]:
    """What it is evaluated on: the rows of its run, unless a text is given; then as many rows of it, and as long.

    Raises:
        AutorevError: there is no text, or no tokenizer to read it.
    """
    path = folder / HELD_OUT
    try:
        held = Rows.from_json(read_bytes(path).decode()) if path.is_file() else None
    except (UnreadableError, UnicodeDecodeError, DataError):
        if text is None:
            raise DataError(f"{path}, the text that the run held out, is damaged; give another one by `text`") from None
        held = None
    if text is None and held is not None:
        known = known_tokens(model)
        largest = max(token for row in held.rows for example in row for token in example.ids)
        if largest >= known:
            raise DataError(
                f"{path} holds token {largest}, and {type(model).__name__} has embeddings of {known} tokens: they do "
                "not belong together; give another text by `text`"
            )
        return held, Collator(held.packed, held.length, 0)
    if tokenizer is None:
        raise SettingError(f"{folder} has no tokenizer, and without one nothing can be compared; save it there, too")
    if held is not None:
        length, count, packed = held.length, len(held), held.packed
    else:
        own = record.recipe.sequence if record else min(_SEQUENCE, longest_sequence(model) or _SEQUENCE)
        length, count, packed = own, _ROWS, True
    texts = read_texts(model, tokenizer, text, None, length, count, packed)
    return texts.validation, texts.collator
