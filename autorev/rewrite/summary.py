"""What `convert` did, as frozen data: what was converted, what was not and why, and what it saves."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from autorev.couplings.arithmetic import FixedPoint
from autorev.couplings.presets import PRESERVING_GAMMA
from autorev.report.format import format_bytes

if TYPE_CHECKING:
    from autorev.detect.judge import Finding
    from autorev.engine.chain import ReversibleChain


@dataclass(frozen=True, slots=True)
class Saving:
    """Bytes that one chain keeps between forward and backward of the example call, side by side."""

    plain: int | None
    """By ordinary autograd; None for the turns of a loop, which are not counted one by one."""
    checkpoint: int
    """By checkpointing every block: their inputs."""
    tape: int
    """The chain's last state and its side bits."""
    stored_blocks: int | None
    """The activations of the last blocks (`keep_last`), which are needed first."""


@dataclass(frozen=True, slots=True)
class ConvertedChain:
    """One chain after its conversion. Tuples over steps, in order; `gamma` and `c` are empty for two streams."""

    name: str
    blocks: tuple[str, ...]
    steps: int
    stored_steps: int
    """Steps at the end that are stored instead of recomputed."""
    gamma: tuple[float, ...]
    c: tuple[float, ...]
    side_bits: tuple[int, ...]
    fraction_bits: int | None
    """The grid is 2^-fraction_bits; None in float arithmetic."""
    saving: Saving


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of `autorev.convert`; `print` it."""

    coupling: str
    arithmetic: str
    granularity: str
    chains: tuple[ConvertedChain, ...]
    not_converted: tuple[tuple[str, str], ...]
    """(path, reason) of every residual block that was left as it is."""
    notes: tuple[str, ...] = ()

    @property
    def preserves_function(self) -> bool:
        """Is the converted model the function that it was, up to a gamma that is too small to matter?"""
        near = all(
            abs(gamma) <= PRESERVING_GAMMA and 1 - abs(gamma) / 2 <= c <= 1
            for chain in self.chains
            for gamma, c in zip(chain.gamma, chain.c, strict=True)
        )
        return near and all(chain.gamma for chain in self.chains)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps({**asdict(self), "preserves_function": self.preserves_function}, indent=1)

    def __str__(self) -> str:
        lines = []
        for chain in self.chains:
            lines.append(
                f"{chain.name}: {len(chain.blocks)} blocks reversible, {self.coupling}{_numbers(chain)}, "
                f"{self.arithmetic}{_grid(chain)}"
            )
            lines.append(f"  kept between forward and backward, in the example call: {_kept(chain.saving)}")
        if self.preserves_function:
            lines.append("The pretrained function is preserved (gamma is small: autorev.verify shows by how much not)")
        else:
            lines.append("The pretrained function is NOT preserved: fine-tune, or train from scratch")
        for path, reason in self.not_converted[:5]:
            lines.append(f"Not converted: {path}: {reason}")
        if len(self.not_converted) > 5:
            lines.append(f"Not converted: {len(self.not_converted) - 5} more (see .not_converted)")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def _kept(saving: Saving) -> str:
    others = f"checkpointing {format_bytes(saving.checkpoint)}"
    if saving.plain is None or saving.stored_blocks is None:
        return f"{format_bytes(saving.tape)} and the stored blocks ({others})"
    return f"{format_bytes(saving.tape + saving.stored_blocks)} (plain {format_bytes(saving.plain)}, {others})"


def _numbers(chain: ConvertedChain) -> str:
    if not chain.gamma:
        return ""
    inner = set(zip(chain.gamma[1:-1], chain.c[1:-1], strict=True))
    if len(set(chain.gamma)) == 1 and len(inner) == 1:
        ends = "" if {chain.c[0], chain.c[-1]} == {chain.c[1]} else f", at the ends {chain.c[0]:g}"
        return f" (gamma {chain.gamma[0]:g}, c {chain.c[1]:g}{ends})"
    return f" (gamma {min(chain.gamma):g} to {max(chain.gamma):g})"


def _grid(chain: ConvertedChain) -> str:
    if chain.fraction_bits is None:
        return ""
    bits = sorted(set(chain.side_bits))
    shown = f"{bits[0]}" if len(bits) == 1 else f"{bits[0]} to {bits[-1]}"
    return f" (grid 2^-{chain.fraction_bits}, {shown} side bits)"


def saving_of(findings: list[Finding], chain: ReversibleChain) -> Saving:
    """Counted on the recorded call's fake tensors."""
    stream = findings[0].stream_in
    assert stream is not None
    per_block = len(chain.couplings) // len(findings)
    stored = (len(chain.couplings) - chain.stored_from) // max(per_block, 1)
    known: dict[Any, int | None] = {}
    kept = [known[kind] if (kind := _kind(f)) in known else known.setdefault(kind, _kept_by(f)) for f in findings]
    each = None if None in kept else [one for one in kept if one is not None]
    exact = isinstance(chain.arithmetic, FixedPoint)
    itemsize = 4 if exact else max(4, stream.element_size())
    side = sum(c.side_bits for c in chain.couplings[: chain.stored_from]) * stream.numel() // 8 if exact else 0
    return Saving(
        plain=None if each is None else sum(each),
        checkpoint=sum(s.numel() * s.element_size() for f in findings if (s := f.stream_in) is not None),
        tape=2 * stream.numel() * itemsize + side,
        stored_blocks=None if each is None else sum(each[len(each) - stored :]),
    )


def _kind(finding: Finding) -> Any:
    """Blocks of one kind keep the same: of one class, with parameters and a stream of the same sizes."""
    module, stream = finding.call.module, finding.stream_in
    sizes = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters())
    plain = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, bool | int | float | str))
    return type(module), sizes, plain, None if stream is None else tuple(stream.shape), finding.inline


def _kept_by(finding: Finding) -> int | None:
    """Bytes that autograd keeps for one block, parameters aside."""
    import torch

    from autorev.capture.fake import every_layer_kept

    if finding.inline:
        return None
    call = finding.call
    stream = finding.stream_in
    owned = {t.untyped_storage()._cdata for t in [*call.module.parameters(), *call.module.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    fake_mode: Any = getattr(stream, "fake_mode", None)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.enable_grad(), every_layer_kept(), hooks, fake_mode or nullcontext():
        alive = call.module.forward(*call.args, **call.kwargs)
    del alive  # held until here: what is freed early would be counted under another's number
    return sum(kept.values())
