"""Modules whose own forward is taken apart into residual steps while it runs (`watch`).

`StepsOfBlock` is a block module of several steps (`granularity="sublayer"`, and the two-stream couplings).
`StepsOfLoop` is a module whose own code holds the blocks, as turns of a loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from autorev.capture.fake import fake_copy, new_fake_mode
from autorev.capture.record import RecordedCall, record
from autorev.detect.chains import detect
from autorev.detect.ends import replace_leaf
from autorev.detect.finding import Finding
from autorev.detect.judge import judge
from autorev.engine.carried import one_pass
from autorev.engine.chain import ReversibleChain
from autorev.engine.replay import hooks_of_others_off
from autorev.engine.step import Branch
from autorev.errors import AutorevError, ConversionError, one_line
from autorev.rewrite.adds import KnownAdds
from autorev.rewrite.block_forward import ReversibleForward
from autorev.rewrite.replacement import HANDLE
from autorev.rewrite.watch import Watch


@dataclass(eq=False)
class StepsOfBlock(ReversibleForward):
    """A block as several steps, each of which ends with an add in its code."""

    adds: KnownAdds = field(default_factory=KnownAdds)
    steps: int = 0
    whole: bool = False
    """Is it one step all the same, taken by its calls, the last of which is tiled?"""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """All steps of the block."""
        self.compiling.say_how(self.chain, in_steps=True)
        place, stream = self._stream(self.argument, args, kwargs)
        inputs, recomputable = self._inputs(args, kwargs, place)
        like = tree_map_only(torch.Tensor, shape_of, replace_leaf(inputs, place, stream))
        branch = Branch(None, self.path, self.block.training, self._writes(), recomputable=recomputable)
        watch = Watch(
            self.block, self.path, self.chain, self.numbers, self.steps, self.adds, branch, lambda: self._analyse(like)
        )
        with watch.watching():
            args, kwargs = replace_leaf(inputs, place, watch.begin(stream))
            del inputs, stream
            returned = self.original(*args, **kwargs)
        return watch.end(returned)

    def _analyse(self, like: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        with fake_call(self.block, *like) as recorded:
            finding = judge(recorded.root)
        if finding.captured is not None and finding.start is not None:
            ends = [step.after for step in finding.steps]
            self.adds.learn(finding, ends[-1:] if self.whole else ends, None)


@dataclass(eq=False)
class StepsOfLoop(ReversibleForward):
    """A module that holds blocks as turns of a loop: each turn is a step."""

    adds: KnownAdds = field(default_factory=KnownAdds)
    in_steps: bool = False
    """Is every residual step a turn of its own?"""

    @classmethod
    def of(cls, holder: nn.Module, findings: list[Finding], chain: ReversibleChain, in_steps: bool) -> StepsOfLoop:
        """The forward for `holder`, whose code holds the blocks of `findings`, one for each step of `chain`."""
        return cls(
            block=holder,
            path=findings[0].call.path or "(the model itself)",
            chain=chain,
            numbers=tuple(range(len(findings))),
            argument="",
            output_at=(),
            written=findings[0].call.buffers_written,
            mutates_input=False,
            adds=KnownAdds.of_loop(findings),
            in_steps=in_steps,
        )

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The holder's forward."""
        self._refuse_transforms()
        self.compiling.say_how(self.chain, in_steps=True)
        with one_pass([self.chain], (args, kwargs)):
            inputs, recomputable = self._inputs(args, kwargs)
            like = tree_map_only(torch.Tensor, shape_of, inputs)
            branch = Branch(None, self.path, self.block.training, self._writes(), recomputable=recomputable)
            watch = Watch(
                self.block,
                self.block_path,
                self.chain,
                self.numbers,
                len(self.numbers),
                self.adds,
                branch,
                lambda: self._analyse(like),
            )
            with watch.watching():
                args, kwargs = self._begun(watch, *inputs)
                del inputs
                returned = self.original(*args, **kwargs)
            if not watch.taken:
                raise ConversionError(
                    f"{self.path} was converted as a loop of {len(self.numbers)} residual blocks, and called like this "
                    "it takes none; convert again with example arguments like this call's"
                )
            return watch.end(returned)

    @property
    def block_path(self) -> str:
        """For the names of what is below."""
        return "" if self.path == "(the model itself)" else self.path

    def _begun(self, watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call's arguments; where one of them is the loop's stream, the first step begins with it."""
        for start in self.adds.starts:
            if start.argument is not None:
                place, stream = self._stream(start.argument, args, kwargs)
                return replace_leaf((args, kwargs), place, watch.begin(stream))
        return args, kwargs

    def _analyse(self, like: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        with fake_call(self.block, *like) as recorded:
            chains = detect(recorded).chains
        for chain in chains:
            if chain[0].inline and chain[0].call is recorded.root:
                turns = by_steps(chain) if self.in_steps else chain
                self.adds.learn(turns[0], [turn.end for turn in turns if turn.end is not None], turns[0].start)
                return


def by_steps(findings: list[Finding]) -> list[Finding]:
    """The turns of a loop, taken apart into one finding per residual step."""
    return [
        replace(finding, path=f"{finding.path} (step {number})", start=step.before, steps=[step], end=step.after)
        for finding in findings
        for number, step in enumerate(finding.steps)
    ]


def shape_of(tensor: torch.Tensor) -> torch.Tensor:
    """All that an analysis needs of an argument; the values are not kept alive for it."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta").requires_grad_(
        tensor.requires_grad
    )


@contextmanager
def fake_call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[RecordedCall]:
    """A recorded call of a weightless copy of `block` with its own forward; fake tensors are switched on.

    Raises:
        ConversionError: the block cannot be copied, or its forward asks for values.
    """
    try:
        with torch.inference_mode(False):  # tensors made in inference mode count no writes
            mode = new_fake_mode()
            twin = fake_copy(block, mode)
            for module in twin.modules():
                for replacement in reversed(module.__dict__.get(HANDLE, [])[:]):
                    replacement.remove()
            fake_args, fake_kwargs = fake_copy((args, kwargs), mode)
            # A checkpoint around the model must not take what is saved here for its own.
            with hooks_of_others_off(), mode, _without_hooks(twin):
                yield record(twin, fake_args, fake_kwargs)
    except AutorevError:
        raise
    except Exception as error:
        raise ConversionError(
            f"{type(block).__name__} cannot be analysed as it is called now ({one_line(error)}); use "
            "granularity='block', or exclude it"
        ) from error


@contextmanager
def _without_hooks(block: nn.Module) -> Iterator[None]:
    """The user's hooks are for the user's calls: one that collects outputs must not collect these."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept = [(module, name, module.__dict__[name]) for module in block.modules() for name in names]
    try:
        for module, name, _ in kept:
            module.__dict__[name] = OrderedDict()
        yield
    finally:
        for module, name, hooks in kept:
            module.__dict__[name] = hooks
