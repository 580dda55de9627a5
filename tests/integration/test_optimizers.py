"""Optimisers: what they hold against the allocator, and what they make of weights against the same rule run plainly.

The truth is made by the libraries' own classes, and by one optimiser for each parameter in torch's tutorial's way.

python -m pytest tests/integration/test_optimizers.py
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import autorev
from autorev.analysis import Category
from autorev.cli import main
from autorev.errors import SettingError, TrainingError
from autorev.integrations.optimizers import make_optimizer
from autorev.optimizers import KINDS, Optimizer
from autorev.pipeline import prepare
from autorev.prediction.forecast import Forecaster
from autorev.prediction.training import DTYPES
from autorev.profiler.passes.step import storage_bytes
from autorev.workload import Workload
from tests.helpers.a_gpu import be_a_gpu
from tests.helpers.allocator import highest
from tests.integration.test_prediction import FAMILIES, predict, workload_of

pytestmark = pytest.mark.usefixtures("one_thread")


def eight_bits(parameters: list[nn.Parameter], model: nn.Module) -> torch.optim.Optimizer:
    """bitsandbytes' own, with fp32 states for embeddings, as a Trainer has them."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW(parameters, lr=1e-3, optim_bits=8)
    for module in (m for m in model.modules() if isinstance(m, nn.Embedding)):
        optimizer.mng.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


PLAIN: dict[str, Any] = {
    "adamw": lambda parameters, model: torch.optim.AdamW(parameters, lr=1e-3, foreach=False),
    "adamw:foreach=on": lambda parameters, model: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "adamw-fused": lambda parameters, model: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "adamw-8bit": eight_bits,
    "sgd-momentum": lambda parameters, model: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}
"""Who makes the optimiser of that name in a program without autorev."""


@dataclass(eq=False)
class Program:
    """A training loop without autorev."""

    model: nn.Module
    call: Any
    optimizers: list[torch.optim.Optimizer]
    in_backward: bool

    @classmethod
    def of(cls, workload: Workload, spec: str, dtype: str, size: tuple[int, int]) -> Program:
        """With that optimiser."""
        torch.manual_seed(0)
        model = workload.build(DTYPES[dtype]).train()
        asked = Optimizer.parse(spec)
        make = PLAIN[str(Optimizer(asked.name, asked.foreach))]
        if asked.step is None:
            return cls(model, workload.example(*size), [make(list(model.parameters()), model)], False)
        found = cls(model, workload.example(*size), [], True)
        for parameter in model.parameters():
            own = make([parameter], model)
            found.optimizers.append(own)

            def update(parameter: torch.Tensor, own: torch.optim.Optimizer = own) -> None:
                own.step()
                own.zero_grad()

            parameter.register_post_accumulate_grad_hook(update)
        return found

    def step(self) -> None:
        """One, whose gradients are dropped."""
        args, kwargs = self.call
        self.model(*args, **kwargs).loss.backward()
        for optimizer in [] if self.in_backward else self.optimizers:
            optimizer.step()
        self.model.zero_grad()

    def state(self) -> list[torch.Tensor]:
        """Of all optimisers."""
        every = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return [t for state in every for t in state.values() if isinstance(t, torch.Tensor)]

    def peak(self) -> int:
        """Of a warm step, by the allocator."""
        self.step()
        above = highest(self.step)
        inputs = [value for value in self.call[1].values() if isinstance(value, torch.Tensor)]
        standing = [*self.model.parameters(), *self.model.buffers(), *inputs, *self.state()]
        return storage_bytes(standing) + above


def wide(optimizer: str, size: tuple[int, int], dtype: str = "fp32", **how: Any) -> tuple[Workload, Forecaster]:
    """Seven blocks of Llama, whose vocabulary is most of it."""
    model_cls, config_cls, sizes, _, _ = FAMILIES["llama"]
    workload = workload_of(model_cls, config_cls(**sizes | {"vocab_size": 2000}))
    given = {"device": "cpu", "batch": size[0], "sequence": size[1], "dtype": dtype, **how}
    return workload, prepare(workload, optimizer=optimizer, **given)[1]


SHORT, LONG = (1, 8), (4, 64)
"""A step that is highest in its update or at the end of backward, and one whose logits are."""
BACKWARD = ("adamw:step=backward", "adamw:foreach=on,step=backward", "adamw-fused:step=backward")


@pytest.mark.parametrize("size", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("spec", ["adamw", "adamw:foreach=on", "adamw-fused", *BACKWARD, "adamw-8bit"])
def test_a_peak_agrees_with_the_allocator(spec: str, size: tuple[int, int]) -> None:
    """To a thousandth; the state to the byte."""
    workload, forecaster = wide(spec, size)
    program = Program.of(workload, spec, "fp32", size)
    assert predict(forecaster, "plain").peak_bytes == pytest.approx(program.peak(), rel=1e-3)
    assert forecaster.update().state == storage_bytes(program.state())


@pytest.mark.parametrize("spec", ["adamw", "adamw:foreach=on,step=backward", "adamw-8bit"])
def test_a_peak_in_two_bytes_agrees_with_the_allocator(spec: str) -> None:
    """Of which bitsandbytes' CPU kernels make fp32 copies."""
    workload, forecaster = wide(spec, SHORT, "bf16")
    program = Program.of(workload, spec, "bf16", SHORT)
    assert predict(forecaster, "plain").peak_bytes == pytest.approx(program.peak(), rel=1e-3)
    assert forecaster.update().state == storage_bytes(program.state())


def test_each_makes_more_room_than_the_one_before() -> None:
    """What is freed is temporaries, then gradients."""
    found = [predict(wide(spec, SHORT)[1], "plain") for spec in ("adamw", "adamw-fused", "adamw-fused:step=backward")]
    assert found[0].peak_bytes > found[1].peak_bytes > found[2].peak_bytes
    assert found[0].categories[Category.OTHER] > found[1].categories[Category.OTHER]
    assert (
        found[2].phase_peaks["optimizer"] == found[1].phase_peaks["optimizer"] - found[1].categories["parameters"] + 64
    )


@pytest.mark.parametrize("spec", ["adamw-fused", "adamw:step=backward"])
def test_a_coupling_with_any_optimizer_agrees_with_the_allocator(spec: str) -> None:
    """Blocks that are undone in backward hand each gradient on once."""
    workload, forecaster = wide(spec, (4, 32))
    predicted = predict(forecaster, "momentum")
    torch.manual_seed(0)
    model = workload.build(torch.float32).train()
    call = workload.example(4, 32)
    autorev.convert(model, call, keep_last=predicted.keep_last[0])
    optimizer = make_optimizer(model, spec, 1e-3)
    program = Program(model, call, [optimizer], False)
    assert predicted.peak_bytes == pytest.approx(program.peak(), rel=0.01)


# -- numbers


@pytest.mark.parametrize("spec", ["adamw", "adamw-fused", "adamw-8bit", "sgd-momentum"])
def test_stepping_in_backward_takes_the_same_steps(spec: str) -> None:
    """Bit for bit those of the optimiser that steps afterwards; and no gradient outlives its own."""
    workload, _ = wide("adamw", SHORT)
    expected = Program.of(workload, spec, "fp32", SHORT)
    torch.manual_seed(0)
    model = workload.build(torch.float32).train()
    optimizer = make_optimizer(model, f"{spec}:step=backward", 1e-3)
    found = Program(model, expected.call, [optimizer], False)
    for program in (expected, found):
        for _ in range(3):
            program.step()
    for (name, a), b in zip(found.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    args, kwargs = found.call
    found.model(*args, **kwargs).loss.backward()
    assert all(p.grad is None for p in found.model.parameters())


class Shared(nn.Module):
    """Blocks that share their weights with each other, and a head that shares its own with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 16)
        block = Block()
        self.blocks = nn.ModuleList([block] * 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] -> [batch, tokens, 30]"""
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h)
        return nn.functional.linear(h, self.embedding.weight)


class Block(nn.Module):
    """h + f(h)"""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, 16] -> the same"""
        out: torch.Tensor = h + self.down(torch.relu(self.up(self.norm(h))))
        return out


@pytest.mark.parametrize("method", ["momentum:k=3", "checkpoint", None])
def test_a_weight_that_is_used_often_is_updated_once(method: str | None) -> None:
    """After its last use in backward, by the sum of all: recomputed blocks never see it changed."""
    ids = torch.arange(24).reshape(2, 12)
    ways = []
    for spec in ("adamw", "adamw:step=backward"):
        model = Shared()
        if method is not None:
            autorev.convert(model, (ids,), method=method)
        optimizer = make_optimizer(model, spec, 1e-2)
        for _ in range(3):
            model(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ways.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in ways), strict=True))
    assert not torch.equal(ways[0].embedding.weight, Shared().embedding.weight)


def test_a_learning_rate_is_that_of_the_step() -> None:
    """Schedulers see the optimiser's own groups."""
    ways = [nn.Linear(3, 3) for _ in range(2)]
    ways[1].load_state_dict(ways[0].state_dict())
    for model, spec in zip(ways, ("adamw", "adamw:step=backward"), strict=True):
        optimizer = make_optimizer(model, spec, 1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for n in range(4):
            model(torch.full((2, 3), 1.0 + n)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in ways), strict=True))


def test_a_gradient_in_two_parts_is_an_error() -> None:
    """Named, and not a step by half of it; `zero_grad` begins anew."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    optimizer = make_optimizer(model, "sgd:step=backward", 1e-2)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(TrainingError, match=r"the gradient of 0\.weight arrived a second time before the step ended"):
        model(torch.ones(1, 2)).sum().backward()
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    model(torch.ones(1, 2)).sum().backward()


def test_it_ends_with_the_optimizer() -> None:
    """Then gradients are there again."""
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, "adamw:step=backward", 1e-2)
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is None
    del optimizer
    gc.collect()
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
    assert torch.equal(model.weight, before)


# -- on a GPU


@pytest.mark.parametrize("spec", ["adamw-host", "adamw-host:gradients=host"])
def test_the_host_holds_what_is_predicted(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's own optimiser, with a GPU that is a CPU: the steps of fused AdamW, and its bytes by what it keeps."""
    be_a_gpu(monkeypatch)
    workload, forecaster = wide(spec, SHORT, device="h100-80gb")
    expected = Program.of(workload, "adamw-fused", "fp32", SHORT)
    torch.manual_seed(0)
    model = workload.build(torch.float32).train()
    optimizer: Any = make_optimizer(model, spec, 1e-3)
    for _ in range(3):
        expected.step()
        args, kwargs = expected.call
        model(*args, **kwargs).loss.backward()
        gone = [p.grad is None for p in model.parameters() if p.numel() >= 4096]
        assert all(gone) if spec.endswith("gradients=host") else not any(gone)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.model.parameters(), strict=True))
    hosted = [*optimizer.param_d2h_map.values(), *(p.grad for p in optimizer.param_d2h_map.values())]
    hosted += [t for o in optimizer.optim_dict.values() for s in o.state.values() for t in s.values()]
    assert forecaster.update().host == storage_bytes(hosted)
    assert forecaster.update().state == storage_bytes(
        [t for s in optimizer.d_opt.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    )


def test_paged_states_wait_on_the_host() -> None:
    """By bitsandbytes' layout: what has 100,000 elements or more."""
    paged, unpaged = (wide(spec, SHORT, device="h100-80gb")[1].update() for spec in ("adamw-paged", "adamw-8bit-paged"))
    embedding = 2000 * 64
    assert paged.host == 2 * (2 * 4 * embedding)  # tied to nothing: the embedding and the head
    assert unpaged.host == 2 * 4 * embedding + 2 * embedding
    assert paged.temporary == 2 * 4 * embedding


def test_the_link_takes_its_time() -> None:
    """A step whose state comes from the host is longer."""
    steps = [
        predict(wide(spec, SHORT, device="h100-80gb")[1], "plain")
        for spec in ("adamw-fused", "adamw-paged", "adamw-host")
    ]
    assert steps[0].step_seconds < steps[1].step_seconds
    assert steps[0].step_seconds < steps[2].step_seconds
    assert steps[0].host_bytes == 0 < steps[1].host_bytes < steps[2].host_bytes
    assert steps[2].peak_bytes < steps[0].peak_bytes


# -- names


@pytest.mark.parametrize(
    "spec", [*KINDS, "adamw:foreach=on,step=backward", "sgd:foreach=off", "adamw-host:gradients=host"]
)
def test_one_spelling(spec: str) -> None:
    """It is read as it is written, with whatever spaces."""
    assert str(Optimizer.parse(spec)) == spec
    assert Optimizer.parse(f" {spec.replace(',', ' , ').replace('=', ' = ')} ") == Optimizer.parse(spec)
    assert Optimizer.parse(spec).title


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--optimizer adamw-fused:step=backward --accumulate 2", "those of 2 passes are never added up"),
        ("--optimizer adamw-host:gradients=host --accumulate 2", "those of 2 passes are never added up"),
        ("--optimizer adamw-8bit-paged --device cpu", "moves state between a GPU and its host"),
        ("--optimizer adamw-fuzed", "optimizer is adamw, adamw-fused"),
        ("--optimizer adamw:step", "the optimizer adamw has no option 'step'"),
    ],
)
@pytest.mark.parametrize("command", ["analyze", "fit"])
def test_what_cannot_be(command: str, options: str, said: str) -> None:
    """One sentence."""
    done = CliRunner().invoke(main, [command, "gpt2", "--sequence", "32", *options.split(), "--json"])
    assert done.exit_code in (1, 2)
    assert said in " ".join(done.output.split())
    assert "Traceback" not in done.output


@pytest.mark.parametrize("bad", [None, 3, "", "adamw:step=backward,step=backward"])
def test_bad_spellings(bad: Any) -> None:
    """As an error of ours."""
    with pytest.raises(SettingError):
        Optimizer.parse(bad)
