"""The reversible libraries of PyPI beside autorev, on a stack that all of them can run: python -m benchmarks.peers

    pip install --no-deps memcnn revtorch momentumnet

Twelve blocks x + f(x) of width 512, f = norm, linear 512 -> 2048, GELU, linear back, 2,048 tokens, float32. Two-stream
libraries get the same f's two by two, on two streams of width 512. Gradients are compared with the same equations under
ordinary autograd; time and memory are those of one forward and backward pass.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autorev
from benchmarks.workloads import peak_of

WIDTH, BLOCKS, TOKENS, ROUNDS = 512, 12, 2048, 5
GAMMA = 7 / 8
"""For momentumnet, whose own default is 0.9, a number that both can have."""


class Block(nn.Module):
    """x + f(x)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * WIDTH, WIDTH),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One residual step."""
        return x + self.f(x)


class Stack(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(BLOCKS))
        self.checkpointed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All blocks."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


Run = Any
"""A module [tokens, width] -> [tokens, width]."""


def autorev_run(stack: Stack, **how: Any) -> Run:
    """A converted copy."""
    own = copy.deepcopy(stack)
    autorev.convert(own, batch=(torch.zeros(4, WIDTH),), **how)
    return own


def checkpointed(stack: Stack) -> Run:
    """PyTorch's own."""
    own = copy.deepcopy(stack)
    own.checkpointed = True
    return own


def memcnn_run(stack: Stack) -> Run:
    """Pairs of f's as AdditiveCoupling."""
    import memcnn

    fs = [block.f for block in copy.deepcopy(stack).blocks]
    layers = nn.Sequential(
        *(
            memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g, split_dim=1), keep_input=False)
            for f, g in zip(fs[::2], fs[1::2], strict=True)
        )
    )
    return _in_order(_two_streams(layers), fs)


def revtorch_run(stack: Stack) -> Run:
    """Pairs of f's as ReversibleBlock."""
    import revtorch

    fs = [block.f for block in copy.deepcopy(stack).blocks]
    blocks = [revtorch.ReversibleBlock(f, g, split_along_dim=1) for f, g in zip(fs[::2], fs[1::2], strict=True)]
    return _in_order(_two_streams(revtorch.ReversibleSequence(nn.ModuleList(blocks))), fs)


def momentumnet_run(stack: Stack) -> Run:
    """The f's as a MomentumNet."""
    import momentumnet

    fs = [block.f for block in copy.deepcopy(stack).blocks]
    return _in_order(momentumnet.MomentumNet(fs, gamma=GAMMA, init_speed=0, use_backprop=False), fs)


def _in_order(run: Run, fs: list[nn.Module]) -> Run:
    run.own_fs = fs  # a plain list: not registered once more
    return run


def _two_streams(layers: nn.Module) -> Run:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            both: torch.Tensor = self.layers(torch.cat([x, x], 1))
            return both[:, WIDTH:]

    return Doubled()


def equations(stack: Stack, name: str) -> Run:
    """What a run should compute, under ordinary autograd."""
    own = copy.deepcopy(stack)
    fs = [block.f for block in own.blocks]

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fs = nn.ModuleList(fs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if name == "two streams":
                a, b = x, x
                for f, g in zip(fs[::2], fs[1::2], strict=True):
                    a = a + f(b)
                    b = b + g(a)
                return b
            v = torch.zeros_like(x)
            for f in fs:
                v = GAMMA * v + (1 - GAMMA) * f(x)
                x = x + v
            return x

    return _in_order(Plain(), fs)


def gradients(run: Any, x: torch.Tensor) -> torch.Tensor:
    """Of the mean square, all in one row, block by block (the libraries register them otherwise)."""
    run.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    run(x.clone().requires_grad_()).square().mean().backward()
    fs = getattr(run, "own_fs", None) or [block.f for block in run.blocks]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for f in fs for p in f.parameters()]
    return torch.cat([g.flatten() for g in grads])


def main() -> None:
    """Print a Markdown table."""
    warnings.simplefilter("ignore")
    rows: list[tuple[str, Callable[[Stack], Run], str | None]] = [
        ("plain autograd", copy.deepcopy, None),
        ("torch.utils.checkpoint", checkpointed, None),
        (
            "autorev, hamiltonian, float",
            lambda s: autorev_run(s, method="hamiltonian", arithmetic="float"),
            "two streams",
        ),
        ("memcnn 1.5.2, additive", memcnn_run, "two streams"),
        ("revtorch 0.2.4, additive", revtorch_run, "two streams"),
        ("autorev, momentum 7/8, exact", lambda s: autorev_run(s, gamma=GAMMA, c=1 - GAMMA), "momentum"),
        ("momentumnet 0.10, gamma 7/8", momentumnet_run, "momentum"),
    ]
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    runs = {name: make(Stack(0.0)) for name, make, _ in rows}
    steps = {name: (lambda run=run: gradients(run, x)) for name, run in runs.items()}
    peaks = {name: peak_of(runs[name], step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    print("| library | s a step (median of 5) | peak MiB | gradient error | with dropout 0.1 |")
    print("|---|---:|---:|---:|---:|")
    for name, make, what in rows:
        errors = []
        for dropout in (0.0, 0.1):
            stack = Stack(dropout)
            try:
                expected = gradients(equations(stack, what) if what else stack, x)
                errors.append(f"{float((gradients(make(stack), x) - expected).norm() / expected.norm()):.1e}")
            except Exception as error:  # a row of the table, not the end of it
                errors.append(type(error).__name__)
        row = f"{statistics.median(seconds[name]):.2f} | {peaks[name] / 2**20:.0f}"
        print(f"| {name} | {row} | {errors[0]} | {errors[1]} |", flush=True)


if __name__ == "__main__":
    main()
