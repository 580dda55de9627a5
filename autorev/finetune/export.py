"""Train reversible, ship vanilla: the trained weights in the plain architecture, if they are the same model there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autorev.capture.transformers_quirks import quiet
from autorev.errors import AutorevError, ExportError, SettingError
from autorev.finetune.evaluate import evaluate, logits_of
from autorev.finetune.packing import Collator, Rows
from autorev.finetune.record import FineTuning
from autorev.finetune.run import RECORD
from autorev.finetune.session import HELD_OUT, vanilla_logits
from autorev.finetune.setup import read_texts
from autorev.models.load import load_model, tokenizer_of
from autorev.rewrite.convert import convert, revert
from autorev.rewrite.recouple import recouple
from autorev.rewrite.remember import forget, load
from autorev.variants import coupling_options

_SAME = 1e-3
"""Nats that the loss of the written folder may differ from the one that was measured before writing."""
_SEQUENCE, _ROWS = 256, 16
"""Of the text that a model without a run is compared on."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and the two losses on the held-out text, in nats a token."""

    folder: str
    loss: float
    """Under the coupling that it was trained with."""
    vanilla_loss: float
    tokens: int
    forced: bool

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        gap = self.vanilla_loss - self.loss
        return (
            f"{self.folder}: the plain architecture, which transformers loads without autorev\n"
            f"  loss {self.vanilla_loss:.4f} ({gap:+.4f}) on {self.tokens:,} held-out tokens, under the coupling "
            f"{self.loss:.4f}"
        )


def export(
    folder: Path,
    out: Path,
    *,
    text: Path | None = None,
    max_loss_increase: float = 0.05,
    force: bool = False,
    progress: Callable[[str, float], None] = lambda what, fraction: None,
) -> Exported:
    """Write the model of a run, or one that was saved converted, to `out` as the plain architecture.

    Args:
        folder: where `autorev finetune` or `save_pretrained` left it.
        out: a folder that is not there yet.
        text: what the two are compared on; default: what the run held out.
        max_loss_increase: nats by which the plain architecture may be worse.
        force: write it all the same.
        progress: is told what is being done, and the fraction done.

    Raises:
        ExportError: it would be another model, or the folder cannot be written; `out` is as it was.
        AutorevError: there is no such model.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"{out} is there already; name another folder for --out")
    record = _record(folder)
    model, tokenizer = _trained(folder, record)
    rows, collator = _rows(folder, record, text, model, tokenizer)
    progress("evaluating under the coupling", 0.2)
    loss = evaluate(logits_of(model), rows, collator, 0).loss
    progress("evaluating the plain architecture", 0.5)
    vanilla = evaluate(vanilla_logits(model), rows, collator, 0).loss
    if not vanilla - loss <= max_loss_increase and not force:  # NaN included
        raise ExportError(
            f"in the plain architecture the loss is {vanilla:.3f} instead of {loss:.3f}: more than "
            f"{max_loss_increase:g} higher, so it is another model there. Load it reversible, with "
            f"autorev.load({str(folder)!r}), fine-tune it at a smaller gamma, or export it with --force"
        )
    revert(model)
    forget(model)
    if hasattr(model, "merge_and_unload"):
        merge: Any = model.merge_and_unload
        model = merge()
    progress("writing", 0.7)
    with quiet():
        _write(model, tokenizer, out, rows, collator, vanilla)
    return Exported(str(out), loss, vanilla, rows.learned, vanilla - loss > max_loss_increase)


def _record(folder: Path) -> FineTuning | None:
    if not folder.is_dir():
        raise SettingError(f"{folder} is no folder; give the one that autorev finetune wrote")
    path = folder / RECORD
    if not path.is_file():
        return None
    record = FineTuning.read(path)
    if not record.complete:
        raise SettingError(f"the run in {folder} is not complete; finish it with --resume, then export it")
    return record


def _trained(folder: Path, record: FineTuning | None) -> tuple[nn.Module, Any]:
    """The model as it was trained, and its tokenizer."""
    tokenizer = tokenizer_of(str(folder))
    if record is None or (record.chains and record.recipe.lora_rank is None):
        return load(folder), tokenizer
    if record.recipe.lora_rank is None:
        return load_model(str(folder), torch.float32, 1, None).model, tokenizer
    loaded = load_model(record.model.source, torch.float32, 1, None)
    if record.chains:
        grids = {c.name: c.fraction_bits for c in record.chains if c.fraction_bits is not None}
        args, kwargs = loaded.call
        convert(
            loaded.model,
            **coupling_options(record.variant),
            fraction_bits=grids or None,
            example_args=args,
            example_kwargs=kwargs,
        )
        if record.recipe.schedule or record.calibration is not None:
            _recoupled(loaded.model, record)
    from peft import PeftModel

    model: nn.Module = PeftModel.from_pretrained(loaded.model, folder)
    return model, tokenizer


def _recoupled(model: nn.Module, record: FineTuning) -> None:
    from autorev.rewrite.convert import chains_of

    states = {state.name: state for state in record.chains}
    gamma = {p: g for chain in chains_of(model) for p, g in zip(chain.paths, states[chain.name].gamma, strict=True)}
    recouple(model, gamma=gamma)


def _rows(
    folder: Path, record: FineTuning | None, text: Path | None, model: nn.Module, tokenizer: Any
) -> tuple[Rows, Collator]:
    held = folder / HELD_OUT
    if text is None and held.is_file():
        rows = Rows.from_json(held.read_text(encoding="utf-8"))
        return rows, Collator(rows.packed, rows.length, 0)
    if tokenizer is None:
        raise SettingError(f"{folder} has no tokenizer, and without one nothing can be compared; save it there, too")
    sequence = record.recipe.sequence if record else _SEQUENCE
    texts = read_texts(model, tokenizer, text, None, sequence, _ROWS, packed=True)
    return texts.validation, texts.collator


def _write(model: Any, tokenizer: Any, out: Path, rows: Rows, collator: Collator, expected: float) -> None:
    """Into a folder beside `out` first; it takes its place once it was read back and computes the same."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        again = load_model(str(part), torch.float32, 1, None).model
        found = evaluate(logits_of(again), rows, collator, 0).loss
        if not abs(found - expected) <= _SAME:
            raise ExportError(
                f"what was written has a loss of {found:.4f}, not {expected:.4f}; please report the model"
            )
        if out.is_dir():
            out.rmdir()
        part.rename(out)
    except AutorevError:
        raise
    except Exception as error:  # safetensors and the system each have their own for a full disk
        why = " ".join(str(error).split())
        raise ExportError(f"{out} could not be written ({why}); free some space, or name another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
