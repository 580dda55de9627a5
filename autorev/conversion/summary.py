"""What `convert` did, as frozen data: what was converted, what was not and why, and what it saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from autorev.couplings.arithmetic import FixedPoint
from autorev.couplings.presets import PRESERVING_GAMMA
from autorev.couplings.velocity import Velocity
from autorev.format import format_bytes, plural
from autorev.rewrite.built import BuiltChain


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of one training step of the example call, beside parameters, their gradients and the optimiser's state."""

    kept: int
    """What the blocks keep between forward and backward."""
    peak: int
    """At the highest point of the step."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The same step side by side."""

    plain: Held
    """Under ordinary autograd."""
    checkpoint: Held
    """With a checkpoint around every block."""
    converted: Held


@dataclass(frozen=True, slots=True)
class ConvertedChain:
    """One chain after its conversion. Tuples over steps, in order; `gamma` and `c` are empty for two streams."""

    name: str
    blocks: tuple[str, ...]
    streams: int
    """How many the blocks carry side by side."""
    steps: int
    stored_steps: int
    """Steps at the end that are stored instead of recomputed."""
    stored_blocks: int
    """The blocks they are: `keep_last`, as it was given or chosen."""
    plain_blocks: int
    """How many blocks before those are stored, too: with gamma = 0 nothing inverts them."""
    why_stored: str
    """Why so many, in words."""
    gamma: tuple[float, ...]
    c: tuple[float, ...]
    side_bits: tuple[int, ...]
    fraction_bits: int | None
    """The grid is 2^-fraction_bits; None in float arithmetic."""

    @classmethod
    def of(cls, built: BuiltChain, why_stored: str) -> ConvertedChain:
        """What there is to say of a chain that was built."""
        chain = built.chain
        velocities = [c for c in chain.couplings if isinstance(c, Velocity)]
        steps = (chain.couplings[a:b] for a, b in pairwise([*built.first, len(chain.couplings)]))
        recomputed = [any(c.invertible for c in of_block) for of_block in steps][: len(built.findings) - built.kept]
        return cls(
            name=chain.name,
            blocks=tuple(finding.path for finding in built.findings),
            streams=built.lanes,
            steps=len(chain.couplings),
            stored_steps=len(chain.couplings) - chain.stored_from,
            stored_blocks=built.kept,
            plain_blocks=recomputed.count(False),
            why_stored=why_stored,
            gamma=tuple(float(c.gamma) for c in velocities),
            c=tuple(c.c for c in velocities),
            side_bits=tuple(c.side_bits for c in chain.couplings),
            fraction_bits=chain.arithmetic.fraction_bits if isinstance(chain.arithmetic, FixedPoint) else None,
        )


@dataclass(frozen=True)
class Conversion:
    """The result of `autorev.convert`; `print` it."""

    coupling: str
    arithmetic: str
    granularity: str
    chains: tuple[ConvertedChain, ...]
    not_converted: tuple[tuple[str, str], ...]
    """(path, reason) of every residual block that was left as it is."""
    checkpointed: tuple[str, ...] = ()
    """Blocks that PyTorch's own checkpoint was put around."""
    tile: int | str | None = None
    """Positions at a time, or auto."""
    tiled: tuple[str, ...] = ()
    """Modules that run so."""
    not_tiled: tuple[tuple[str, str], ...] = ()
    """(path, reason) of those that do not, and keep as much for backward."""
    compiled: str | None = None
    """blocks: every branch by itself; graph: a training pass as a whole; None: nothing, by `convert`."""
    why_not_graph: str | None = None
    """Why blocks are, where a graph was asked for."""
    notes: tuple[str, ...] = ()
    simulated: Callable[[], Memory | str] = field(default=lambda: "it was not asked for", repr=False, compare=False)
    """Simulates a training step of the example call; a string says why it cannot be."""

    @cached_property
    def _found(self) -> Memory | str:
        return self.simulated()

    @property
    def memory(self) -> Memory | None:
        """Of a training step of the example call, simulated when it is first read; None where it cannot be."""
        return None if isinstance(self._found, str) else self._found

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the figures, not the fake model that they are simulated on."""
        return {**{name: value for name, value in vars(self).items() if name != "simulated"}, "_found": self._found}

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
        plain = ("coupling", "arithmetic", "granularity", "not_converted", "checkpointed")
        told = {
            name: getattr(self, name)
            for name in (*plain, "tile", "tiled", "not_tiled", "compiled", "why_not_graph", "notes")
        }
        told["chains"] = [asdict(chain) for chain in self.chains]
        told["memory"] = None if self.memory is None else asdict(self.memory)
        return json.dumps({**told, "preserves_function": self.preserves_function}, indent=1)

    def __str__(self) -> str:
        lines = [
            f"{chain.name}: {_reversible(chain)}, {self.coupling}{_numbers(chain)}, {self.arithmetic}{_grid(chain)}"
            for chain in self.chains
        ]
        if not self.chains:
            lines.append(f"{plural(len(self.checkpointed), 'block')} run twice ({self.coupling}); none is reversible")
        lines += _compared(self._found, self.chains, len(self.not_converted))
        lines += dict.fromkeys(line for chain in self.chains for line in _stored(chain, len(self.chains)))
        lines += _tiled(self.tile, self.tiled, self.not_tiled)
        lines += _compiled(self.compiled, self.why_not_graph)
        if not self.chains:
            lines.append("The function is the model's own")
        elif self.preserves_function:
            lines.append(
                "The pretrained function is nearly preserved (gamma is small): autorev.verify prints by how much"
            )
        else:
            lines.append("The pretrained function is NOT preserved: fine-tune, or train from scratch")
        for path, reason in self.not_converted[:5]:
            lines.append(f"Not converted: {path}: {reason}")
        if len(self.not_converted) > 5:
            lines.append(f"Not converted: {len(self.not_converted) - 5} more (see .not_converted)")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def _reversible(chain: ConvertedChain) -> str:
    count = len(chain.blocks)
    recomputed = count - chain.stored_blocks - chain.plain_blocks
    if recomputed <= 0:
        return f"{plural(count, 'block')} converted, and none of them recomputed"
    return f"{f'{count - chain.plain_blocks} of ' if chain.plain_blocks else ''}{plural(count, 'block')} reversible"


def _stored(chain: ConvertedChain, chains: int) -> Iterator[str]:
    if chain.stored_blocks == 0:
        what = "No block is"
    elif chain.stored_blocks == 1:
        what = "The last block is"
    else:
        what = f"The last {chain.stored_blocks} blocks are"
    where = f" of {chain.name}" if chains > 1 else ""
    yield f"{what} stored{where} (keep_last={chain.stored_blocks}): {chain.why_stored}"
    if chain.plain_blocks:
        yield f"With gamma = 0 nothing inverts a block: {plural(chain.plain_blocks, 'more block')}{where} stored"


def _tiled(tile: int | str | None, tiled: tuple[str, ...], others: tuple[tuple[str, str], ...]) -> Iterator[str]:
    if tile is None:
        return
    size = "a tile" if tile == "auto" else plural(int(tile), "position")
    yield f"{plural(len(tiled), 'module')} ({tiled[0]}, ...) run {size} at a time (tile={tile})"
    if others:
        path, reason = others[0]
        yield f"Not tiled: {path}: {reason}" + (f" (and {len(others) - 1} more)" if len(others) > 1 else "")


def _compiled(compiled: str | None, why_not_graph: str | None) -> Iterator[str]:
    if compiled == "graph":
        yield "A call that records gradients is compiled as one graph (compile=graph)"
    elif compiled == "blocks":
        yield "Branches are compiled, each by itself (compile=blocks)"
    if why_not_graph:
        yield f"Not one graph: {why_not_graph}"


def _compared(memory: Memory | str, chains: tuple[ConvertedChain, ...], left_out: int) -> Iterator[str]:
    if isinstance(memory, str):
        yield f"  what it saves was not counted: a training step of the example call cannot be simulated ({memory})"
        return
    plain, checkpoint, converted = memory.plain, memory.checkpoint, memory.converted

    def beside(own: int, of_plain: int, of_checkpoint: int) -> str:
        return f"{format_bytes(own)} (plain {format_bytes(of_plain)}, checkpointing {format_bytes(of_checkpoint)})"

    kept = beside(converted.kept, plain.kept, checkpoint.kept)
    peak = beside(converted.peak, plain.peak, checkpoint.peak)
    yield f"  kept between forward and backward, in the example call: {kept}"
    yield f"  at the peak of that step, beside weights, their gradients and optimiser state: {peak}"
    if chains and converted.peak > min(plain.peak, checkpoint.peak):
        lower = "plain training" if plain.peak <= checkpoint.peak else "checkpointing"
        yield f"Do not convert to save memory: {lower} peaks lower here, {_because(memory, chains, left_out)}"


def _because(memory: Memory, chains: tuple[ConvertedChain, ...], left_out: int) -> str:
    if memory.converted.kept <= memory.checkpoint.kept:
        return "because the chain's streams and their gradients lie beside the block that is computed"
    blocks = sum(len(chain.blocks) for chain in chains)
    streams = sum(chain.streams for chain in chains)
    where = plural(len(chains), "chain") if streams == len(chains) else f"each of {streams} streams"
    text = (
        f"because two streams in 32 bits for {where}, side bits and stored blocks take more "
        f"than the inputs of {plural(blocks, 'block')}"
    )
    if left_out:
        text += f", and the {plural(left_out, 'block')} that {'is' if left_out == 1 else 'are'} not converted keep all"
    return text


def _numbers(chain: ConvertedChain) -> str:
    if not chain.gamma:
        return ""
    inner, ends = chain.c[1:-1], {chain.c[0], chain.c[-1]}
    text = f"gamma {_range(chain.gamma)}, c {_range(inner or chain.c)}"
    if inner and ends != set(inner):
        text += f", at the ends {_range(ends)}"
    return f" ({text})"


def _grid(chain: ConvertedChain) -> str:
    if chain.fraction_bits is None:
        return ""
    return f" (grid 2^{-chain.fraction_bits}, {_range(chain.side_bits)} side bits)"


def _range(numbers: Iterable[float]) -> str:
    """`0.125`, or `0.125 to 0.5` where the numbers differ as they are shown."""
    shown = list(dict.fromkeys(f"{number:g}" for number in sorted(numbers)))
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"
