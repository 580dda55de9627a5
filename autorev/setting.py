"""The training step that is predicted: everything of it that a user may choose."""

from __future__ import annotations

from dataclasses import dataclass

from autorev.errors import SettingError
from autorev.given import is_count, is_number
from autorev.optimizers import Optimizer


@dataclass(frozen=True, slots=True)
class Setting:
    """The training step that is predicted.

    Raises:
        SettingError: an option is none of those named below.
    """

    batch: int
    sequence: int | None
    """Tokens per sample; None for a model that has no sequence axis."""
    dtype: str
    """fp32, bf16 or fp16: of weights, and of all else that is not told to be otherwise."""
    optimizer: str
    """As `autorev.optimizers` spells it: adamw, adamw-fused:step=backward, ..."""
    trains: str
    """full, lora or head."""
    lora_rank: int | None
    loss: str
    """full (the logits are materialised) or chunked (torch.nn.functional.linear_cross_entropy)."""
    device: str
    """Name of a device profile."""
    autocast: str | None = None
    """bf16: products are computed in it, over fp32 weights, as under `Trainer`'s `bf16=True`."""
    accumulate: int = 1
    """Passes of `batch` samples whose gradients are added up in one optimiser step."""
    lora_dropout: float = 0.0
    adapter_dtype: str | None = None
    """fp32: of adapters beside weights of 16 bits, as `peft.get_peft_model` has them; None: the weights' own."""
    weights: str | None = None
    """What linear layers are quantised to: nf4, nf4-double (scales, too), int8 or torchao-int8; None: as they are."""
    gpus: int = 1
    """That train together; memory is of one of them, and `batch` is what each is given."""
    shard: str = "none"
    """How they divide weights, gradients and optimiser states: none, fsdp, zero1, zero2 or zero3."""
    sequence_parallel: int = 1
    """GPUs among which the tokens of a sample are divided (Ulysses)."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                *others, last = [str(choice) for choice in choices]
                raise SettingError(f"{name} is {', '.join(others)} or {last}, not {value!r}")
        if self.autocast and self.dtype != "fp32":
            raise SettingError(f"autocast computes over fp32 weights, and dtype is {self.dtype}; leave one of them out")
        if not is_count(self.accumulate):
            raise SettingError(f"accumulate is a whole number, 1 or more, not {self.accumulate!r}")
        optimizer = Optimizer.parse(self.optimizer)
        optimizer.check_step(self.accumulate)
        object.__setattr__(self, "optimizer", str(optimizer))
        self._check_gpus()
        optimizer.check_gpus(self.gpus, self.shard)
        if not (is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            raise SettingError(f"lora_dropout is 0 or more and below 1, not {self.lora_dropout!r}")
        given = {"lora_dropout": self.lora_dropout, "adapter_dtype": self.adapter_dtype}
        for name in (name for name, value in given.items() if value and self.trains != "lora"):
            raise SettingError(f"{name} has no meaning with trains={self.trains!r}; leave one of them out")
        if self.weights and self.trains == "full":
            raise SettingError(
                f"weights quantised to {self.weights} do not train: train adapters beside them (`lora_rank`), or a head"
            )

    def _check_gpus(self) -> None:
        for name in ("gpus", "sequence_parallel"):
            if not is_count(getattr(self, name)):
                raise SettingError(f"{name} is a whole number, 1 or more, not {getattr(self, name)!r}")
        if self.shard != "none" and self.gpus == 1:
            raise SettingError(f"`shard={self.shard}` divides a model among several GPUs; give `gpus`, 2 or more")
        if self.gpus % self.sequence_parallel:
            raise SettingError(
                f"{self.gpus} GPUs make no groups of {self.sequence_parallel} that share a sample: `sequence_parallel` "
                "has to divide `gpus`"
            )
        if self.sequence_parallel > 1 and (self.sequence is None or self.sequence % self.sequence_parallel):
            what = "the model has no sequence axis" if self.sequence is None else f"{self.sequence:,} tokens are not"
            raise SettingError(
                f"`sequence_parallel={self.sequence_parallel}` gives every GPU as many tokens of a sample, and {what}"
                + ("" if self.sequence is None else " a multiple of it")
            )


CHOICES = {
    "dtype": ("fp32", "bf16", "fp16"),
    "trains": ("full", "lora", "head"),
    "loss": ("full", "chunked"),
    "autocast": (None, "bf16"),
    "adapter_dtype": (None, "fp32"),
    "weights": (None, "nf4", "nf4-double", "int8", "torchao-int8"),
    "shard": ("none", "fsdp", "zero1", "zero2", "zero3"),
}
"""What the options of a `Setting` may be."""


def resolve_lora(trains: str | None, lora_rank: int | None) -> tuple[str, int | None]:
    """(trains, rank): a rank alone means LoRA, LoRA alone rank 16, and nothing all weights.

    Raises:
        SettingError: a rank for what trains without adapters, or none that is a rank.
    """
    if lora_rank is None:
        return trains or "full", 16 if trains == "lora" else None
    if trains not in (None, "lora"):
        raise SettingError(f"lora_rank has no meaning with trains={trains!r}; leave one of them out")
    if not is_count(lora_rank):
        raise SettingError(f"the rank of adapters is a whole number, 1 or more, not {lora_rank!r}")
    return "lora", lora_rank
