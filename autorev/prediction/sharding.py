"""What of a training step each of several GPUs holds: weights, gradients and optimiser states divided, and what is not.

    none     DDP: nothing is divided, and all gradients stand a second time, in its buckets
    fsdp     FSDP2, `fully_shard` on every block and on the model
    zero1    DeepSpeed: the optimiser's states and fp32 weights
    zero2    and gradients
    zero3    and weights

Sources: torch/distributed/fsdp/_fully_shard of torch 2.13; DeepSpeed's documentation of its configuration and
deepspeed/runtime/zero of August 2026, with the defaults of both. The figures are those of the rank that holds most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from autorev.analysis import Category
from autorev.errors import SettingError
from autorev.prediction.layout import Layout
from autorev.prediction.update import Update, Updated, update_of
from autorev.setting import Setting

REDUCE_BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`: elements of the buffer that gradients wait in until they are reduced.
(`allgather_bucket_size` takes no memory: weights are gathered where they are.)"""
PERSISTENT = 100_000
"""`stage3_param_persistence_threshold`: smaller parameters are whole on every GPU."""
SUBGROUP = 1_000_000_000
"""`sub_group_size`: elements that the optimiser updates at a time."""
FP32 = 4
ALIGNMENT = 2
"""Of DeepSpeed's flat partitions, in elements."""


def part_of(shape: torch.Size, gpus: int) -> int:
    """Elements of one GPU's part under FSDP2: rows of the first axis, the last part filled up to the size of the
    others."""
    return math.ceil(shape[0] / gpus) * math.prod(shape[1:]) if len(shape) else 1


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered together: those of a block, or of all the rest."""

    parameters: tuple[nn.Parameter, ...]
    gpus: int

    @cached_property
    def whole(self) -> int:
        """Bytes."""
        return sum(p.numel() * p.element_size() for p in self.parameters)

    @cached_property
    def elements(self) -> int:
        """Their number."""
        return sum(p.numel() for p in self.parameters)

    @cached_property
    def part(self) -> int:
        """Bytes of one GPU's part under FSDP2."""
        return sum(part_of(p.shape, self.gpus) * p.element_size() for p in self.parameters)

    @property
    def gathered(self) -> int:
        """Bytes of all parts together."""
        return self.part * self.gpus

    @cached_property
    def gradient_part(self) -> int:
        """Of the gradients likewise."""
        return sum(part_of(p.shape, self.gpus) * p.element_size() for p in self.trained)

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those that have gradients."""
        return [p for p in self.parameters if p.requires_grad]

    @cached_property
    def gradients(self) -> int:
        """Bytes of these."""
        return sum(p.numel() * p.element_size() for p in self.trained)

    @cached_property
    def persistent(self) -> int:
        """Bytes of what DeepSpeed's stage 3 does not divide."""
        return sum(p.numel() * p.element_size() for p in self.parameters if p.numel() < PERSISTENT)

    @cached_property
    def largest_gradient(self) -> int:
        """Bytes of the largest of them."""
        return max((p.numel() * p.element_size() for p in self.trained), default=0)


@dataclass(frozen=True)
class Division:
    """Among how many GPUs what is divided, and how."""

    gpus: int
    shard: str
    accumulated: bool
    """Are there gradients of a pass before?"""
    blocks: tuple[Group, ...]
    """By the block's number."""
    rest: Group

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """All that train."""
        return [p for group in (*self.blocks, self.rest) for p in group.trained]

    @cached_property
    def gradients(self) -> int:
        """Bytes of all gradients, whole."""
        return sum(p.numel() * p.element_size() for p in self.trained)

    @cached_property
    def partition(self) -> int:
        """Elements of one GPU's part of the trained parameters under DeepSpeed."""
        if self.shard == "zero3":
            return sum(math.ceil(p.numel() / self.gpus) for p in self.trained)
        whole = sum(p.numel() for p in self.trained)
        return math.ceil(whole / (ALIGNMENT * self.gpus)) * ALIGNMENT

    @property
    def gradient_size(self) -> int:
        """Bytes of an element of a gradient."""
        return max((p.element_size() for p in self.trained), default=0)

    @property
    def gradient_partition(self) -> int:
        """Bytes of one GPU's gradients under DeepSpeed."""
        return self.partition * self.gradient_size

    @property
    def bucket(self) -> int:
        """Bytes of the buffer that they are reduced in."""
        return REDUCE_BUCKET * self.gradient_size

    def update(self, each: list[Updated]) -> Update:
        """What the optimiser takes of one GPU, for all parameters that train.

        DeepSpeed updates fp32 weights of its own, on fp32 gradients: one flat tensor of them.
        """
        if self.shard == "none" or not each:
            return update_of(each)
        if self.shard == "fsdp":
            return update_of([replace(one, part=part_of(one.parameter.shape, self.gpus)) for one in each])
        flat = nn.Parameter(torch.empty(self.partition, dtype=torch.float32, device="meta"))
        update = update_of([replace(each[0], parameter=flat, embeds=False)])
        at_once = min(self.partition, SUBGROUP) if self.shard == "zero3" else self.partition
        temporary = update.temporary * at_once // self.partition
        narrow = at_once * self.gradient_size if self.shard != "zero3" else 0  # what the fp32 ones are made from
        return replace(
            update,
            state=self.partition * FP32 + update.state,
            temporary=at_once * FP32 + max(temporary, narrow),
        )

    def standing(self) -> Counter[Category]:
        """What is alive throughout, beyond what it is on one GPU."""
        more: Counter[Category] = Counter()
        groups = (*self.blocks, self.rest)
        held = self.gradients if self.accumulated else 0
        if self.shard == "none":
            more[Category.GRADIENTS] = self.gradients  # `gradient_as_bucket_view=False`
        if self.shard == "fsdp":
            more[Category.PARAMETERS] = sum(group.part - group.whole for group in groups)
            more[Category.GRADIENTS] = sum(group.gradient_part for group in groups) - held if self.accumulated else 0
        if self.shard == "zero2":
            more[Category.GRADIENTS] = self.gradient_partition - held if self.accumulated else 0
        if self.shard == "zero3":
            parts = (math.ceil(p.numel() / self.gpus) * p.element_size() for g in groups for p in g.parameters)
            persistent = sum(group.persistent for group in groups)
            more[Category.PARAMETERS] = sum(parts) + persistent - sum(group.whole for group in groups)
            more[Category.GRADIENTS] = self.gradient_partition + self.bucket - held
        return more


def division_of(twin: nn.Module, layout: Layout, setting: Setting) -> Division | None:
    """How the setting divides the model; None: one GPU.

    Raises:
        SettingError: this model cannot be divided that way.
    """
    if setting.gpus == 1:
        return None
    if setting.shard in ("fsdp", "zero3"):
        if setting.weights:
            raise SettingError(
                f"weights quantised to {setting.weights} are not predicted divided; use `shard=zero2` or zero1"
            )
        if any(site.turn is not None for site in layout.sites):
            raise SettingError(
                f"the blocks of {type(twin).__name__} are no modules of their own, so {setting.shard} cannot gather "
                "one at a time; use `shard=zero2` or zero1"
            )
    seen: set[int] = set()

    def group(parameters: Iterable[nn.Parameter]) -> Group:
        own = tuple(p for p in parameters if id(p) not in seen)
        seen.update(map(id, own))
        return Group(tuple(dict.fromkeys(own)), setting.gpus)

    blocks = tuple(group(() if site.turn is not None else site.module.parameters()) for site in layout.sites)
    return Division(setting.gpus, setting.shard, setting.accumulate > 1, blocks, group(twin.parameters()))


def notes_on(setting: Setting) -> list[str]:
    """What a reader of the figures should know."""
    if setting.gpus == 1:
        return []
    notes = [
        f"memory is that of one GPU of {setting.gpus}, and `batch` is what each "
        + ("is" if setting.sequence_parallel == 1 else f"group of {setting.sequence_parallel} is")
        + " given; what GPUs send each other is not in the times"
    ]
    if setting.shard.startswith("zero"):
        notes.append(
            "DeepSpeed trains fp32 weights beside the model's own, and reduces gradients in a buffer of "
            f"{REDUCE_BUCKET:,} elements (`reduce_bucket_size`, as documented): a smaller one takes less"
        )
    return notes
