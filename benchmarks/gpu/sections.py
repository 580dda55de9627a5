"""The kit's sections, in the order in which they run: a module each, with `run(device, size, record)`."""

from __future__ import annotations

from types import ModuleType

from benchmarks.gpu import context, correctness, coupling, memory, qlora, ranks, speed

SECTIONS: dict[str, ModuleType] = {
    "correctness": correctness,
    "memory": memory,
    "speed": speed,
    "context": context,
    "coupling": coupling,
    "qlora": qlora,
    "ranks": ranks,
}
EVERYWHERE = ("correctness",)
"""Those that need no allocator's figures, which the profiler reads on cpu and cuda."""
