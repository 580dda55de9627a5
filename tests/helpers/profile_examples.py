"""Profiles for the tests of reports, exports and advice: plausible figures, made without torch.

smollm2()        SmolLM2-135M, nine methods, everything measured
lora()           the same with LoRA, and sweeps of the sequence
deep(blocks)     a narrow, deep model from scratch, and sweeps of the batch under a budget
interrupted()    stopped half-way
predicted_only() nothing measured
unequal()        an image model: out of memory, refused, failed
hostile()        names and reasons that try to break out of a report
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

from autorev.analysis import DeviceInfo, ModelInfo, Recommendation
from autorev.profiler.advise import advise
from autorev.profiler.record import Environment, Point, Profile, Result, Status
from autorev.setting import Setting
from tests.helpers import profile_simulation as simulated
from tests.helpers.profile_simulation import METHODS, Method, Model

MIB = 2**20
CPU = DeviceInfo(
    name="2-core-cpu",
    title="two cores of an Intel Xeon",
    memory_bytes=8 * 2**30,
    peak_flops=2.2e11,
    bandwidth=3.0e10,
    host_bandwidth=3.0e10,
)
ENVIRONMENT = Environment(
    date="2026-11-26T10:15:00+00:00",
    machine="Intel Xeon Platinum 8481C",
    system="Linux 6.8 (x86_64)",
    cores=2,
    threads=2,
    memory_bytes=CPU.memory_bytes,
    versions={"autorev": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.12.3"},
    commit="be4b61c",
)
SMOLLM2 = Model(134_515_008, 134_515_008, 30, 576, 52_000, 49_152, 1.3e11, "model.layers")
SMOLLM2_LORA = replace(SMOLLM2, parameters=134_515_008 + 4_884_480, trained=4_884_480)
VIT = Model(86_567_656, 86_567_656, 12, 768, 61_000, 5, 1.3e11, "vit.encoder.layer")
IMAGE_TOKENS = 197


@cache
def smollm2() -> Profile:
    """All weights of SmolLM2-135M, four samples of 256 tokens: blocks weigh most, then logits, then the optimiser."""
    setting = Setting(4, 256, "fp32", "adamw", "full", None, "full", CPU.name)
    specs = (
        *("plain", "checkpoint", "sac", "offload", "momentum:k=3", "momentum:k=2", "leapfrog"),
        *("momentum:k=3,keep_last=20", "momentum:k=3,loss=chunked"),
    )
    return advised(
        Profile(
            name="smollm2-135m",
            model=ModelInfo("SmolLM2-135M-Instruct", "LlamaForCausalLM", 134_515_008, "profile smollm2-135m"),
            pretrained=True,
            blocks=30,
            setting=setting,
            device=CPU,
            text="Python's language reference, from pydoc",
            command="autorev profile smollm2-135m --batch 4 --sequence 256",
            environment=ENVIRONMENT,
            memory_limit=None,
            budget_bytes=None,
            goal="memory",
            results=tuple(result(SMOLLM2, METHODS[spec], 1024, 2.848) for spec in specs),
            complete=True,
            notes=("LoRA rank has no effect when all weights are trained",),
        )
    )


@cache
def lora() -> Profile:
    """LoRA on SmolLM2-135M, and how long the sequence may get in 2 GiB."""
    base = smollm2()
    specs = ("plain", "checkpoint", "momentum:k=3", "momentum:k=3,loss=chunked")
    budget = 2 * 2**30
    return advised(
        replace(
            base,
            name="smollm2-135m-lora",
            setting=replace(base.setting, trains="lora", lora_rank=16),
            command="autorev profile smollm2-135m --batch 4 --sequence 256 --trains lora --goal context --budget 2GiB",
            memory_limit="2GiB",
            budget_bytes=budget,
            goal="context",
            results=tuple(result(SMOLLM2_LORA, METHODS[spec], 1024, 2.848) for spec in specs),
            points=tuple(sweep(SMOLLM2_LORA, "sequence", specs, 4, budget)),
            notes=(),
        )
    )


@cache
def deep(blocks: int) -> Profile:
    """A GPT-2-like model of width 512 from scratch, with the largest batch within 128 MiB beside the fixed memory."""
    parameters = blocks * 12 * 512**2 + 2048 * 512
    model = Model(parameters, parameters, blocks, 512, 36_000, 2048, 1.3e11, "transformer.h", 4, 0.008, True)
    specs = ("plain", "checkpoint", "momentum:k=3", "leapfrog")
    budget = 16 * parameters + 128 * MIB
    return advised(
        Profile(
            name=f"gpt2-512-{blocks}",
            model=ModelInfo(f"gpt2-512-{blocks}", "GPT2LMHeadModel", parameters, "factory benchmarks.deep:gpt2"),
            pretrained=False,
            blocks=blocks,
            setting=Setting(1, 64, "fp32", "adamw", "full", None, "full", CPU.name),
            device=CPU,
            text="Python's language reference, as bytes",
            command=f"autorev profile benchmarks.deep:gpt2_{blocks} --sweep batch --budget +128MiB --goal throughput",
            environment=ENVIRONMENT,
            memory_limit="+128MiB",
            budget_bytes=budget,
            goal="throughput",
            results=tuple(bounded(result(model, replace(METHODS[spec], loss=0.0), 64, 7.62), budget) for spec in specs),
            points=tuple(sweep(model, "batch", specs, 64, budget)),
            complete=True,
        )
    )


def advised(profile: Profile) -> Profile:
    """With what the advice says to it."""
    return replace(profile, recommendation=advise(profile))


def bounded(done: Result, budget: int) -> Result:
    """The result, or that it did not fit."""
    assert done.memory is not None
    if done.memory.peak_bytes <= budget:
        return done
    reason = f"stopped at the budget of {budget:,} bytes in {done.memory.phase}"
    return Result(done.method, Status.OUT_OF_MEMORY, reason, prediction=done.prediction)


@cache
def interrupted() -> Profile:
    """Stopped: two methods are done, one has memory but no times, the rest wait."""
    base = smollm2()
    results = list(base.results[:2])
    results.append(replace(base.results[2], rounds=(), work=None, fidelity=None, status=Status.PENDING))
    results += [pending(each) for each in base.results[3:]]
    return replace(base, results=tuple(results), recommendation=None, complete=False)


def pending(done: Result) -> Result:
    """The same method before anything of it was measured."""
    return Result(done.method, Status.PENDING, prediction=done.prediction)


@cache
def predicted_only() -> Profile:
    """What `--predict` writes."""
    base = smollm2()
    results = tuple(
        Result(each.method, Status.PREDICTED, side_bits=each.side_bits, prediction=each.prediction)
        for each in base.results
        if each.prediction is not None
    )
    return advised(replace(base, name="smollm2-135m-predicted", results=results))


@cache
def unequal() -> Profile:
    """A ViT without a sequence axis on a budget: plain does not fit, one is refused, one fails, times are in doubt."""
    tokens, budget = 32 * IMAGE_TOKENS, 4_600 * MIB
    base = smollm2()
    noisy = tuple(simulated.rounds(VIT, METHODS["momentum:k=3"], tokens, width=0.3))

    def ended(spec: str, status: Status, reason: str) -> Result:
        how = METHODS[spec]
        prediction = simulated.prediction(VIT, how, tokens) if spec == "plain" else None
        return Result(how.method, status, reason, prediction=prediction)

    return advised(
        replace(
            base,
            name="vit-base",
            model=ModelInfo("vit-base-patch16-224", "ViTForImageClassification", VIT.parameters, "factory shop:vit"),
            blocks=12,
            setting=Setting(32, None, "fp32", "adamw", "full", None, "full", CPU.name),
            text="random images",
            command="autorev profile shop:vit --batch 32 --budget 4600MiB",
            memory_limit="4600MiB",
            budget_bytes=budget,
            results=(
                ended("plain", Status.OUT_OF_MEMORY, "stopped at 4.49 GiB in forward, in block vit.encoder.layer.11"),
                result(VIT, METHODS["checkpoint"], tokens, 1.609, 0),
                ended("sac", Status.FAILED, "RuntimeError: the process ended with signal 9 in round 1"),
                replace(result(VIT, METHODS["momentum:k=3"], tokens, 1.609, 0), rounds=noisy),
                ended(
                    "hamiltonian",
                    Status.REFUSED,
                    "parallel: attention and MLP read the same input (modeling_vit.py:310)",
                ),
            ),
            notes=("the text's loss is that of the training batch",),
        )
    )


HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>[red]|`*_\x1b[31m\n# \u202e"
LONG = "verylongword" * 40


@cache
def hostile() -> Profile:
    """Every text that a user's code can choose holds markup of every kind that is rendered."""
    base = unequal()
    text = f"{HOSTILE} {LONG}"
    results = []
    for each in base.results:
        memory, work, fidelity = each.memory, each.work, each.fidelity
        if memory is not None:
            named = tuple(replace(h, path=text if i % 2 else LONG) for i, h in enumerate(memory.holders))
            memory = replace(memory, holders=named)
        if work is not None:
            work = replace(work, blocks=tuple(replace(block, path=text) for block in work.blocks))
        if fidelity is not None:
            fidelity = replace(fidelity, drift=dict.fromkeys(map(str, [text]), 0.0))
        reason = text if each.reason else ""
        results.append(replace(each, reason=reason, memory=memory, work=work, fidelity=fidelity))
    return replace(
        base,
        model=ModelInfo(text, text, 1, text),
        device=replace(CPU, title=text),
        text=text,
        command=text,
        environment=replace(ENVIRONMENT, machine=text, system=text, versions={"autorev": text}, commit=text),
        results=tuple(results),
        recommendation=Recommendation(results[1].method.spec, text, (text,)),
        notes=(text,),
    )


def all_examples() -> tuple[Profile, ...]:
    """One of each, hostile ones included."""
    return (smollm2(), lora(), deep(24), interrupted(), predicted_only(), unequal(), hostile())


def result(model: Model, how: Method, tokens: int, loss: float, text: int = 4096) -> Result:
    """One method, everything measured."""
    return Result(
        method=how.method,
        status=Status.MEASURED,
        rounds=tuple(simulated.rounds(model, how, tokens)),
        memory=simulated.memory(model, how, tokens),
        work=simulated.work(model, how, tokens),
        fidelity=simulated.fidelity(how, loss, model.path, text),
        side_bits=how.side_bits,
        prediction=simulated.prediction(model, how, tokens),
    )


def sweep(model: Model, axis: str, specs: Sequence[str], other: int, budget: int) -> Iterator[Point]:
    """Powers of two that fit `budget`, the largest value that fits, and the next one, which does not."""
    for spec in specs:
        how = METHODS[spec]

        def peak(value: int, how: Method = how) -> int:
            return simulated.memory(model, how, value * other).peak_bytes

        largest, beyond = 0, 1
        while peak(beyond) <= budget:
            largest, beyond = beyond, 2 * beyond
        while beyond - largest > 1:
            middle = (largest + beyond) // 2
            largest, beyond = (middle, beyond) if peak(middle) <= budget else (largest, middle)
        smallest = 64 if axis == "sequence" else 1
        for value in sorted({2**i for i in range(20) if smallest <= 2**i <= largest} | ({largest} - {0})):
            timed = simulated.rounds(model, how, value * other, count=1)[0].steps
            yield Point(axis, value, spec, Status.MEASURED, peak(value), timed, largest=value == largest)
        reason = f"stopped at the budget of {budget:,} bytes"
        yield Point(axis, largest + 1, spec, Status.OUT_OF_MEMORY, None, reason=reason)
