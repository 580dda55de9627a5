"""Converted models under DDP and FSDP2, in two processes on a CPU.

python -m pytest tests/integration/test_distributed.py

Starting a process costs seconds, so both of them make all checks in one go, and each test looks at one result.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import autorev
from autorev.engine.mode import running
from autorev.errors import AutorevError, ConversionError
from tests.helpers import handwritten as hand
from tests.helpers.copied import copied
from tests.helpers.one_step import gap, gradients_of, loss_of, one_step

pytest.importorskip("transformers")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

from torch.distributed._functional_collectives import all_to_all_single_autograd

from tests.helpers import zoo

pytestmark = pytest.mark.slow  # each check in both processes, and in one
RANKS = 2
ROWS = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "exact momentum": {"method": "momentum"},
    "float leapfrog": {"method": "leapfrog", "arithmetic": "float"},
    "tiled": {"tile": 5, "keep": "attention", "host": "side_bits"},
}
MODELS = ["llama", "hand-written"]
WRAPPERS = ["ddp", "ddp finding unused", "fsdp", "fsdp keeping blocks whole", "fsdp of children"]
ACCUMULATING = ["ddp", "fsdp"]
FIRST: list[tuple[str, str, str, dict[str, Any]]] = [
    ("llama", "fsdp", "exact momentum", SETTINGS["exact momentum"]),
    ("hand-written", "fsdp keeping blocks whole", "exact momentum", SETTINGS["exact momentum"]),
    ("llama", "fsdp", "in steps", {"granularity": "sublayer"}),
    ("llama", "ddp", "exact momentum", SETTINGS["exact momentum"]),
]
"""Wrapped before they are converted."""
SPREAD: dict[str, dict[str, Any]] = {
    "blocks": {},
    "in steps": {"granularity": "sublayer"},
    "tiled": {"tile": 4},
}
OUT_OF_ORDER = ["again", "two losses", "1"]
"""A second backward of one graph, two losses of one forward, a loss on the state behind block 1."""


class Ulysses(hand.Attention):
    """Each rank has a part of the sequence, and attends with a part of the heads on all of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [part.unflatten(-1, (RANKS, -1)) for part in self.qkv(x).chunk(3, -1)]
        spread = dist.is_initialized()
        q, k, v = ((exchanged(part, 2, 1) if spread else part).transpose(1, 2) for part in heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.out((exchanged(y, 1, 2) if spread else y).flatten(2))


class UlyssesBlock(hand.Block):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Ulysses()


def exchanged(x: torch.Tensor, scattered: int, gathered: int) -> torch.Tensor:
    """All-to-all: each rank gives away parts of one dimension for those of the other."""
    parts = torch.stack(x.chunk(RANKS, scattered)).contiguous()
    return torch.cat(list(all_to_all_single_autograd(parts, None, None, dist.group.WORLD)), gathered)


# -- what the two processes do


def build(model: str, wrapper: str = "") -> nn.Module:
    """The same weights in every process; for DDP to find unused parameters, it is given some."""
    built: nn.Module
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = zoo.build("llama") if model == "llama" else hand.stack_of(hand.Block).train()
        if "unused" in wrapper:
            built.unused = nn.Linear(3, 3)
    return built


def converted(model: str, wrapper: str, settings: dict[str, Any]) -> Any:
    """The same, converted."""
    return copied(convert_anew, model, wrapper if "unused" in wrapper else "", **settings)


def convert_anew(model: str, wrapper: str, **settings: Any) -> nn.Module:
    """The same, converted here and now."""
    built = build(model, wrapper)
    autorev.convert(built, **example(model), **settings)
    return built


def batch(model: str, number: int = 0) -> dict[str, Any]:
    """All ranks' rows of one step."""
    tokens = torch.randint(3, 50, (ROWS, 12), generator=torch.Generator().manual_seed(number))
    return {"input_ids": tokens, "labels": tokens, "use_cache": False} if model == "llama" else {"tokens": tokens}


def mine(call: dict[str, Any]) -> dict[str, Any]:
    """This rank's rows."""
    rows = slice(dist.get_rank() * ROWS // RANKS, (dist.get_rank() + 1) * ROWS // RANKS)
    return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    """`model` as it is trained on two ranks."""
    if wrapper.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters="unused" in wrapper)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    blocks = model.model.layers if hasattr(model, "model") else model.blocks
    for block in blocks:
        for child in block.children() if "children" in wrapper else ():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
        fully_shard(block, mesh=mesh, reshard_after_forward="whole" not in wrapper)
    fully_shard(model, mesh=mesh)
    return model


def step(model: nn.Module, call: dict[str, Any], collect: bool = True) -> float:
    """Forward and backward of this rank's rows, with or without a collection of gradients."""
    quiet = nullcontext()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(collect)
    elif not collect:
        quiet = model.no_sync()
    with quiet:
        loss = loss_of(model(**mine(call)))
        loss.backward()
    return float(loss)


def whole_gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Every parameter's gradient, put together from both ranks, by its name in the bare model."""
    found = gradients_of(model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model)
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


class Counting(TorchDispatchMode):
    """Counts collective operations by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace and "wait" not in func.name():
            self.counts[func.name()] = self.counts.get(func.name(), 0) + 1
        return func(*args, **(kwargs or {}))


def collectives(run: Callable[[], Any]) -> dict[str, int]:
    """The collective operations that `run` calls, by name."""
    with Counting() as counting:
        run()
    return counting.counts


def one_training_step(model: str, wrapper: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The gap to the oracle on the whole batch in one process, and the collectives of the third step."""
    counts = []
    for convert in (False, True):
        parallel = wrapped(converted(model, wrapper, settings) if convert else build(model, wrapper), wrapper)
        for _ in range(2):  # DDP arranges its buckets in the first step
            step(parallel, batch(model))
            parallel.zero_grad()
        counts.append(collectives(partial(step, parallel, batch(model))))
    single = converted(model, wrapper, settings)
    _, expected = one_step(single, mode="oracle", **batch(model))
    return {"gap": gap(whole_gradients(parallel), expected), "plain": counts[0], "converted": counts[1]}


def accumulated(model: str, wrapper: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Two batches, of which only the second collects gradients."""
    counts = []
    for convert in (False, True):
        parallel = wrapped(converted(model, wrapper, settings) if convert else build(model, wrapper), wrapper)

        def both(parallel: nn.Module = parallel) -> None:
            parallel.zero_grad()
            step(parallel, batch(model, 0), collect=False)
            step(parallel, batch(model, 1))

        both()
        counts.append(collectives(both))
    single = converted(model, wrapper, settings)
    first, second = (one_step(single, mode="oracle", **batch(model, number))[1] for number in range(2))
    expected = {name: first[name] + second[name] for name in first}
    return {"gap": gap(whole_gradients(parallel), expected), "plain": counts[0], "converted": counts[1]}


def trained(wrapper: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Losses of four steps of AdamW, here and in one process."""
    parallel = wrapped(converted("llama", wrapper, settings), wrapper)
    single = converted("llama", wrapper, settings)
    losses, expected = [], []
    for model, into in ((parallel, losses), (single, expected)):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for number in range(4):
            if model is parallel:
                loss = torch.tensor(step(model, batch("llama", number)))
                dist.all_reduce(loss)
                into.append(float(loss) / RANKS)
            else:
                into.append(float(one_step(model, **batch("llama", number))[0]))
            optimiser.step()
            optimiser.zero_grad()
    return {"losses": losses, "expected": expected}


def out_of_order(wrapper: str, how: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs of blocks that autograd did not ask for: their sharded parameters may have been given back by then."""

    def run(model: nn.Module, call: dict[str, Any]) -> None:
        states: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(
                lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out)
            )
            for layer in model.model.layers
        ]
        returned = model(**call)
        for handle in handles:
            handle.remove()
        if how == "again":
            returned.loss.backward(retain_graph=True)
            model.zero_grad()
            returned.loss.backward()
        elif how == "two losses":
            returned.logits.square().mean().backward(retain_graph=True)
            returned.loss.backward()
        else:
            states[int(how)].square().mean().backward()

    parallel = wrapped(converted("llama", wrapper, settings), wrapper)
    single = converted("llama", wrapper, settings)
    call = batch("llama")
    half = {"input_ids": call["input_ids"], "labels": call["labels"], "use_cache": False}
    run(parallel, half)  # the same rows on both ranks: gradients are averaged
    with running("oracle"):
        run(single, half)
    found, expected = whole_gradients(parallel), gradients_of(single)
    both = [name for name in expected if expected[name] is not None and found[name] is not None]
    return {"gap": gap({n: found[n] for n in both}, {n: expected[n] for n in both}), "compared": len(both)}


def in_bfloat16(settings: dict[str, Any]) -> dict[str, Any]:
    """FSDP2's mixed precision: the reversible step against the oracle, both sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    found = []
    for mode in ("oracle", "reversible"):
        model = converted("llama", "fsdp", settings)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh("cpu", (RANKS,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        with running(mode):
            step(model, batch("llama"))
        found.append(whole_gradients(model))
    return {"gap": gap(found[1], found[0])}


def sharded_first(model: str, wrapper: str, settings: dict[str, Any]) -> dict[str, Any]:
    """`convert` of a model that is wrapped already, as scripts load it."""
    parallel, single = wrapped(build(model), wrapper), build(model)
    autorev.convert(parallel, batch=batch(model), **settings)
    for _ in range(2):
        parallel.zero_grad()
        step(parallel, batch(model))
    autorev.convert(single, batch=batch(model), **settings)
    _, expected = one_step(single, mode="oracle", **batch(model))
    try:
        verified = autorev.verify(parallel, batch(model)).passed
    except ConversionError as error:
        verified = str(error)
    step(parallel, batch(model))  # what verify ran has left the shards in their places
    return {
        "gap": gap(
            whole_gradients_in_order(parallel, expected), {n: g + g for n, g in expected.items() if g is not None}
        ),
        "drift": list(autorev.drift(parallel).values()),
        "verified": verified,
    }


def whole_gradients_in_order(model: nn.Module, like: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """Those that `like` has."""
    found = whole_gradients(model)
    return {name: found[name] for name, g in like.items() if g is not None}


def in_tensor_parallel(first: bool) -> dict[str, Any]:
    """Linear maps that are spread over the ranks, in blocks that hand on whole streams; `first`: before convert."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model: Any = build("llama")
    if not first:
        autorev.convert(model)
    plan = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for block in model.model.layers:
        parallelize_module(block, init_device_mesh("cpu", (RANKS,)), plan)
    if first:
        autorev.convert(model)
    loss_of(model(**batch("llama"))).backward()
    _, expected = one_step(converted("llama", "", {}), mode="oracle", **batch("llama"))
    return {"gap": gap(whole_gradients(model), expected), "drift": list(autorev.drift(model).values())}


def refused_when_spread() -> dict[str, Any]:
    """A stream that is no whole tensor in any process, and parameters that FSDP1 has flattened."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Replicate, distribute_tensor

    said = {}
    model: Any = build("llama")
    autorev.convert(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    try:
        model.model.layers[0](distribute_tensor(torch.randn(1, 4, 32), mesh, [Replicate()]))
    except ConversionError as error:
        said["stream"] = str(error)
    try:
        autorev.convert(FullyShardedDataParallel(build("llama"), device_id=torch.device("cpu")), **example("llama"))
    except AutorevError as error:
        said["flattened"] = str(error)
    return said


def sequence_spread(settings: dict[str, Any]) -> dict[str, Any]:
    """Half of the sequence in each process: the gap of the summed gradients to the oracle's on all of it."""
    tokens = batch("hand-written")["tokens"]
    mine = tokens.chunk(RANKS, 1)[dist.get_rank()]
    gradients = []
    for spread in (True, False):
        with torch.random.fork_rng(), nullcontext() if spread else patch.object(dist, "is_initialized", lambda: False):
            torch.manual_seed(0)
            model = hand.stack_of(UlyssesBlock).train()
            autorev.convert(model, mine if spread else tokens, fraction_bits=16, **settings)
            with running("reversible" if spread else "oracle"):
                model(mine if spread else tokens).square().sum().backward()
        gradients.append(gradients_of(model))
    for gradient in gradients[0].values():
        if gradient is not None:
            dist.all_reduce(gradient)
    return {"gap": gap(*gradients)}


def refused_in_a_stage() -> dict[str, Any]:
    """What the first of two stages of a pipeline says of its chain; checkpointed, the same stage runs."""
    from torch.distributed.pipelining import PipelineStage

    said = {}
    for method in ("momentum", "checkpoint"):
        model = hand.Stack(*(hand.Block() for _ in range(2)))
        model.norm = model.head = nn.Identity()
        autorev.convert(model.train(), **example("hand-written"), method=method)
        tokens = batch("hand-written")["tokens"]
        stage = PipelineStage(
            model, dist.get_rank(), RANKS, torch.device("cpu"), tokens, torch.zeros(ROWS, 12, hand.WIDTH)
        )
        try:
            said[method] = str(stage.forward_one_chunk(0, (tokens,)).shape) if stage.is_first else ""
        except RuntimeError as error:  # the stage's own, for whatever its module raises
            said[method] = str(error.__cause__)
    return said


def grid(scale: float) -> list[int | None]:
    """The grid for activations that are so many times larger."""
    model = build("hand-written")
    with torch.no_grad():
        next(model.parameters()).mul_(scale)  # the embedding's
    return [chain.fraction_bits for chain in autorev.convert(model, **example("hand-written")).chains]


def grids_of_both() -> dict[str, Any]:
    """Of a model whose activations are larger in one process, where both convert and where rank 0 alone does."""
    found: dict[str, Any] = {"both": grid(64.0 if dist.get_rank() else 1.0)}
    if dist.get_rank() == 0:
        with patch("autorev.conversion.agreed.PATIENCE", timedelta(seconds=1)):
            alone = autorev.convert(build("hand-written"), **example("hand-written"))
        found["alone"] = alone.notes
    dist.barrier()
    return found


def example(model: str) -> dict[str, Any]:
    """The example call for `convert`."""
    return {} if model == "llama" else {"batch": batch(model)}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        f"{model}, {wrapper}, {name}": partial(one_training_step, model, wrapper, settings)
        for model in MODELS
        for wrapper in WRAPPERS
        for name, settings in SETTINGS.items()
    },
    **{
        f"accumulated, {wrapper}, {name}": partial(accumulated, "llama", wrapper, settings)
        for wrapper in ACCUMULATING
        for name, settings in SETTINGS.items()
    },
    **{
        f"trained, {wrapper}, {name}": partial(trained, wrapper, settings)
        for wrapper in ACCUMULATING
        for name, settings in SETTINGS.items()
    },
    **{
        f"{how}, {wrapper}, {name}": partial(out_of_order, wrapper, how, settings)
        for how in OUT_OF_ORDER
        for wrapper in ("fsdp", "fsdp keeping blocks whole")
        for name, settings in SETTINGS.items()
    },
    **{
        f"{model}, {wrapper}, first, {name}": partial(sharded_first, model, wrapper, settings)
        for model, wrapper, name, settings in FIRST
    },
    "tensor parallel first": partial(in_tensor_parallel, True),
    "tensor parallel": partial(in_tensor_parallel, False),
    "spread": refused_when_spread,
    "grids": grids_of_both,
    "stage": refused_in_a_stage,
    **{f"ulysses, {name}": partial(sequence_spread, settings) for name, settings in SPREAD.items()},
    "bfloat16": partial(in_bfloat16, SETTINGS["exact momentum"]),
}


def work(rank: int, folder: str) -> None:
    """One of the two processes: make every check, and write down what came out."""
    torch.set_num_threads(1)
    store = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    results: dict[str, dict[str, Any]] = {}
    for name, check in CHECKS.items():
        try:
            results[name] = check()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


# -- the tests


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Rank 0's results of all checks, or rank 1's error."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS))
    return {name: second[name] if "error" in second[name] else first[name] for name in CHECKS}


def result_of(results: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """What the check `name` gave; its traceback if it failed."""
    found = results[name]
    if "error" in found:
        pytest.fail(found["error"], pytrace=False)
    return found


each_setting = pytest.mark.parametrize("setting", SETTINGS)
each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
each_model = pytest.mark.parametrize("model", MODELS)


@each_model
@each_wrapper
@each_setting
def test_gradients_are_those_of_one_process_on_the_whole_batch(
    results: dict[str, Any], model: str, wrapper: str, setting: str
) -> None:
    """Two ranks with half of the rows each have the gradients of the oracle with all rows."""
    assert result_of(results, f"{model}, {wrapper}, {setting}")["gap"] < 1e-5


@each_model
@each_wrapper
@each_setting
def test_a_step_communicates_as_much_as_the_plain_model(
    results: dict[str, Any], model: str, wrapper: str, setting: str
) -> None:
    """The second run of a block in backward gathers no parameters and reduces no gradients once more."""
    found = result_of(results, f"{model}, {wrapper}, {setting}")
    assert found["plain"], "no collective was seen, so the count says nothing"
    assert found["converted"] == found["plain"]


@pytest.mark.parametrize("wrapper", ACCUMULATING)
@each_setting
def test_gradients_accumulate_over_batches_that_do_not_synchronise(
    results: dict[str, Any], wrapper: str, setting: str
) -> None:
    """Two batches, the first of them without a collection, give the sum of both gradients and no more collectives."""
    found = result_of(results, f"accumulated, {wrapper}, {setting}")
    assert found["gap"] < 1e-5
    assert found["plain"], "no collective was seen, so the count says nothing"
    assert found["converted"] == found["plain"]


@pytest.mark.parametrize("wrapper", ACCUMULATING)
@each_setting
def test_training_on_two_ranks_has_the_losses_of_one_process(
    results: dict[str, Any], wrapper: str, setting: str
) -> None:
    """Four steps of AdamW on different batches go the same way."""
    found = result_of(results, f"trained, {wrapper}, {setting}")
    assert found["losses"] == pytest.approx(found["expected"], rel=1e-4)
    assert len(set(found["losses"])) == 4


@pytest.mark.parametrize("how", OUT_OF_ORDER)
@pytest.mark.parametrize("wrapper", ["fsdp", "fsdp keeping blocks whole"])
@each_setting
def test_a_block_that_is_run_out_of_autograds_order_has_its_parameters(
    results: dict[str, Any], how: str, wrapper: str, setting: str
) -> None:
    """No read of memory that was given back (a segmentation fault), and the gradients of the oracle."""
    found = result_of(results, f"{how}, {wrapper}, {setting}")
    assert found["gap"] < 1e-5
    assert found["compared"] > 5


def test_mixed_precision_of_fsdp_has_the_oracles_gradients(results: dict[str, Any]) -> None:
    """With parameters gathered in bfloat16 the rebuilt chain gives the gradients of the stored one."""
    assert result_of(results, "bfloat16")["gap"] < 1e-5


@pytest.mark.parametrize("which", FIRST, ids=lambda which: f"{which[0]}, {which[1]}, {which[2]}")
def test_a_model_that_is_wrapped_already_is_converted(results: dict[str, Any], which: Any) -> None:
    """`fully_shard` and DDP before `convert`: analysis sees a plain model, and the grid is probed on the real one."""
    model, wrapper, name, _ = which
    found = result_of(results, f"{model}, {wrapper}, first, {name}")
    assert found["gap"] < 1e-5
    assert found["drift"] == [0.0]
    if wrapper == "ddp":
        assert found["verified"] is True
    else:
        assert "verify the model before fully_shard" in found["verified"]


def test_processes_agree_on_the_coarsest_of_their_grids(results: dict[str, Any]) -> None:
    """Each has rows of its own; where one of them converts alone it says so and does not wait for ever."""
    found = result_of(results, "grids")
    assert grid(64.0) < grid(1.0), "the larger activations have the same grid, so nothing is shown"
    assert found["both"] == grid(64.0)
    assert "the grid of its own rows" in found["alone"][0]


@pytest.mark.parametrize("how", SPREAD)
def test_a_sequence_that_is_spread_over_processes(results: dict[str, Any], how: str) -> None:
    """Nothing but attention communicates, in the second run as in the first."""
    assert result_of(results, f"ulysses, {how}")["gap"] < 1e-5


def test_a_chain_does_not_begin_in_a_stage_of_a_pipeline(results: dict[str, Any]) -> None:
    """Each stage would begin with a velocity of zero, and nobody would be told; a checkpoint is right there."""
    said = result_of(results, "stage")
    assert "blocks.0 begins a chain in stage 0 of a pipeline of 2" in said["momentum"]
    assert "method='checkpoint'" in said["momentum"]
    assert said["checkpoint"] == f"torch.Size([{ROWS}, 12, {hand.WIDTH}])"


@pytest.mark.parametrize("order", ["tensor parallel first", "tensor parallel"])
def test_linear_maps_in_tensor_parallel(results: dict[str, Any], order: str) -> None:
    """Before `convert` or after it: the gradients of one process."""
    found = result_of(results, order)
    assert found["gap"] < 1e-5
    assert found["drift"] == [0.0]


def test_what_is_spread_too_far_is_refused(results: dict[str, Any]) -> None:
    """With what to do instead."""
    said = result_of(results, "spread")
    assert "use_local_output=True" in said["stream"]
    assert "convert the model first and wrap it then" in said["flattened"]
