"""Train a language model without ever holding all of its logits: the head and the loss together, chunk by chunk.

With a vocabulary of tens of thousands the logits of a step (and their gradient) are often larger than everything the
blocks keep, and hide whatever is saved there. `torch.nn.functional.linear_cross_entropy` computes loss and gradients in
chunks. Like `convert`, `chunk_loss` replaces one `forward` on the instance: class, `state_dict` keys and `generate`
stay; calls without labels are untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autorev.capture.quantised import is_quantised
from autorev.detection import call_of
from autorev.engine.eval_mode import eval_mode
from autorev.engine.undisturbed import undisturbed
from autorev.errors import ConversionError
from autorev.integrations.peft import base_model
from autorev.integrations.transformers import decoder_inputs, output_head

CHUNKS = 8
LEAST_TOKENS = 64
ENOUGH_TOKENS = 256
"""A chunk is an eighth of the tokens, and `LEAST_TOKENS` at least; of more than `ENOUGH_TOKENS`, no more than have
logits as large as the hidden states of all tokens. torch's own choice is many small ones: on a CPU, 256 tokens and
49,152 words take 3.75 s with it, 0.32 s with these, and 0.30 s with all logits at once."""
_CHECKED_TOKENS = 32
_SCALES = (1.0, 50.0)
"""Of the made-up logits: small ones show what is added to the loss, large ones what is done to logits."""
_TOLERANCE = 1e-5
"""Relative, between the model's own loss of made-up logits and their cross entropy; both are fp32."""


def chunk_loss(model: nn.Module) -> None:
    """Make `model(..., labels=...)` compute its loss in chunks, in place; its `.logits` are then None.

    Whether the labels are shifted, and whether cross entropy is all there is to the loss, is found out on a short call
    in which the head returns made-up logits.

    Raises:
        ConversionError: it is no `transformers` model with a linear vocabulary head, or it does something to its
            logits (soft caps, scales) or adds something to its loss; the model is as it was.
    """
    inner = _without_adapters(model)
    name = type(inner).__name__
    if isinstance(inner.__dict__.get("forward"), ChunkedForward):
        raise ConversionError(f"the loss of {name} is chunked already; call autorev.unchunk_loss(model) first")
    head = head_of(inner)
    if head is None:
        raise ConversionError(
            f"{name} has no plain linear vocabulary head (get_output_embeddings), so there is nothing to chunk"
        )
    if not hasattr(F, "linear_cross_entropy"):
        raise ConversionError(
            f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy; install a newer torch"
        )
    shifts, counts = _kind_of_loss(inner, head)
    inner.__dict__["forward"] = ChunkedForward(inner, head, inner.__dict__.get("forward"), shifts, counts)


def unchunk_loss(model: nn.Module) -> None:
    """Undo `chunk_loss`; a model whose loss is not chunked stays as it is."""
    inner = _without_adapters(model)
    forward = inner.__dict__.get("forward")
    if isinstance(forward, ChunkedForward):
        if forward.replaced is None:
            del inner.__dict__["forward"]
        else:
            inner.__dict__["forward"] = forward.replaced


def _kind_of_loss(model: nn.Module, head: nn.Linear) -> tuple[bool, bool]:
    """(are the labels shifted, does `num_items_in_batch` count), by what the model makes of logits that are known.

    Raises:
        ConversionError: its loss is not their cross entropy either way.
    """

    logits = torch.empty(0)

    def made_up(hidden: torch.Tensor) -> torch.Tensor:
        return logits.expand(*hidden.shape[:-1], -1)

    def own_loss(**more: Any) -> float:
        with _head_replaced(head, made_up):
            return float(model(**call, **more).loss)

    with undisturbed(model), torch.no_grad(), eval_mode(model):
        _, call = call_of(model, None, "convert")
        call = {k: v[:, :_CHECKED_TOKENS] if k in _TOKENS else v for k, v in call.items()}
        labels = call["labels"]
        drawn = torch.randn(*labels.shape, head.out_features, generator=torch.Generator().manual_seed(0))
        possible = {True, False}
        for scale in _SCALES:
            logits = scale * drawn.to(labels.device)
            own = own_loss()
            of_logits = {
                True: float(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())),
                False: float(F.cross_entropy(logits.flatten(0, 1), labels.flatten())),
            }
            possible &= {s for s, loss in of_logits.items() if abs(loss - own) <= _TOLERANCE * abs(own)}
            if not possible:
                raise ConversionError(
                    f"{type(model).__name__} does something between its head and its loss, or adds something to "
                    f"it: of an example its own loss is {own:.6g}, the cross entropy {of_logits[True]:.6g}; train "
                    "it with the full loss"
                )
        counts = False
        with suppress(TypeError):  # its forward takes no such argument
            counts = own_loss(num_items_in_batch=1) != own
        return possible.pop(), counts


_TOKENS = ("input_ids", "labels", "decoder_input_ids", "attention_mask")


def head_of(model: nn.Module) -> nn.Linear | None:
    """The linear layer that makes the logits; None where there is none, it is quantised, or adapters wrap it."""
    head = output_head(model)
    return head if type(head) is nn.Linear and not is_quantised(head) else None


@dataclass(eq=False)
class ChunkedForward:
    """The `forward` of a model whose loss is chunked."""

    model: nn.Module
    head: nn.Linear
    replaced: Callable[..., Any] | None
    """An instance-level `forward` that was there before."""
    shifts: bool
    """Does position i predict label i + 1?"""
    counts: bool
    """Does the model's own loss divide by `num_items_in_batch`, where that is given?"""

    @property
    def original(self) -> Callable[..., Any]:
        """The model's own forward."""
        if self.replaced is not None:
            return self.replaced
        bound: Callable[..., Any] = type(self.model).forward.__get__(self.model)
        return bound

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What `inspect.signature` shows: `Trainer` drops the columns that a forward does not name."""
        return self.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call; with labels, the loss is computed in chunks and `.logits` are None."""
        labels = kwargs.get("labels")
        if labels is None:
            return self.original(*args, **kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        items = items if self.counts else None
        out, hidden = run_without_logits(self.model, self.original, self.head, args, kwargs)
        if not isinstance(out, dict):
            raise ConversionError(f"{type(self.model).__name__} with a chunked loss needs return_dict=True")
        if self.shifts:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        loss = linear_loss(self.head, hidden, labels, "mean" if items is None else "sum")
        return type(out)(**{**out, "loss": loss if items is None else loss / items, "logits": None})


def run_without_logits(
    model: nn.Module, forward: Callable[..., Any], head: nn.Linear, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, torch.Tensor]:
    """(what the model returns without labels, what its head was given), with one value per token in the logits' place.

    Where adapters or hooks sit on the head they still run; what it computes is skipped.
    """
    seen: list[torch.Tensor] = []

    def keep_input(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden[..., :1]

    without = {name: value for name, value in kwargs.items() if name != "labels"}
    if "labels" in kwargs and without.get("decoder_input_ids") is None and without.get("decoder_inputs_embeds") is None:
        read = decoder_inputs(model, kwargs["labels"])
        if read is not None:
            without["decoder_input_ids"] = read
    with _head_replaced(head, keep_input):
        out = forward(*args, **without)
    return out, seen.pop()


@contextmanager
def _head_replaced(head: nn.Linear, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    before = head.__dict__.get("forward")
    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        del head.__dict__["forward"]
        if before is not None:
            head.__dict__["forward"] = before


def linear_loss(head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy of `head(hidden)` [..., vocabulary] and `labels` [...], -100 ignored, in torch's chunked form."""
    tokens = labels.numel()
    as_large_as_hidden = max(ENOUGH_TOKENS, tokens * head.in_features // head.out_features)
    chunk = min(max(LEAST_TOKENS, -(-tokens // CHUNKS)), as_large_as_hidden)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return F.linear_cross_entropy(
        hidden.flatten(0, -2),
        head.weight,
        labels.flatten().to(hidden.device),
        linear_bias=head.bias,
        reduction=reduction,
        options=options,
    )


def _without_adapters(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConversionError(f"the loss of a model is chunked, and a {type(model).__name__} is none")
    return base_model(model)
