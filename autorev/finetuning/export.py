"""Train reversible, ship vanilla: the trained weights in the plain architecture, if they are the same model there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

import torch

from autorev.conversion import config_entry
from autorev.conversion.convert import revert
from autorev.errors import AutorevError, ExportError, SettingError, message_of
from autorev.finetuning.evaluate import evaluate, logits_of, vanilla_logits
from autorev.finetuning.packing import Collator, Rows
from autorev.finetuning.record import EXPORT_LIMIT, HELD_OUT
from autorev.finetuning.trained import held_out, record_in, trained_model, unquantised_model
from autorev.integrations.quirks import quiet_files
from autorev.lock import held
from autorev.models.load import load_model
from autorev.models.quantization import quantised_by

_SAME = 1e-3
"""Nats that the loss of the written folder may differ from the one that was measured before writing."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and the two losses on the held-out text, in nats a token."""

    folder: str
    loss: float
    """Under the coupling that it was trained with."""
    vanilla_loss: float
    tokens: int
    forced: bool
    with_text: bool = False
    """Does the folder hold the text that the run held out?"""

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        gap = self.vanilla_loss - self.loss
        text = f"\n  {HELD_OUT} holds those that the run held out, for autorev evaluate: delete it before you publish"
        return (
            f"{self.folder}: the plain architecture, which transformers loads without autorev\n"
            f"  loss {self.vanilla_loss:.4f} ({gap:+.4f}) on {self.tokens:,} held-out tokens, under the coupling "
            f"{self.loss:.4f}{text if self.with_text else ''}"
        )


def export(
    folder: Path,
    out: Path,
    *,
    text: Path | None = None,
    max_loss_increase: float = EXPORT_LIMIT,
    force: bool = False,
    base: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, float], None] = lambda what, fraction: None,
) -> Exported:
    """Write the model of a run, or one that was saved converted, to `out` as the plain architecture.

    Args:
        folder: where `autorev finetune` or `save_pretrained` left it.
        out: a folder that is not there yet.
        text: what the two are compared on; default: what the run held out.
        max_loss_increase: nats by which the plain architecture may be worse.
        force: write it all the same.
        base: the model that a run's adapters belong to; default: the one that its record names.
        trust_remote_code: code that stands beside a config, or that it names, may run.
        progress: is told what is being done, and the fraction done.

    Raises:
        ExportError: it would be another model, or the folder cannot be written; `out` is as it was.
        AutorevError: there is no such model.
    """
    with held(out.absolute().parent, f"{out.name}.export", str(out), "name another folder for `out`"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise SettingError(f"{out} is there already; name another folder for `out`")
        if isnan(max_loss_increase):
            raise SettingError("the loss may rise by a number of nats, not by nan")
        with quiet_files():
            record = record_in(folder)
            model, tokenizer = trained_model(folder, record, base, trust_remote_code)
            rows, collator = held_out(folder, record, text, model, tokenizer)
        progress("evaluating under the coupling", 0.2)
        loss = evaluate(logits_of(model), rows, collator, 0).loss
        progress("evaluating the plain architecture", 0.5)
        if quantised_by(model) and record is not None and record.recipe.lora_rank is not None:
            model = unquantised_model(folder, record, base, trust_remote_code)
        vanilla = evaluate(vanilla_logits(model), rows, collator, 0).loss
        if not vanilla - loss <= max_loss_increase and not force:  # NaN included
            raise ExportError(
                f"in the plain architecture the loss is {vanilla:.3f} instead of {loss:.3f}: more than "
                f"{max_loss_increase:g} higher, so it is another model there. Load it reversible, with "
                f"autorev.load({str(folder)!r}), fine-tune it at a smaller gamma, or export it with `force`"
            )
        revert(model)
        config_entry.remove(model)
        if hasattr(model, "merge_and_unload"):
            merge: Any = model.merge_and_unload
            model = merge()
        progress("writing", 0.7)
        with quiet_files():
            _write(model, tokenizer, out, rows, collator, vanilla, folder / HELD_OUT, trust_remote_code)
        forced = not vanilla - loss <= max_loss_increase
        return Exported(str(out), loss, vanilla, rows.learned, forced, (out / HELD_OUT).is_file())


def _write(
    model: Any,
    tokenizer: Any,
    out: Path,
    rows: Rows,
    collator: Collator,
    expected: float,
    held_out_by_run: Path,
    trusted: bool,
) -> None:
    """Into a folder beside `out` first; it takes its place once it was read back and computes the same."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        if held_out_by_run.is_file():
            shutil.copy(held_out_by_run, part)
        again = load_model(str(part), torch.float32, 1, None, trust_remote_code=trusted).model
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
        why = message_of(error)
        raise ExportError(f"{out} could not be written ({why}); free some space, or name another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
