"""An example call of a class of `transformers` models, for a config.

Nothing is downloaded and no tokeniser is needed: the call holds random token ids, images or sound of the
right shapes, and the labels that make the model return a loss. Under fake tensors nothing is allocated; with
real ones the values are valid, and the caller's random numbers are left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from autorev.errors import ModelBuildError
from autorev.integrations.accelerate import execution_device
from autorev.integrations.asked import takes
from autorev.integrations.inputs import FLOATING, IDS, WHOLE, pixels, rows, text_config
from autorev.integrations.peft import base_model
from autorev.integrations.pictures import Picture, kinds_of_tokens, mixes_in_tokens, numbers, picture

if TYPE_CHECKING:
    import torch

    from autorev.workload import Call

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")

_AFTER_PADDING = "create_position_ids_from_input_ids"
"""What models call the function by which they number positions from `pad_token_id + 1`, as RoBERTa does: a table of 514
rows then serves 512 tokens."""

_NO_LABEL = -100
"""What losses leave out."""
_SHORT = 8
"""Tokens of the text in a call that the model is only asked about."""
_LABEL_TOKENS = 8
"""Length of a transcript, which must be shorter than the sound's frames."""


def example_call(config: Any, model_cls: type[Any], batch: int, sequence: int | None) -> Call:
    """Arguments for one call of `model_cls`, on the CPU, with floating inputs of torch's default dtype.

    `sequence` is the number of tokens per sample; None stands for as many as the model takes, at most 128.
    """
    import torch

    maker = _Maker(config, model_cls, batch, sequence, torch.get_default_dtype(), torch.device("cpu"), live=False)
    return (), maker.keywords()


def picture_in(config: Any, model_cls: type[Any]) -> Picture | None:
    """The picture that each sample of an example call has."""
    import torch

    maker = _Maker(config, model_cls, 1, None, torch.get_default_dtype(), torch.device("cpu"), live=False)
    return maker.settled[0].shown


def example_call_for(model: Any, batch: int, sequence: int | None) -> Call:
    """Arguments for one call of a live `transformers` model, on its device and in its dtype; adapters and
    `torch.compile` may wrap it."""
    # PEFT forwards the attributes of what it wraps, but its class has none.
    model = base_model(getattr(model, "_orig_mod", model))
    device = execution_device(model)
    return (), _Maker(model.config, type(model), batch, sequence, model.dtype, device, live=True).keywords()


def has_sequence(config: Any, model_cls: type[Any]) -> bool:
    """Does `model_cls` read tokens, so that the length of a sample can be chosen?"""
    accepted = _accepted(model_cls)
    return "input_ids" in accepted or "decoder_input_ids" in accepted


def has_images(model_cls: type[Any]) -> bool:
    """Does an example call of `model_cls` hold images, and little else?"""
    accepted = _accepted(model_cls)
    return "pixel_values" in accepted and (model_cls.main_input_name == "pixel_values" or "return_loss" in accepted)


def sequence_limit(config: Any, model_cls: type[Any]) -> int | None:
    """The most tokens that a `model_cls` has positions for; None where positions are relative or absent."""
    text = text_config(config)
    if getattr(text, "alibi", False):
        return None
    # A key that the config class does not declare says nothing: T5's relative positions have no limit,
    # whatever `n_positions` its config.json still carries.
    declared = inspect.signature(type(text)).parameters
    for name in _LIMITS:
        limit = getattr(text, name, None) if name in declared else None
        if isinstance(limit, int) and limit > 0:
            return limit - (text.pad_token_id or 0) - 1 if _positions_start_after_padding(model_cls) else limit
    return None


def _positions_start_after_padding(model_cls: type[Any]) -> bool:
    module = inspect.getmodule(model_cls)
    try:
        return module is not None and _AFTER_PADDING in inspect.getsource(module)
    except (OSError, TypeError):  # a class made by hand
        return False


def _accepted(model_cls: type[Any]) -> frozenset[str]:
    return frozenset(inspect.signature(model_cls.forward).parameters)


def _required(model_cls: type[Any]) -> set[str]:
    """Inputs without a default, and the one that the class says it is about."""
    parameters = list(inspect.signature(model_cls.forward).parameters.values())[1:]  # without `self`
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    main = model_cls.main_input_name
    return {p.name for p in named if p.default is p.empty or p.name == main}


_taken: dict[tuple[Any, ...], bool] = {}
"""What a model was asked before: a prediction asks for many calls."""


@dataclass(frozen=True)
class _Maker:
    """Makes the arguments of one call."""

    config: Any
    model_cls: type[Any]
    batch: int
    sequence: int | None
    dtype: torch.dtype
    device: torch.device
    live: bool
    upright: bool = False
    """A spectrum's bins come before its frames; which way round it is, no config says."""
    pictured: bool = True
    """With a picture, where the model reads one."""

    def keywords(self) -> dict[str, Any]:
        """The call's arguments."""
        maker, names = self.settled
        return maker.call_of(names)

    @cached_property
    def settled(self) -> tuple[_Maker, Sequence[str]]:
        """Every input that is known, where the model takes them together; else those that it cannot do without."""
        accepted = _accepted(self.model_cls)
        known = [name for name in (*IDS, *FLOATING, *WHOLE) if name in accepted and name != "attention_mask"]
        if "input_ids" in known and mixes_in_tokens(self.config):
            known = [name for name in known if name in IDS]
        made = {*known, *(() if self.shown is None else self.shown.inputs)}
        unknown = sorted(_required(self.model_cls) - made) or ([] if known else [self.model_cls.main_input_name])
        if unknown:
            raise ModelBuildError(
                f"{self.model_cls.__name__} reads {', '.join(unknown)}, which autorev cannot make up; "
                "write a function that returns (model, args, kwargs) and give package.module:function"
            )
        needed = [name for name in known if name in self.needed]
        if known == needed and self.shown is None and "input_features" not in known:
            return self, known
        for maker in self.ways(known):
            for names in (known, [*known, "attention_mask"], needed):
                if maker.taken(names):
                    return maker, names
        return self, known

    def ways(self, known: Sequence[str]) -> Iterator[_Maker]:
        """This one, and others that are asked when the model does not take what this one makes."""
        yield self
        if "input_features" in known:
            yield replace(self, upright=True)
        if self.shown is not None and not self.live:
            yield replace(self, pictured=False)

    @property
    def needed(self) -> set[str]:
        """What the model is never called without: the class or its loss is all about it."""
        pairs = {"input_ids", "pixel_values"} if "return_loss" in _accepted(self.model_cls) else set()
        text = {"input_ids"} if self.shown is not None else set()
        return {*_required(self.model_cls), *pairs, *text, "decoder_input_ids"}

    def call_of(self, names: Iterable[str]) -> dict[str, Any]:
        """The call with these inputs, and with what goes with them."""
        accepted = _accepted(self.model_cls)
        call: dict[str, Any] = {name: self.made(name) for name in names}
        call |= self.targets(accepted)
        if self.shown is not None:
            call |= self.illustrated(call, self.shown, accepted)
        if "attention_mask" in call:
            call["attention_mask"] = self.whole([1] * call["input_ids"].shape[1])
        if "use_cache" in accepted:
            call["use_cache"] = False
        if "return_loss" in accepted:
            call["return_loss"] = True
        return call

    def made(self, name: str) -> torch.Tensor:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        if name in IDS:
            # Models look for where in a text its picture stands.
            with unset_fake_temporarily() if self.shown is not None else nullcontext():
                return self.tokens(name=name)
        if name in FLOATING:
            shape = FLOATING[name](self.config)
            return self.noise(shape[::-1] if self.upright and name == "input_features" else shape)
        return self.whole(WHOLE[name](self.config, self.length))

    def taken(self, names: Sequence[str]) -> bool:
        """Does the model run on these inputs?"""
        import torch

        key = self.model_cls, self.config.to_json_string(), *names, self.live, self.upright, self.pictured
        if key not in _taken:
            alike = replace(self, batch=2, sequence=min(self.length, _SHORT), device=torch.device("cpu"))
            alike = replace(alike, dtype=torch.get_default_dtype())
            _taken[key] = takes(self.config, self.model_cls, lambda: alike.call_of(names), self.live)
        return _taken[key]

    def illustrated(self, call: dict[str, Any], shown: Picture, accepted: frozenset[str]) -> dict[str, Any]:
        """What changes in a call of text alone when a picture stands in front of the text."""
        import torch
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():
            ids = torch.tensor([shown.ids], device=self.device).repeat(self.batch, 1)
            ids = torch.cat([ids, call["input_ids"]], dim=1)
        kinds = kinds_of_tokens(accepted, shown, self.batch, call["input_ids"].shape[1])
        changed = {**shown.inputs, **kinds, "input_ids": ids}
        if "labels" in call and not getattr(self.config, "is_encoder_decoder", False):  # which has a text of its own
            blank = torch.full((self.batch, len(shown.ids)), _NO_LABEL, device=self.device)
            changed["labels"] = torch.cat([blank, call["labels"]], dim=1)
        # What is where it should be is not touched: under fake tensors, some of it is real.
        return {name: v if v.device == self.device else v.to(self.device) for name, v in changed.items()}

    def targets(self, accepted: frozenset[str]) -> dict[str, Any]:
        """The labels with which this class computes its loss; nothing for a class without one."""
        name = self.model_cls.__name__
        if name.endswith("ForQuestionAnswering") and "start_positions" in accepted:
            return {"start_positions": self.integers(1, ()), "end_positions": self.integers(1, ())}
        extra: dict[str, Any] = {
            key: self.integers(2, ()) for key in ("next_sentence_label", "sentence_order_label") if key in accepted
        }
        if "labels" not in accepted:
            return extra
        labels = self.labels(name)
        return extra if labels is None else {"labels": labels, **extra}

    def labels(self, name: str) -> torch.Tensor | None:
        if name.endswith(("ForImageClassification", "ForSequenceClassification", "ForAudioClassification")):
            return self.classes()
        if name.endswith("ForTokenClassification"):
            return self.integers(self.config.num_labels, (self.length,))
        if name.endswith("ForSemanticSegmentation"):
            return self.integers(self.config.num_labels, pixels(self.config)[-2:])
        if name.endswith("ForCTC"):
            return self.transcript()
        if (each := rows("decoder_input_ids", self.config)) > 1:
            return self.tokens(name="decoder_input_ids").view(self.batch, each, -1).mT
        return self.tokens() if has_sequence(self.config, self.model_cls) else None

    def transcript(self) -> torch.Tensor:
        """Tokens of which none is special, and no two that follow one another are the same: known ones, as the loss
        leaves out what is padding."""
        count = text_config(self.config).vocab_size
        special = _special_tokens(self.config, count)
        plain = [token for token in range(min(count, _LABEL_TOKENS + len(special))) if token not in special] or [0]
        return self.whole([plain[number % len(plain)] for number in range(_LABEL_TOKENS)])

    def classes(self) -> torch.Tensor:
        """One class per sample, in the form that the config's loss reads."""
        count: int = self.config.num_labels
        if getattr(self.config, "problem_type", None) == "multi_label_classification":
            return self.noise((count,))
        return self.noise(()) if count == 1 else self.integers(count, ())

    def tokens(self, length: int | None = None, name: str = "input_ids") -> torch.Tensor:
        """Ordinary tokens, then the token that ends a text: CLIP and BART read their summary at it."""
        text = IDS[name](self.config)
        if text.vocab_size < 1:
            raise ModelBuildError(f"a vocabulary of {text.vocab_size} tokens has none to call the model with")
        special = _special_tokens(self.config, text.vocab_size)
        plain = next((token for token in range(text.vocab_size) if token not in special), 0)
        ids = self.integers(text.vocab_size, (length or self.length,), rows(name, self.config))
        for token in special:
            ids.masked_fill_(ids == token, plain)
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < text.vocab_size:
            ids[:, -1] = end
        return ids

    @property
    def length(self) -> int:
        """Tokens of text, beside a picture's."""
        beside = 0 if self.shown is None else len(self.shown.ids)
        return self.sequence or max(min((sequence_limit(self.config, self.model_cls) or 128 + beside) - beside, 128), 1)

    @cached_property
    def shown(self) -> Picture | None:
        """The picture in front of the text."""
        return picture(self.config, self.model_cls, self.batch, self.drawn, self.live) if self.pictured else None

    def whole(self, row: list[Any]) -> torch.Tensor:
        """Whole numbers, the same for each sample, and known also where other values are not: models loop by them."""
        return numbers(row, self.batch).to(self.device)

    def integers(self, below: int, shape: tuple[int, ...], rows: int = 1) -> torch.Tensor:
        import torch

        return torch.randint(below, (self.batch * rows, *shape), generator=_generator()).to(self.device)

    def noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self.drawn((self.batch, *shape))

    def drawn(self, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        return torch.randn(shape, generator=_generator(), dtype=torch.float32).to(self.device, self.dtype)


def _generator() -> torch.Generator:
    """A generator of our own: drawing from torch's would change what the user's program draws next."""
    import torch

    return torch.Generator().manual_seed(0)


def _special_tokens(config: Any, vocabulary: int) -> set[int]:
    """Ids with a meaning of their own: padding, end of text, a place for an image."""
    special: set[int] = set()
    for part in (config, text_config(config)):
        for key, value in part.to_dict().items():
            if key.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
    return {token for token in special if 0 <= token < vocabulary}
