"""`autorev evaluate`: how good a model is, and how far it is from another."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from autorev.conversion.config_entry import KEY
from autorev.errors import SettingError, UnreadableError
from autorev.files import path_of, read_json
from autorev.finetuning.evaluate import evaluate, logits_of
from autorev.finetuning.record import Evaluation
from autorev.finetuning.setup import predicts_tokens
from autorev.finetuning.tasks import run_tasks
from autorev.finetuning.teacher import Teacher
from autorev.finetuning.trained import held_out, record_in, trained_model
from autorev.integrations.quirks import quiet_files
from autorev.models.load import load_model, tokenizer_of


@dataclass(frozen=True, slots=True)
class Examined:
    """The figures of one model."""

    model: str
    tokens: int
    evaluation: Evaluation
    text: str = ""
    """A digest of the tokens: figures of the same text can be compared."""
    original: str | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    """By task of lm_eval: its figures."""
    pretrained: bool = True
    """False: its weights are random."""
    original_pretrained: bool = True
    """Likewise of the original."""

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps({**asdict(self), "perplexity": self.evaluation.perplexity}, indent=1)

    def __str__(self) -> str:
        found = self.evaluation
        error = "" if found.standard_error is None else f" +- {found.standard_error:.4f}"
        name = self.model if self.pretrained else f"{self.model}, random weights"
        lines = [
            f"{name}, on {self.tokens:,} held-out tokens (digest {self.text})",
            f"  loss {found.loss:.4f}{error} nats a token, perplexity {found.perplexity:.2f}",
        ]
        if self.original is not None:
            random = "" if self.original_pretrained else " (random weights)"
            lines.append(
                f"  against {self.original}{random}: the same next token in {found.agreement:.1%}, "
                f"KL {found.divergence:.4f} nats"
            )
        for task, figures in self.tasks.items():
            lines.append(f"  {task}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        return "\n".join(lines)


def examine(
    model: str,
    *,
    original: str | None = None,
    text: Path | None = None,
    tasks: Sequence[str] = (),
    task_folder: Path | None = None,
    limit: int | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, float], None] = lambda what, fraction: None,
) -> Examined:
    """Evaluate `model` (a run's folder, a converted model's, or what the command line calls MODEL).

    Args:
        model: under the coupling that it was trained with, if any.
        original: a model to compare it with; the two read the same tokens.
        text: a text file or JSONL, of which a tenth is held out; default: what the run held out, which its export
            carries, too; or the language reference that CPython carries.
        tasks: of lm_eval.
        task_folder: more of its task files.
        limit: examples in each task.
        base: the model that a run's adapters belong to; default: the one that its record names.
        trust_remote_code: code that stands beside a config, or that it names, may run.
        progress: is told what is being done, and the fraction done.

    Raises:
        AutorevError: a model, the text or a task cannot be had.
    """
    folder = path_of(model)
    record = record_in(folder) if folder.is_dir() else None
    pretrained = original_pretrained = True
    with quiet_files():
        if record is not None or _was_converted(folder):
            net, tokenizer = trained_model(folder, record, base, trust_remote_code)
        elif base is not None:
            raise SettingError(f"{model} is no run with adapters, which `base` would be of; leave it out")
        else:
            loaded = load_model(model, torch.float32, 1, None, trust_remote_code=trust_remote_code)
            net, tokenizer = loaded.model, tokenizer_of(model, trust_remote_code)
            pretrained = loaded.pretrained
        if not predicts_tokens(net):
            raise SettingError(f"{model} is no causal language model; there is no next token to evaluate")
        rows, collator = held_out(folder, record, text, net, tokenizer)
        progress("loading the original", 0.1)
        theirs = None
        if original is not None:
            other = load_model(original, torch.float32, 1, None, trust_remote_code=trust_remote_code)
            theirs, original_pretrained = Teacher.within(other.model).logits, other.pretrained
        progress("evaluating", 0.2)
        found = evaluate(logits_of(net), rows, collator, 0, theirs)
        progress("running the tasks", 0.5)
        figures = run_tasks(net, tokenizer, tasks, task_folder, limit) if tasks else {}
    return Examined(model, rows.learned, found, rows.digest, original, figures, pretrained, original_pretrained)


def _was_converted(folder: Path) -> bool:
    try:
        config = read_json(folder / "config.json")
    except UnreadableError:
        return False
    return isinstance(config, dict) and KEY in config
