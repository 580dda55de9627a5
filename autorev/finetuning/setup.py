"""From the request to everything that a run needs: the model, its tokenizer, the rows, and what they are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autorev.analysis import ModelInfo
from autorev.capture.quantised import parameters_of
from autorev.errors import SettingError
from autorev.finetuning.data import read_documents, split, tokenize
from autorev.finetuning.evaluate import logits_of
from autorev.finetuning.packing import Collator, Rows, keeps_apart, make_rows
from autorev.finetuning.record import Corpus
from autorev.in_place import Blocks
from autorev.integrations.peft import lora_config
from autorev.integrations.transformers import known_tokens, output_head
from autorev.models.fingerprint import fingerprint
from autorev.models.load import Loaded, load_model, tokenizer_of
from autorev.models.quantization import quantised_by
from autorev.models.resolve import EMBEDDED
from autorev.profiler.passes.prepare import find_blocks, linear_layers, on_tokens
from autorev.workload import Call

_LOOKED_AT = 4
"""Tokens of the text that shows whether a model is causal."""


@dataclass(frozen=True, eq=False)
class Texts:
    """The corpus as rows."""

    training: Rows
    validation: Rows
    collator: Collator
    corpus: Corpus
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Setup:
    """A loaded model, not converted yet, and its texts."""

    model: nn.Module
    tokenizer: Any
    info: ModelInfo
    pretrained: bool
    texts: Texts
    call: Call
    """An example: a row of the training text."""
    blocks: Blocks
    base: str
    """A digest of the weights in their files; empty where they are random."""
    trust_remote_code: bool
    """May code run that stands beside the model's config?"""
    quantised: str
    """How the weights are quantised, in words; empty where they are not."""

    @property
    def notes(self) -> tuple[str, ...]:
        """For the record."""
        said = f"the weights beside the adapters are quantised: {self.quantised}"
        return (*self.texts.notes, *([said] if self.quantised else []))

    def adapters(self, rank: int) -> Any:
        """PEFT's config of LoRA beside every linear layer of the blocks."""
        return lora_config(linear_layers(self.model, self.blocks), rank, task_type="CAUSAL_LM")

    @property
    def vocabulary(self) -> int:
        """Tokens that the model chooses from."""
        head: Any = output_head(self.model)
        return int(getattr(head, "out_features", None) or head.weight.shape[0])


def set_up(
    model: str | None,
    data: Path | None,
    validation: Path | None,
    sequence: int,
    validation_rows: int,
    packed: bool,
    trust_remote_code: bool = False,
    quantization: Any = None,
) -> Setup:
    """Load MODEL in float32, or quantised as `load_model` does it, and read the texts.

    Raises:
        AutorevError: the model or the data cannot be had, or do not fit each other.
    """
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "quantization": quantization}
    loaded = load_model(model, torch.float32, 1, None, **how)
    name = model or "smollm2"
    net: Any = loaded.model
    if not predicts_tokens(net):
        raise SettingError(
            f"{loaded.name} is no causal language model ({type(net).__name__}); use autorev.convert in a training loop "
            "of your own"
        )
    tokenizer = tokenizer_of(model, trust_remote_code)
    if tokenizer is None:
        raise SettingError(
            f"{name} has no tokenizer beside its config that transformers can read, so it reads no text; give a folder "
            "that has one"
        )
    check_length(net, sequence, loaded.name)
    net = net.to("cuda" if torch.cuda.is_available() else "cpu")
    texts = read_texts(net, tokenizer, data, validation, sequence, validation_rows, packed)
    call = _example(loaded, texts, net)
    return Setup(
        model=net,
        tokenizer=tokenizer,
        info=ModelInfo(loaded.name, type(net).__name__, parameters_of(net), model or EMBEDDED),
        pretrained=loaded.pretrained,
        texts=texts,
        call=call,
        blocks=find_blocks(net, call),
        base=fingerprint(model) if loaded.pretrained else "",
        trust_remote_code=trust_remote_code,
        quantised=quantised_by(net),
    )


def predicts_tokens(model: Any) -> bool:
    """Is it a causal language model: has it logits of tokens, which do not depend on the tokens that come later?"""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        return False
    ids = torch.zeros(1, _LOOKED_AT, dtype=torch.long, device=next(model.parameters()).device)
    other = ids.clone()
    other[:, -1] = 1
    logits = logits_of(model)
    try:
        first, second = logits({"input_ids": ids})[:, 0], logits({"input_ids": other})[:, 0]
    except (TypeError, ValueError, AttributeError):  # its forward wants more than tokens, or has no logits
        return False
    # Not to the last bit: which expert takes how many tokens changes the order of sums.
    return not (first - second).abs().max() > 1e-3 * first.abs().max()  # broken weights give NaN, and another message


def check_length(model: Any, sequence: int, name: str) -> None:
    """Raise where `sequence` exceeds what the model's positions reach.

    Raises:
        SettingError: it does.
    """
    longest = longest_sequence(model)
    if longest is not None and sequence > longest:
        raise SettingError(f"{name} reads {longest} tokens at most, and `sequence` is {sequence}; give fewer")


def longest_sequence(model: Any) -> int | None:
    """Tokens that the model's positions reach; None: its config sets no limit."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limits = [getattr(model.config, name, None) for name in names]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def read_texts(
    model: nn.Module,
    tokenizer: Any,
    data: Path | None,
    validation: Path | None,
    sequence: int,
    validation_rows: int,
    packed: bool,
) -> Texts:
    """Training and validation rows of at most `sequence` tokens.

    Raises:
        DataError: the data cannot be used.
    """
    documents, source = read_documents(data, tokenizer)
    examples = tokenize(documents, tokenizer)
    if validation is None:
        training, held = split(examples)
    else:
        training, held = examples, tokenize(read_documents(validation, tokenizer)[0], tokenizer)
    notes: list[str] = []
    known = known_tokens(model)
    largest = max(token for example in (*training, *held) for token in example.ids)
    if largest >= known:
        raise SettingError(
            f"the tokenizer writes token {largest}, and {type(model).__name__} has embeddings of {known} tokens: they "
            "do not belong together; take both from one folder"
        )
    vocabulary = min(len(tokenizer), known)
    if packed and not keeps_apart(model, vocabulary):
        packed = False
        notes.append(f"{type(model).__name__} does not keep packed documents apart, so there is one in each row")
    rows = make_rows(training, sequence, packed)
    checked = make_rows(held, sequence, packed).first(validation_rows)
    if rows.truncated:
        notes.append(f"{rows.truncated} examples were longer than {sequence} tokens and lost their end")
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    content = rows.digest + checked.digest
    corpus = Corpus(source, len(documents), rows.learned, checked.learned, rows.truncated, packed, content)
    return Texts(rows, checked, Collator(packed, sequence, pad), corpus, tuple(notes))


def _example(loaded: Loaded, texts: Texts, model: nn.Module) -> Call:
    row = max(texts.training.rows, key=lambda row: sum(len(example.ids) for example in row))
    ids = [token for example in row for token in example.ids]
    device = next(model.parameters()).device
    return on_tokens(loaded.example(1, len(ids)), torch.tensor([ids], device=device))
