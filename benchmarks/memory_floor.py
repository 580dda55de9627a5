"""The memory floor of a training step: what every method holds beside the weights, by the allocator and as predicted.

    python -m benchmarks.memory_floor [BLOCKS ...] > benchmarks/memory_floor_MACHINE_DATE.md
    python -m benchmarks.memory_floor --predicted 48

A Llama of width 256, 4,096 tokens, LoRA, fp32, chunked loss. U is one hidden state (4 MiB here). `keeps` is what is
alive between forward and backward, `peak` the highest point of the second step; weights and optimiser state, which are
the same for all, are left out of both.
"""

from __future__ import annotations

import gc
import sys
import time
import warnings
from dataclasses import replace

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from autorev.analysis import Category
from autorev.in_place import in_place
from autorev.integrations.building import building
from autorev.methods import Method
from autorev.models.from_config import transformers_workload
from autorev.pipeline import prepare
from autorev.profiler.job import Source
from autorev.profiler.passes.allocator import measure_memory
from autorev.profiler.passes.prepare import find_blocks, prepare_model
from autorev.profiler.passes.step import TrainingStep, optimizer_for
from autorev.workload import Workload

WIDTH, TOKENS, RANK = 256, 4096, 8
BLOCKS = (8, 24, 48)
METHODS = (
    "plain",
    "plain:tile=auto",
    "checkpoint",
    "checkpoint:tile=auto",
    "offload",
    "offload:tile=auto",
    "momentum:k=3,keep_last=0",
    "momentum:k=3,keep_last=0,tile=auto",
    "momentum:k=3,keep_last=0,tile=auto,host=side_bits",
    "momentum:k=3,granularity=sublayer,keep_last=0,tile=auto",
    "leapfrog:keep_last=0",
    "leapfrog:keep_last=0,tile=auto",
)

FEW = ("checkpoint", "checkpoint:tile=auto", "momentum:k=3,keep_last=0,tile=auto", "leapfrog:keep_last=0,tile=auto")
"""Of more than `DEEP` blocks, whose steps take a minute."""
DEEP = 24


def config_of(blocks: int) -> LlamaConfig:
    """Llama-3.1-8B's proportions at a sixteenth of its width."""
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 7 // 2,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
    )


def workload_of(blocks: int) -> Workload:
    """With random weights."""
    config = config_of(blocks)

    def build(dtype: torch.dtype) -> nn.Module:
        with building(dtype):
            model: nn.Module = LlamaForCausalLM._from_config(config, dtype=dtype)
        return model

    return transformers_workload(config, LlamaForCausalLM, build, f"llama-{blocks}", "a config")


def main(depths: tuple[int, ...], measured: bool) -> None:
    """Print a Markdown table for each depth."""
    warnings.filterwarnings("ignore")
    unit = WIDTH * TOKENS * 4
    for blocks in depths:
        workload = workload_of(blocks)
        analysis, forecaster = prepare(
            workload, device="cpu", batch=1, sequence=TOKENS, dtype="fp32", lora_rank=RANK, loss="chunked"
        )
        assert analysis.setting is not None
        print(f"\n## {blocks} blocks\n")
        heads = ("keeps", "peak", "predicted", "error", "on the host", "seconds")
        heads = heads if measured else ("keeps, predicted", "peak, predicted", "on the host")
        print(f"| method | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}", flush=True)
        for spec in METHODS if blocks <= DEEP or not measured else FEW:
            method = forecaster.settled(Method.parse(spec))
            predicted = forecaster.prediction(method, forecaster.trace(method, 1, TOKENS))
            # The optimiser's state of a warm step, and the weights.
            beside = sum(predicted.categories[c] for c in (Category.PARAMETERS, Category.OPTIMIZER_STATE))
            if not measured:
                peak, host = predicted.peak_bytes - beside, predicted.host_bytes
                print(f"| `{spec}` | {predicted.kept_bytes / unit:.2f} U | {peak / unit:.2f} U | {host / unit:.2f} U |")
                continue
            model, call = workload.build(torch.float32).train(), workload.example(1, TOKENS)
            source = Source(None, None, None, None, "cpu", 2)
            ready = prepare_model(source, analysis.setting, find_blocks(model, call), (model, call))
            with in_place(ready.model, replace(method, loss="chunked"), ready.blocks, ready.call) as placed:
                step = TrainingStep(ready.model, ready.call, optimizer_for(ready.model, "adamw"), None)
                step.run()
                began = time.perf_counter()
                memory = measure_memory(step)
                took = time.perf_counter() - began
            host = (placed.host.peak if placed.host else 0) / unit
            error = predicted.peak_bytes / memory.peak_bytes - 1
            print(
                f"| `{spec}` | {memory.kept_bytes / unit:.2f} U | {(memory.peak_bytes - beside) / unit:.2f} U "
                f"| {(predicted.peak_bytes - beside) / unit:.2f} U | {error:+.2%} | {host:.2f} U | {took:.0f} |",
                flush=True,
            )
            del step, ready, model, placed
            gc.collect()


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if word != "--predicted"]
    main(tuple(map(int, given)) or BLOCKS, measured=len(given) == len(sys.argv) - 1)
