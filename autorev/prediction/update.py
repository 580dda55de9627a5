"""What an optimiser holds from step to step, and what one update takes besides."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from autorev.optimizers import Optimizer

SMALL = 4096
"""Elements below which bitsandbytes keeps fp32 states (`min_8bit_size`), and torchao a parameter on the device
(`minimal_size`)."""
BLOCK = 256
"""Elements of an 8-bit state that share one fp32 scale (`absmax`)."""
_UNPAGED = 100_000
"""Elements below which bitsandbytes pages no state."""
_TABLES = 2 * 256 * 4
"""Bytes of what 8-bit codes are looked up in, once for all parameters."""


@dataclass(frozen=True, slots=True)
class Update:
    """In bytes."""

    state: int
    """On the device, from step to step."""
    temporary: int
    """On the device, at the highest point of an update that comes after backward."""
    moved: int
    """Read from and written to the device's memory."""
    host: int = 0
    """On the host, from step to step."""
    linked: int = 0
    """Between host and device, both directions together."""


@dataclass(frozen=True, slots=True)
class Updated:
    """One parameter under an optimiser, on a GPU or a CPU.

    torch's optimisers keep tensors like the parameter, and AdamW's a step count of 4 bytes. bitsandbytes' keep fp32
    states; in 8 bits, blocks of 256 elements with a scale each, but for parameters of fewer than 4096 elements (its
    `optim/optimizer.py`) and for embeddings, which `transformers.Trainer.create_optimizer` leaves in fp32. Paged states
    are counted on the host, but for those of the one parameter that is updated: where the device has room they stay on
    it. Of torchao's `CPUOffloadOptimizer` (`optim/cpu_offload.py`) the host holds a copy of the parameter, its gradient
    and both moments; a gradient that goes there at once is counted as gone at once.
    """

    parameter: nn.Parameter
    optimizer: Optimizer
    on_gpu: bool
    embeds: bool
    """Is it the weight of an embedding?"""
    part: int | None = None
    """Elements of it that are updated here, where it is divided among GPUs."""

    @property
    def elements(self) -> int:
        """Their number."""
        return self.parameter.numel() if self.part is None else self.part

    @property
    def size(self) -> int:
        """Its own bytes."""
        return self.elements * self.parameter.element_size()

    @property
    def coded(self) -> bool:
        """Are its states 8-bit codes?"""
        return self.optimizer.is_8bit and not self.embeds and self.elements >= SMALL

    @property
    def on_host(self) -> bool:
        """Is it the host that updates it?"""
        return self.optimizer.on_host and self.elements >= SMALL

    @property
    def paged(self) -> int:
        """Bytes of its state that may be on the host or on the device."""
        pages = self.optimizer.paged and self.elements >= _UNPAGED
        return self._moments if pages else 0

    @property
    def state(self) -> int:
        """Bytes on the device, from step to step."""
        if self.on_host:
            return 0
        if self.optimizer.library == "bitsandbytes":
            blocks = -(-self.elements // BLOCK) if self.coded else 0
            return self._moments - self.paged + 2 * 4 * blocks
        return self._moments + (4 if self.optimizer.momenta == 2 else 0)

    @property
    def host(self) -> int:
        """Bytes on the host, from step to step."""
        return 2 * self.size + self._moments + 4 if self.on_host else self.paged

    @property
    def frees_gradient(self) -> bool:
        """Is its gradient gone as soon as it is there?"""
        return self.optimizer.step == "backward" or (self.optimizer.gradients == "host" and self.on_host)

    @property
    def temporary(self) -> int:
        """Bytes on the device while it is updated by itself.

        torch's AdamW makes a denominator, from a square root where it is not in place. bitsandbytes' CPU kernels
        compute on fp32 copies (`backends/cpu/ops.py`), its CUDA kernels on none.
        """
        if self.optimizer.name == "adamw":
            return self.size if self.all_at_once else 2 * self.size
        if self.optimizer.library == "bitsandbytes" and not self.on_gpu:
            copies = (5 if self.coded else 3) + (self.parameter.element_size() != 4)
            return copies * 4 * self.elements
        return self.paged

    @property
    def all_at_once(self) -> bool:
        """Does torch's multi-tensor form update it?"""
        return self.optimizer.foreach == "on" or (self.optimizer.foreach is None and self.on_gpu)

    @property
    def _moments(self) -> int:
        if self.optimizer.library == "bitsandbytes":
            return 2 * self.elements * (1 if self.coded else 4)
        return self.optimizer.momenta * self.size


def updated_by(model: nn.Module, optimizer: Optimizer, device_kind: str) -> list[Updated]:
    """Each parameter of `model` that trains."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [Updated(p, optimizer, device_kind == "cuda", id(p) in embedded) for p in trained]


def update_of(each: list[Updated]) -> Update:
    """What the optimiser takes for all of them.

    The time of a step on the host is that of the link alone. What is done in backward takes nothing after it.
    """
    total, state, host = (sum(getattr(one, name) for one in each) for name in ("size", "state", "host"))
    paged = sum(one.paged for one in each)
    carried = sum(2 * one.size for one in each if one.on_host)
    return Update(
        state=state + (_TABLES if any(one.coded for one in each) else 0),
        temporary=_temporary([one for one in each if not one.frees_gradient]),
        moved=3 * total + 2 * (state + paged),
        host=host,
        linked=2 * paged + carried,
    )


def _temporary(each: list[Updated]) -> int:
    if not each:
        return 0
    sizes = [one.temporary for one in each]
    if each[0].all_at_once and each[0].optimizer.name == "adamw":
        return sum(sizes)
    if each[0].optimizer.name == "adamw":  # whose loop holds the last denominator until it has the next
        return max([sizes[0], *(before // 2 + size for before, size in pairwise(sizes))])
    return max(sizes)
