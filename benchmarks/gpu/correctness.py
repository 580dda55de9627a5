"""Are gradients right on this device? Against the model's own code under the coupling, with every activation stored.

Each piece is something that is another on a GPU than on a CPU: generators, autocast, kernels, streams, numbers that are
read late, NaN as an integer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import autorev
from autorev.engine.mode import running
from autorev.errors import AutorevError, FixedPointRangeError, first_line, is_out_of_memory
from autorev.in_place import in_place
from autorev.methods import Method
from autorev.prediction.training import DTYPES
from autorev.profiler.passes.prepare import find_blocks
from autorev.verification import compare, verify_call
from benchmarks.gpu.device import Device, NoTwin
from benchmarks.gpu.record import Record, Row
from benchmarks.gpu.size import Size, size_for
from tests.helpers import handwritten as hand
from tests.helpers.one_step import Gradients, gradients_of, loss_of
from tests.helpers.tiny_llm import tiny_model

TITLE = "Correctness"
WHAT = "Gradients of reversible steps beside those of the oracle: the same code and coupling, every activation stored."
SHARE = 8
HEADS = ("check", "verdict", "found")
EXACT = "momentum:k=3,keep_last=0"
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Relative errors of gradients that the rounding of kernels explains, whose order of additions is not always one."""
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
ON_HOST = (
    "momentum:k=3,keep_last=0,host=side_bits",
    "momentum:k=3,keep_last=0,keep=attention,host=side_bits+attention",
    "offload",
)
REPEATED = 20
"""Steps in which a copy that comes too late would have to show."""
LARGE = 2**24
"""Bytes that are written in between, where a copy that comes too late would read them."""


def run(device: Device, size: Size, record: Record) -> None:
    """Every check."""
    for name, check in CHECKS.items():
        record.piece(name, check, size_for(device), limit=120)


def cells(row: Row, rows: list[Row]) -> list[tuple[str, ...]]:
    """As the report shows it."""
    return [(row["piece"], "right" if row["passed"] else "WRONG", row["found"])]


# -- what is compared


def llama(device: Device, dtype: str = "fp32", blocks: int = 3) -> tuple[nn.Module, dict[str, Any]]:
    """Small, with heads that fused kernels take."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=128,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=DTYPES[dtype]).to(device.torch).train()
    ids = torch.randint(128, (2, 48), generator=torch.Generator().manual_seed(0)).to(device.torch)
    return model, {"input_ids": ids, "labels": ids, "use_cache": False}


def trained(
    model: nn.Module,
    call: dict[str, Any],
    mode: str = "reversible",
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Gradients:
    """Gradients of one step from one seed, of which the forward pass runs inside `around`, as trainers have it."""
    model.zero_grad()
    torch.manual_seed(1)
    with running(mode):
        with around():
            loss = loss_of(model(**call))
        loss.backward()
    return gradients_of(model)


def verdict(error: float, tolerance: float, model: nn.Module, more: str = "", right: bool = True) -> Row:
    """Error of the gradients, and what the integrity check of the last backward pass found."""
    drift = max(autorev.drift(model).values(), default=float("nan"))
    found = f"gradient error {error:.2g} (up to {tolerance:g}), drift {drift:g}{more}"
    return {"passed": bool(error <= tolerance and drift == 0 and right), "found": found, "error": error}


def beside_oracle(model: nn.Module, call: dict[str, Any], tolerance: float, **how: Any) -> Row:
    """One step of a converted model."""
    expected = trained(model, call, "oracle", **how)
    return verdict(compare(trained(model, call, **how), expected).error, tolerance, model)


# -- the checks


def families(device: Device, size: Size, dtype: str) -> Row:
    """`autorev.verify` itself."""
    model, call = llama(device, dtype)
    autorev.convert(model, call, method=EXACT)
    found = verify_call(model, (), call)
    more = f"; loss {found.loss:.4f}, by the oracle {found.oracle_loss:.4f}"
    return verdict(found.gradient_error, found.tolerance, model, more, found.passed)


def generators(device: Device, size: Size) -> Row:
    """Dropout draws the same in the second run, and leaves the device's generator where autograd leaves it."""
    model = tiny_model("gpt2", blocks=2, dropout=0.2).to(device.torch).train()
    ids = torch.randint(250, (2, 32), generator=torch.Generator().manual_seed(0)).to(device.torch)
    call = {"input_ids": ids, "labels": ids, "use_cache": False}
    autorev.convert(model, call, method=EXACT)
    expected = trained(model, call, "oracle")
    state = device.random_state()
    found = trained(model, call)
    same = torch.equal(state, device.random_state())
    more = f"; the generator stands {'as after' if same else 'ELSEWHERE than after'} autograd's step"
    return verdict(compare(found, expected).error, TOLERANCE["fp32"], model, more, same)


class Noisy(hand.Parts):
    """Draws from a generator of its own, on its device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.noise = torch.Generator(device).manual_seed(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = 1 + 0.1 * torch.rand(x.shape, generator=self.noise, device=x.device)
        return x + self.mlp(self.norm1(x)) * factor


def own_generator(device: Device, size: Size) -> Row:
    """Of a module, by device."""
    torch.manual_seed(0)
    model = hand.Stack(*(Noisy(device.torch) for _ in range(3))).to(device.torch).train()
    call = {"tokens": torch.arange(32).view(2, 16).to(device.torch)}
    autorev.convert(model, call, method=EXACT)
    states = [block.noise.get_state() for block in model.blocks]
    expected = trained(model, call, "oracle")
    for block, state in zip(model.blocks, states, strict=True):
        block.noise.set_state(state)
    return verdict(compare(trained(model, call), expected).error, TOLERANCE["fp32"], model)


def autocast(device: Device, size: Size, dtype: torch.dtype) -> Row:
    """Forward under autocast, backward outside of it, and again with both inside."""
    model, call = llama(device)
    around = partial(torch.autocast, device.kind, dtype=dtype)
    autorev.convert(model, call, method=EXACT)
    outside = beside_oracle(model, call, TOLERANCE["bf16"], around=around)
    with around():
        inside = beside_oracle(model, call, TOLERANCE["bf16"])
    error = max(outside["error"], inside["error"])
    return verdict(error, TOLERANCE["bf16"], model, right=outside["passed"] and inside["passed"])


def attention(device: Device, size: Size, kernel: str) -> Row:
    """Is the kernel's forward the same twice, to the bit? The second run of a block relies on it."""
    dtype = "fp32" if device.kind == "cpu" or kernel == "math" else "bf16"
    around = partial(sdpa_kernel, KERNELS[kernel])
    q = torch.randn(2, 2, 48, 32, device=device.torch, dtype=DTYPES[dtype], requires_grad=True)
    attended = partial(nn.functional.scaled_dot_product_attention, q, q, q, is_causal=True)
    try:
        with around():
            twice = [attended() for _ in range(2)]
            gradients = [torch.autograd.grad(attended().float().square().sum(), q)[0] for _ in range(2)]
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise NoTwin(f"{device.kind} has no {kernel} kernel for such heads in {dtype}: {first_line(error)}") from None
    same = torch.equal(*twice)
    backward = (
        "the same" if torch.equal(*gradients) else f"off by {float((gradients[0] - gradients[1]).abs().max()):.2g}"
    )
    model, call = llama(device, dtype)
    autorev.convert(model, call, method=EXACT)
    found = beside_oracle(model, call, TOLERANCE[dtype], around=around)
    more = f"; {dtype}, two forwards {'the same' if same else 'DIFFER'}, two backwards {backward}"
    return {**found, "passed": found["passed"] and same, "found": found["found"] + more}


def host_streams(device: Device, size: Size, method: str) -> Row:
    """What waits on the host comes back whole, on the usual stream and on another one."""
    model, call = llama(device, blocks=4)
    blocks = find_blocks(model, ((), call))
    with_host = Method.parse(method)
    without = EXACT if with_host.reversible else "checkpoint"
    with in_place(model, Method.parse(without), blocks, ((), call)):
        expected = trained(model, call)
    errors, steps = [], 4 if device.quick else REPEATED
    with in_place(model, with_host, blocks, ((), call)) as placed:
        assert placed.host is not None
        for number in range(steps):
            with device.on_another_stream() if number % 2 else nullcontext():
                found = trained(model, call)
                torch.full((LARGE // 4,), float("nan"), device=device.torch)
            errors.append(compare(found, expected).error)
        left, there = placed.host.bytes, placed.host.peak
    streams = "one stream, as a CPU has" if device.kind == "cpu" else "two streams"
    right = max(errors) <= TOLERANCE["fp32"] and there > 0 and left == 0
    found = f"{steps} steps on {streams}: gradients off by {max(errors):.2g}, {there:,} bytes on the host at most"
    return {"passed": right, "found": found, "error": max(errors)}


def late_range_check(device: Device, size: Size) -> Row:
    """An activation that leaves its grid where nobody waits: the step is void, and a later one is right."""
    torch.manual_seed(0)
    model = hand.stack_of(hand.Block).to(device.torch).train()
    call = {"tokens": torch.arange(32).view(2, 16).to(device.torch)}
    autorev.convert(model, call, method=EXACT)
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.mul_(1e5)
    said = 0
    with device.not_waited_for():
        for _ in range(10):
            try:
                found = trained(model, call)
                break
            except FixedPointRangeError:
                said += 1
        else:
            return {"passed": False, "found": f"{said} steps in a row left their grid"}
    expected = trained(model, call, "oracle")
    more = f"; {said} steps were void, and said so"
    return verdict(compare(found, expected).error, TOLERANCE["fp32"], model, more, said > 0)


def waits(device: Device, size: Size) -> Row:
    """A step of twice as many blocks waits no more often for its device."""
    counts = []
    for blocks in (2, 4):
        model, call = llama(device, blocks=blocks)
        autorev.convert(model, call, method=EXACT)
        with device.not_waited_for():
            trained(model, call)
            counts.append(device.waits(partial(trained, model, call)))
    return {"passed": counts[0] == counts[1], "found": f"with 2 blocks {counts[0]} times a step, with 4 {counts[1]}"}


def not_a_number(device: Device, size: Size, value: float) -> Row:
    """In the weights of a block, or in what the chain begins with: no step goes through."""
    went_through = []
    for where in ("blocks.1.mlp.down.weight", "embedding.weight"):
        torch.manual_seed(0)
        model = hand.stack_of(hand.Block).to(device.torch).train()
        call = {"tokens": torch.arange(32).view(2, 16).to(device.torch)}
        autorev.convert(model, call, method=EXACT)
        with torch.no_grad():
            model.get_parameter(where)[0, 0] = value
        with device.not_waited_for():
            try:
                trained(model, call)
                went_through.append(where)
            except AutorevError:
                continue
    found = f"a step went through with it in {', '.join(went_through)}" if went_through else "an error, wherever it is"
    return {"passed": not went_through, "found": found}


def second_device(device: Device, size: Size) -> Row:
    """A model whose blocks lie on two."""
    if device.count < 2:
        raise NoTwin(f"there is one {device.kind} device")
    torch.manual_seed(0)
    first, second = (torch.device(device.kind, number) for number in range(2))
    model = hand.stack_of(hand.Block, 4).to(first).train()
    for module in (*model.blocks[2:], model.norm, model.head):
        module.to(second)
    model.blocks[2].register_forward_pre_hook(lambda module, args: tuple(arg.to(second) for arg in args))
    call = {"tokens": torch.arange(32).view(2, 16).to(first)}
    autorev.convert(model, call, method=EXACT)
    return beside_oracle(model, call, TOLERANCE["fp32"])


def copies(device: Device, size: Size) -> Row:
    """A copy of a converted model trains as the original does."""
    model, call = llama(device)
    autorev.convert(model, call, method=EXACT)
    twin = copy.deepcopy(model)
    return verdict(compare(trained(twin, call), trained(model, call, "oracle")).error, TOLERANCE["fp32"], twin)


CHECKS: dict[str, Callable[[Device, Size], Row]] = {
    **{f"verify, {dtype}": partial(families, dtype=dtype) for dtype in DTYPES},
    "generators of the device": generators,
    "a module's own generator": own_generator,
    "autocast to bf16": partial(autocast, dtype=torch.bfloat16),
    "autocast to fp16": partial(autocast, dtype=torch.float16),
    **{f"attention, {kernel}": partial(attention, kernel=kernel) for kernel in KERNELS},
    **{f"host, `{method}`": partial(host_streams, method=method) for method in ON_HOST},
    "the late range check": late_range_check,
    "no block waits for the device": waits,
    "NaN": partial(not_a_number, value=float("nan")),
    "infinity": partial(not_a_number, value=float("inf")),
    "two devices": second_device,
    "a copy of the model": copies,
}
