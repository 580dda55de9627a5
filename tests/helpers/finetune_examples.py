"""Fine-tuning runs for the tests of their reports: plausible figures, made without torch.

momentum()        all weights of SmolLM2-135M under momentum k=3: as good in the plain architecture
plain()           plain training by the same recipe; checkpoint() with recomputed activations
jump()            straight to leapfrog, with distillation: nothing like the plain architecture
scheduled()       gamma moved to 1 while training, with distillation and its teacher
calibrated()      side bits chosen block by block under a budget
two_streams()     hamiltonian: neither gamma nor c
lora()            adapters of rank 16
scratch(...)      a small model from random weights, by coupling and seed
interrupted()     stopped half-way
begun()           nothing but what was asked for
hostile()         names that try to break out of a report
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from autorev.analysis import ModelInfo
from autorev.finetuning.record import (
    Assignment,
    Calibration,
    Corpus,
    Evaluation,
    FineTuning,
    Recipe,
    Sensitivity,
)
from autorev.methods import Method
from tests.helpers.finetune_simulation import (
    BLOCKS,
    MIB,
    chain,
    evaluations,
    looked_at,
    losses,
    moving,
    needs,
    steps_of,
)
from tests.helpers.profile_examples import ENVIRONMENT, HOSTILE, LONG

ORIGINAL = 2.900
SMOLLM2 = ModelInfo("SmolLM2-135M-Instruct", "LlamaForCausalLM", 134_515_008, "profile smollm2-135m")
GPT2 = ModelInfo("gpt2-shape", "GPT2LMHeadModel", 1_881_344, "runs/gpt2-shape")
CORPUS = Corpus("CPython's pydoc_data.topics", 79, 109_825, 3_056, 2, packed=True)
RECIPE = Recipe("full", None, SMOLLM2.parameters, 192, 1, 1, 40, 5e-5, "fp32", "adamw", 0)
METHODS = {
    spec: Method.parse(spec) for spec in ("plain", "checkpoint", "momentum:k=3", "leapfrog", "midpoint", "hamiltonian")
}


@cache
def momentum() -> FineTuning:
    """Momentum k=3: hundredths of a nat from the plain architecture, before and after training."""
    curve = losses(2.904, 2.731, RECIPE.steps)
    return FineTuning(
        name="momentum_k3",
        model=SMOLLM2,
        pretrained=True,
        method=METHODS["momentum:k=3"],
        recipe=RECIPE,
        corpus=CORPUS,
        command="autorev finetune --method momentum:k=3 --steps 40 --lr 5e-5 --out runs/momentum_k3",
        environment=ENVIRONMENT,
        original=looked_at(0, ORIGINAL, 0.1125),
        evaluations=evaluations(curve, 40, 10, 0.0418),
        vanilla=looked_at(40, 2.728, 0.11),
        logged=tuple(steps_of(curve, RECIPE, gamma=lambda step: (0.125, 3.0))),
        chains=(chain([0.125] * BLOCKS, [1.0, *[0.9375] * (BLOCKS - 2), 1.0], [3] * BLOCKS),),
        complete=True,
        notes=("2 examples were longer than 192 tokens and lost their end",),
    )


@cache
def plain() -> FineTuning:
    """The same without a coupling."""
    curve = losses(ORIGINAL, 2.729, RECIPE.steps)
    found = evaluations(curve, 40, 10, 0.03)
    return replace(
        momentum(),
        name="plain",
        method=METHODS["plain"],
        command="autorev finetune --method plain --steps 40 --lr 5e-5 --out runs/plain",
        evaluations=found,
        vanilla=found[-1],
        logged=tuple(steps_of(curve, RECIPE, drift=None, peak=2_600 * MIB, seconds=1.4)),
        chains=(),
        notes=(),
    )


@cache
def checkpoint() -> FineTuning:
    """The same with recomputed activations."""
    curve = losses(ORIGINAL, 2.729, RECIPE.steps)
    return replace(
        plain(),
        name="checkpoint",
        method=METHODS["checkpoint"],
        logged=tuple(steps_of(curve, RECIPE, drift=None, peak=1_850 * MIB, seconds=1.8)),
    )


@cache
def jump() -> FineTuning:
    """Leapfrog from the first step on, distilled: it has not recovered, and is no plain model."""
    recipe = replace(RECIPE, steps=60, learning_rate=1e-4, distill_weight=0.5)
    curve = losses(12.038, 3.45, 60)
    return replace(
        momentum(),
        name="jump",
        method=METHODS["leapfrog"],
        recipe=recipe,
        command="autorev finetune --method leapfrog --distill --steps 60 --lr 1e-4 --out runs/jump",
        evaluations=evaluations(curve, 60, 10, 1.37),
        vanilla=looked_at(60, 7.55, 0.2),
        logged=tuple(steps_of(curve, recipe, gamma=lambda step: (1.0, 0.0), peak=2_300 * MIB, seconds=3.9)),
        chains=(chain([1.0] * BLOCKS, [1.0] * BLOCKS, [0] * BLOCKS),),
        teacher_bytes=4 * SMOLLM2.parameters,
        notes=(),
    )


@cache
def scheduled() -> FineTuning:
    """From momentum to leapfrog in 40 of 60 steps."""
    recipe = replace(jump().recipe, schedule="leapfrog", schedule_steps=40)
    curve = losses(2.904, 2.88, 60)
    return replace(
        jump(),
        name="schedule",
        method=METHODS["momentum:k=3"],
        recipe=recipe,
        command="autorev finetune --schedule leapfrog --distill --steps 60 --lr 1e-4 --out runs/schedule",
        evaluations=evaluations(curve, 60, 10, 0.3),
        logged=tuple(steps_of(curve, recipe, gamma=moving, peak=2_350 * MIB, seconds=3.9)),
        chains=(chain([1.0] * BLOCKS, [1 / (BLOCKS + 1 - i) for i in range(BLOCKS)], [0] * BLOCKS),),
    )


@cache
def calibrated() -> FineTuning:
    """Side bits by block, within 0.02 nats."""
    recipe = replace(RECIPE, max_loss_increase=0.02)
    curve = losses(2.917, 2.735, RECIPE.steps)
    bits = [next((k for k in range(4) if needs(block, k) < 0.01), 4) for block in range(BLOCKS)]
    mean = sum(bits) / BLOCKS
    sensitivities = tuple(
        Sensitivity(f"model.layers.{block}", 2.0**-k, k, needs(block, k))
        for block in range(BLOCKS)
        for k in (3, 2, 1, 0)
    )
    increases = ((4.0, -0.004), (3.0, 0.004), (2.3, 0.011), (mean, 0.0179), (1.2, 0.052), (0.6, 0.44), (0.0, 9.556))
    return replace(
        momentum(),
        name="calibrated",
        recipe=recipe,
        command="autorev finetune --max-loss-increase 0.02 --steps 40 --lr 5e-5 --out runs/calibrated",
        evaluations=evaluations(curve, 40, 10, 0.05),
        vanilla=looked_at(40, 2.74, 0.11),
        logged=tuple(steps_of(curve, recipe, gamma=lambda step: (0.3, mean))),
        chains=(chain([2.0**-k for k in bits], [0.9] * BLOCKS, bits),),
        calibration=Calibration(
            0.02,
            764,
            sensitivities,
            tuple(Assignment(round(k, 4), increase, chosen=k == mean) for k, increase in increases),
        ),
        notes=(),
    )


@cache
def two_streams() -> FineTuning:
    """Hamiltonian: side bits 0, no gamma, no c, and far from the original."""
    curve = losses(16.96, 6.9, RECIPE.steps)
    return replace(
        momentum(),
        name="hamiltonian",
        method=METHODS["hamiltonian"],
        evaluations=evaluations(curve, 40, 10, 4.1),
        vanilla=looked_at(40, 11.2, 0.2),
        logged=tuple(steps_of(curve, RECIPE, gamma=lambda step: (None, 0.0))),
        chains=(chain([], [], [0] * BLOCKS),),
        notes=(),
    )


@cache
def lora() -> FineTuning:
    """Adapters of rank 16: no copy of the original is needed to distil."""
    recipe = replace(RECIPE, trains="lora", lora_rank=16, trained_parameters=4_884_480, distill_weight=0.25)
    curve = losses(2.904, 2.79, RECIPE.steps)
    return replace(
        momentum(),
        name="lora_momentum_k3",
        recipe=recipe,
        command="autorev finetune --lora-rank 16 --distill --steps 40 --lr 5e-5 --out runs/lora_momentum_k3",
        logged=tuple(steps_of(curve, recipe, gamma=lambda step: (0.125, 3.0), peak=1_050 * MIB)),
        notes=(),
    )


@cache
def scratch(coupling: str, seed: int = 0) -> FineTuning:
    """Random weights, 120 steps."""
    ends = {"plain": 4.21, "leapfrog": 4.18, "midpoint": 4.33, "momentum:k=3": 4.2}
    end = ends[coupling] + 0.02 * seed
    recipe = Recipe("scratch", None, GPT2.parameters, 128, 8, 1, 120, 1e-3, "fp32", "adamw", seed)
    curve = losses(7.63, end, 120)
    reversible = METHODS[coupling].reversible
    found = evaluations(curve, 120, 20, None)
    gammas = {"leapfrog": 1.0, "midpoint": -1.0, "momentum:k=3": 0.125}
    gamma, bits = gammas.get(coupling, 0.0), 3 if coupling.startswith("momentum") else 0
    return FineTuning(
        name=f"scratch_{coupling.partition(':')[0]}_{seed}",
        model=GPT2,
        pretrained=False,
        method=METHODS[coupling],
        recipe=recipe,
        corpus=replace(CORPUS, training_tokens=124_582),
        command=f"autorev finetune runs/gpt2-shape --method {coupling} --seed {seed} --steps 120 --lr 1e-3",
        environment=ENVIRONMENT,
        original=Evaluation(0, 7.631, 0.0075),
        evaluations=found,
        vanilla=replace(found[-1], loss=end + 2.2) if reversible else found[-1],
        logged=tuple(
            steps_of(
                curve,
                recipe,
                gamma=(lambda step: (gamma, float(bits))) if reversible else None,
                drift=0.0 if reversible else None,
                peak=(120 if reversible else 180) * MIB,
                seconds=0.9 if reversible else 0.7,
            )
        ),
        chains=(chain([gamma] * 8, [1.0] * 8, [bits] * 8, "transformer.h"),) if reversible else (),
        complete=True,
    )


@cache
def interrupted() -> FineTuning:
    """Stopped after step 17 of 40: no final loss, nothing exported."""
    done = momentum()
    return replace(
        done,
        name="interrupted",
        evaluations=done.evaluations[:2],
        vanilla=None,
        logged=done.logged[:17],
        complete=False,
        notes=(),
    )


@cache
def begun() -> FineTuning:
    """Killed before the first evaluation."""
    return replace(interrupted(), name="begun", original=None, evaluations=(), logged=(), chains=(), calibration=None)


@cache
def hostile() -> FineTuning:
    """Every text that a user's model, data or folder can choose holds markup of every kind that is rendered."""
    text = f"{HOSTILE} {LONG}"
    done = calibrated()
    assert done.calibration is not None
    found = tuple(replace(each, block=f"{text}{each.block}") for each in done.calibration.sensitivities)
    return replace(
        done,
        name=text,
        model=ModelInfo(text, text, 1, text),
        recipe=replace(done.recipe, trains=text, dtype=text, schedule=text, schedule_steps=3),
        corpus=replace(CORPUS, source=text),
        command=text,
        environment=replace(ENVIRONMENT, machine=text, system=text, versions={"autorev": text}, commit=text),
        logged=scheduled().logged,
        chains=(replace(done.chains[0], name=text),),
        calibration=replace(done.calibration, sensitivities=found),
        notes=(text,),
    )


ALL: dict[str, Callable[[], FineTuning]] = {
    **{each.__name__: each for each in (momentum, plain, checkpoint, jump, scheduled, calibrated, two_streams, lora)},
    "scratch": lambda: scratch("leapfrog"),
    **{each.__name__: each for each in (interrupted, begun, hostile)},
}


def many() -> list[FineTuning]:
    """Runs of two models: fine-tuned and from scratch, one of them interrupted."""
    tuned = [plain(), checkpoint(), momentum(), calibrated(), two_streams(), jump(), scheduled(), lora(), interrupted()]
    return tuned + [scratch(coupling, seed) for seed in (0, 1) for coupling in ("plain", "leapfrog", "midpoint")]
