"""A capture is a thread's own affair: no other thread notices it, and nothing stays behind.

python -m pytest tests/unit/test_capture_in_threads.py
"""

# ruff: noqa: NPY002 - numpy's one generator for the whole process is what must not be moved

from __future__ import annotations

import logging
import math
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _python_dispatch as dispatch_modes

import autorev
from autorev import patching
from autorev.capture import streams
from autorev.capture.fake import KEPT, every_layer_kept, fake_copy, fused_attention_dropout, new_fake_mode
from autorev.capture.record import RecordedCall, record
from autorev.errors import CaptureError
from autorev.integrations.building import default_dtype
from autorev.integrations.quirks import quiet
from autorev.own_mode import OwnMode
from autorev.patching import patched_here

X = torch.randn(2, 8)
WAIT = 60


class Doubled(torch.autograd.Function):
    """A function of one's own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Twice `x`."""
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Twice the gradient."""
        return grads[0] * 2


class Block(nn.Module):
    """A residual block that does in its forward what `body` does."""

    def __init__(self, body: Callable[[torch.Tensor], Any] = lambda x: None) -> None:
        super().__init__()
        self.linear, self.drop, self.body = nn.Linear(8, 8), nn.Dropout(0.5), body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A step, after the body."""
        self.body(x)
        return x + self.drop(Doubled.apply(self.linear(x)))


def stack_of_blocks(body: Callable[[torch.Tensor], Any] = lambda x: None) -> nn.Module:
    """Four blocks, of which the second does more than the others."""
    return nn.Sequential(Block(), Block(body), Block(), Block())


def looks_at_data(x: torch.Tensor) -> None:
    """What cannot be done under fake tensors: the model is captured on real ones then."""
    bool(x.sum() > 1e9)


def shared_things() -> dict[str, Any]:
    """Everything of the process that a capture has to do with, as it stands."""
    owners = (random, np.random, torch, torch.random, torch.autograd.Function, F, nn.Module, nn.init, logging.Logger)
    found = {f"{owner.__name__}.{name}": value for owner in owners for name, value in vars(owner).items()}
    for name in ("transformers.masking_utils", "transformers.integrations.moe", "torch._dynamo.convert_frame"):
        module = vars(sys.modules.get(name, object))
        found |= {f"{name}.{key}": value for key, value in module.items() if callable(value)}  # others are counters
    hooks = vars(nn.modules.module)
    found |= {name: len(value) for name, value in hooks.items() if name.startswith("_global_") and value is not None}
    found |= {name: value for name, value in vars(dispatch_modes).items() if name.startswith("_is_in_")}
    for name in ("transformers", "torch._subclasses.fake_tensor"):
        logger = logging.getLogger(name)
        handled = [handler.filters[:] for handler in logger.handlers]
        found[f"logger {name}"] = logger.level, logger.disabled, logger.filters[:], handled
    found["warnings.filters"] = warnings.filters[:]  # type: ignore[index]
    return found


def changed(before: dict[str, Any]) -> list[str]:
    """Names of what is another object now, or equal to nothing of before."""
    after = shared_things()
    plain = bool | int | tuple | list
    return [
        name
        for name in before.keys() | after.keys()
        if before.get(name) is not after.get(name)
        and not (isinstance(before.get(name), plain) and before.get(name) == after.get(name))
    ]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What analysing and compiling import is there before anything is compared."""
    autorev.analyze(stack_of_blocks(), X)
    torch.compile(nn.Linear(8, 8), backend="eager")(X)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """After every test all is as it was, and no stand-in is known."""
    before = shared_things()
    yield
    assert changed(before) == []
    assert patching._installed == {}


class Gate:
    """Holds another thread inside of something until this one has looked around."""

    def __init__(self) -> None:
        self.arrived, self.go = threading.Event(), threading.Event()

    def pass_through(self, *args: Any) -> None:
        """Called by the thread that is held, once or more often."""
        self.arrived.set()
        assert self.go.wait(WAIT)


@contextmanager
def held(work: Callable[[Callable[..., None]], Any]) -> Iterator[list[Any]]:
    """While it lasts, a thread is held where `work` calls its argument; afterwards the list has what it returned."""
    gate, results = Gate(), []

    def run() -> None:
        try:
            results.append(work(gate.pass_through))
        except BaseException as error:
            results.append(error)
            gate.arrived.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert gate.arrived.wait(WAIT)
        assert results == []
        yield results
    finally:
        gate.go.set()
        thread.join(WAIT)
    assert len(results) == 1


def analysing(*, real: bool, traced: bool = False) -> Callable[[Callable[..., None]], Any]:
    """An analysis that stops inside of the model's forward, on real tensors or on fake ones.

    It does so while the call is recorded, or when a block is traced after that.
    """
    stops: list[Callable[..., None]] = []
    calls: list[torch.Tensor] = []

    def body(x: torch.Tensor) -> None:
        if real:
            looks_at_data(x)
        calls.append(x)
        random.shuffle([1, 2, 3])
        np.random.rand()
        torch.manual_seed(7)
        torch.randn_like(x)
        if len(calls) > traced:
            stops[0]()

    model = stack_of_blocks(body)

    def work(stop: Callable[..., None]) -> Any:
        stops.append(stop)
        return autorev.analyze(model, X)

    return work


# -- many threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [lambda x: None, looks_at_data], ids=["fake", "real"])
def test_many_analyses_at_once_find_the_same_and_leave_nothing(body: Callable[[torch.Tensor], Any]) -> None:
    """Each thread finds what one alone finds, and every shared thing is the very object that it was."""
    alone = autorev.analyze(stack_of_blocks(body), X)
    before, interval, results = shared_things(), sys.getswitchinterval(), []

    def work() -> None:
        try:
            results.append(autorev.analyze(stack_of_blocks(body), X).chains)
        except BaseException as error:
            results.append(error)

    sys.setswitchinterval(1e-5)
    try:
        for _ in range(4):
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(WAIT)
    finally:
        sys.setswitchinterval(interval)
    assert results == [alone.chains] * 16
    assert changed(before) == []


def test_the_first_to_come_may_be_the_first_to_go() -> None:
    """Two threads that are in a capture at once leave in the order in which they came, and the original is back."""
    original = random.random
    first, second = held(kept_draw), held(kept_draw)
    found = first.__enter__(), second.__enter__()
    assert random.random() != KEPT
    first.__exit__(None, None, None)
    assert random.random() != KEPT
    second.__exit__(None, None, None)
    assert random.random is original
    assert found == ([KEPT], [KEPT])


def kept_draw(stop: Callable[..., None]) -> float:
    """What layer-drop draws in a capture that was held before."""
    with every_layer_kept():
        stop()
        return random.random()


def test_two_threads_that_build_leave_the_default_dtype() -> None:
    """The default dtype is every thread's, so that one waits for the other, and at the end it is as before."""

    def work(stop: Callable[..., None]) -> torch.dtype:
        with default_dtype(torch.float16):
            stop()
            return torch.get_default_dtype()

    before, later = torch.get_default_dtype(), []
    second = threading.Thread(target=lambda: later.append(work(lambda: None)))
    with held(work) as found:
        assert torch.get_default_dtype() is torch.float16
        second.start()
        second.join(0.2)
        assert second.is_alive()
    second.join(WAIT)
    assert (found, later) == ([torch.float16], [torch.float16])
    assert torch.get_default_dtype() is before


# -- what another thread sees ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True], ids=["recorded", "traced"])
@pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])
def test_another_thread_draws_what_it_would_have_drawn(real: bool, traced: bool) -> None:
    """Python's, numpy's and torch's streams go on, through an analysis and after it, as if there had been none."""
    work = analysing(real=real, traced=traced)
    python, numpy, generator = random.Random(5), np.random.RandomState(5), torch.Generator().manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)

    def same() -> None:
        for _ in range(3):
            assert random.random() == python.random()
            assert random.uniform(2, 3) == python.uniform(2, 3)
            assert random.sample(range(99), 5) == python.sample(range(99), 5)
            assert np.random.standard_normal() == numpy.standard_normal()
            assert torch.equal(torch.rand(3), torch.rand(3, generator=generator))
            assert torch.equal(torch.get_rng_state(), generator.get_state())
        mask = torch.empty(50).bernoulli_(0.5, generator=generator)
        assert torch.equal(F.dropout(torch.ones(50), 0.5), mask * 2)

    same()
    with held(work) as results:
        same()
    same()
    assert results[0].chains


@pytest.mark.parametrize("traced", [False, True], ids=["recorded", "traced"])
@pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])
def test_another_threads_modules_and_functions_are_their_own(real: bool, traced: bool) -> None:
    """Its module calls, its hooks and its autograd functions go by no stand-in, and reach no graph of the analysis."""
    call, apply, layer = nn.Module.__call__, vars(torch.autograd.Function)["apply"], nn.Linear(8, 8)
    kept: list[Any] = []
    layer.register_forward_hook(lambda module, args, output: kept.append(output))
    expected, leaf = layer(X), X.clone().requires_grad_()
    with held(analysing(real=real, traced=traced)) as results:
        assert vars(torch.autograd.Function)["apply"] is not apply  # or nothing would be shown of it
        assert nn.Module.__call__ is call
        assert not any(vars(nn.modules.module)[name] for name in ("_global_forward_hooks", "_global_forward_pre_hooks"))
        assert torch.equal(layer(X), expected)
        Doubled.apply(leaf).sum().backward()
        assert not dispatch_modes.is_in_torch_dispatch_mode()
    assert len(kept) == 2
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.full_like(X, 2))
    alone = autorev.analyze(stack_of_blocks(looks_at_data if real else lambda x: None), X)
    assert [block.path for block in results[0].chains[0].blocks] == [block.path for block in alone.chains[0].blocks]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does it
def test_a_compiler_in_another_thread_compiles() -> None:
    """While an analysis runs, `torch.compile` takes a function in one piece, layer-drop and autograd included."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(Block(), backend=backend, fullgraph=True)
    with held(analysing(real=False, traced=True)):
        assert compiled(X).shape == X.shape
    assert len(graphs) == 1


def helper(x: torch.Tensor) -> torch.Tensor:
    """Something to override."""
    return x + 1


def test_a_compiler_in_another_thread_compiles_the_original() -> None:
    """Of a function that some thread overrides it takes the original, in one piece."""

    def work(stop: Callable[..., None]) -> torch.Tensor:
        with patched_here(sys.modules[__name__], "helper", lambda original: lambda x: original(x) * 0):
            stop()
            return helper(X)

    with held(work) as results:
        assert torch.equal(torch.compile(lambda x: helper(x) * 2, backend="eager", fullgraph=True)(X), (X + 1) * 2)
    assert torch.equal(results[0], X * 0)


def test_another_threads_attention_drops_out() -> None:
    """Dropout is taken from the attention of one thread, called directly or by a module, and not from another's."""
    query = torch.randn(1, 2, 4, 8)
    attention = nn.MultiheadAttention(16, 2, dropout=1.0, batch_first=True)
    tokens = torch.randn(1, 4, 16)

    def attended() -> tuple[float, ...]:
        whole = attention(tokens, tokens, tokens, need_weights=False)[0] - attention.out_proj.bias
        by_place = F.scaled_dot_product_attention(query, query, query, None, 1.0)
        by_name = F.scaled_dot_product_attention(query, query, query, dropout_p=1.0)
        return tuple(float(found.detach().abs().sum()) for found in (whole, by_place, by_name))

    def work(stop: Callable[..., None]) -> tuple[float, ...]:
        with fused_attention_dropout():
            stop()
            return attended()

    with held(work) as results:
        assert attended() == (0, 0, 0)
    assert min(results[0]) > 0


def test_another_thread_is_told_what_libraries_have_to_say(caplog: pytest.LogCaptureFixture) -> None:
    """Logs and warnings are silenced for the thread that captures, and come through in any other."""
    logger = logging.getLogger("transformers")

    def say(text: str) -> None:
        logging.getLogger("transformers.somewhere").warning(text)
        warnings.warn_explicit(text, UserWarning, "file.py", 1, module="transformers.somewhere")

    def work(stop: Callable[..., None]) -> None:
        with quiet():
            stop()
            say("hushed")  # the warning would be an error here

    logger.addHandler(caplog.handler)
    try:
        with held(work) as results, pytest.raises(UserWarning, match="said"):  # an error, as for all of these tests
            say("said")
    finally:
        logger.removeHandler(caplog.handler)
    assert results == [None]
    assert {record.getMessage() for record in caplog.records} == {"said"}


def test_filters_that_were_saved_meanwhile_silence_nobody() -> None:
    """Whoever saves the filters of warnings while a thread is silenced, and puts them back later, hears everything."""
    saving = warnings.catch_warnings()
    kept = warnings.filters[:]
    with quiet():
        saving.__enter__()
    saving.__exit__(None, None, None)
    try:
        with pytest.raises(UserWarning, match="said"):
            warnings.warn_explicit("said", UserWarning, "file.py", 1, module="transformers.somewhere")
    finally:
        warnings.filters[:] = kept


def test_a_config_that_another_model_shares_is_not_touched() -> None:
    """The recorded call sees no cache, and the config of the class, which all its models have, still wants one."""

    class Config:
        use_cache = True

    class Cached(Block):
        config = Config()

    seen: list[bool] = []
    own, shared = Config(), Cached()

    def work(stop: Callable[..., None]) -> RecordedCall:
        shared.body = lambda x: (seen.extend((shared.config.use_cache, shared.linear.config.use_cache)), stop())
        return record(shared, (X,), {})

    shared.linear.config = own
    with held(work):
        assert (Cached.config.use_cache, own.use_cache) == (True, True)
    assert seen == [False, False]
    assert "config" not in vars(shared)
    assert shared.linear.config is own


# -- one thread --------------------------------------------------------------------------------------------------------


def test_what_a_forward_draws_moves_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it draws and seeds, by whatever name, the streams are where they were, if this is the only thread."""
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread()])  # other tests leave some behind
    from random import random as by_name

    def body(x: torch.Tensor) -> None:
        looks_at_data(x)
        by_name()
        random.seed(1)
        random.choice("abc")
        np.random.seed(1)
        np.random.rand(3)
        torch.manual_seed(1)
        for _ in range(2):
            (
                torch.rand(2),
                torch.randn_like(x),
                torch.randperm(4),
                torch.multinomial(torch.ones(3), 1),
                nn.init.normal_(x),
            )
        with torch.random.fork_rng(devices=[]):
            torch.seed()

    model = stack_of_blocks(body)
    before = random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()
    autorev.analyze(model, X)
    after = random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()
    assert after[0] == before[0]
    assert np.array_equal(after[1][0], before[1][0]) and after[1][1] == before[1][1]
    assert torch.equal(after[2], before[2])


def test_a_seed_in_a_captured_forward_seeds_what_it_draws() -> None:
    """On real tensors a forward that seeds draws what it draws outside of a capture."""

    def drawn() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [torch.rand(4), torch.randn(4), torch.randint(9, (4,)), F.dropout(torch.ones(4)), torch.rand_like(X)]

    with torch.random.fork_rng(devices=[]):
        expected = drawn()
    with every_layer_kept():
        found = drawn()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_kernel_that_takes_no_generator_moves_no_stream() -> None:
    """It draws from torch's own, which is put back."""
    before = torch.get_rng_state()
    with every_layer_kept():
        dropped, mask = torch.native_dropout(torch.ones(99), 0.5, True)
    assert torch.equal(dropped, mask * 2.0)
    assert 0 < int(mask.sum()) < 99
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_without_dropout_puts_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take long, and what another thread draws meanwhile is not to be drawn again."""
    query = torch.randn(1, 2, 16, 8)

    def never(device: torch.device) -> None:
        raise AssertionError("asked for the generator")

    monkeypatch.setattr(streams, "_default_generator", never)
    with every_layer_kept():
        assert F.scaled_dot_product_attention(query, query, query).shape == query.shape
        with pytest.raises(AssertionError, match="asked"):
            F.scaled_dot_product_attention(query, query, query, dropout_p=0.5)


def test_fake_tensors_draw_nothing() -> None:
    """On the meta device, and fake ones outside of their mode, they are left to torch."""
    mode = new_fake_mode()
    with mode:
        fake = torch.empty(3)
    before = torch.get_rng_state()
    with every_layer_kept():
        assert torch.empty(3, device="meta").normal_().is_meta
        assert torch.rand(3, device="meta").is_meta
        assert fake.bernoulli_().shape == (3,)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])
def test_an_exception_in_the_forward_leaves_nothing(error: BaseException, real: bool) -> None:
    """The analysis fails with it, and all is as it was."""

    def body(x: torch.Tensor) -> None:
        if real:
            looks_at_data(x)
        raise error

    before, model = shared_things(), stack_of_blocks(body)
    attributes = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(CaptureError if isinstance(error, Exception) else KeyboardInterrupt):
        autorev.analyze(model, X)
    assert changed(before) == []
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert torch._C._len_torch_dispatch_stack() == 0


def test_a_recorded_model_is_left_as_it_was() -> None:
    """Its modules have the attributes and hooks of before, even where the forward raises."""

    def body(x: torch.Tensor) -> None:
        raise ValueError("no")

    for model in (stack_of_blocks(), stack_of_blocks(body)):
        before = [(dict(vars(m)), list(m._forward_hooks), dict(m._forward_hooks_with_kwargs)) for m in model.modules()]
        with ExitStack() as stack:
            if model[1].body is body:
                stack.enter_context(pytest.raises(ValueError, match="no"))
            record(model, (X,), {})
        after = [(dict(vars(m)), list(m._forward_hooks), dict(m._forward_hooks_with_kwargs)) for m in model.modules()]
        assert after == before


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute")
def test_compiled_parts_of_a_model_are_seen_into() -> None:
    """In a capture, of fake tensors or real ones, nothing runs compiled; afterwards it does, as before."""
    runs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: runs.append(1) or graph.forward(*args)

    inner = Block()
    inner.compile(backend=backend)
    model = nn.Sequential(inner, torch.compile(Block(), backend=backend))
    mode = new_fake_mode()
    twin, x = fake_copy(model, mode), fake_copy(X, mode)
    for _ in range(2):
        with mode:
            found = [[call.path for call in record(twin, (x,), {}).root.walk()]]
        found += [[call.path for call in record(model, (X,), {}).root.walk()]]
        for paths in found:
            assert {"0", "0.linear", "0.drop", "1", "1._orig_mod.linear", "1._orig_mod.drop"} <= set(paths)
        assert runs == []
        model(X)
        assert runs == [1, 1]
        runs.clear()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_module_is_recorded_from_outside() -> None:
    """It takes no hooks; what its call returned is what it returned."""
    recorded = record(nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.ReLU()), (X,), {})
    assert recorded.root.children[0].output is recorded.root.children[1].args[0]


def test_a_fake_mode_within_another_mode_ends_alone() -> None:
    """It is not the innermost to torch, which keeps it below the others, and it is what ends."""
    with Seeing() as seeing:
        with new_fake_mode():
            assert hasattr(X + 1, "fake_mode")
        assert not hasattr(X + 1, "fake_mode")
        assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == [seeing]
    Seeing.operators.clear()


def test_an_error_of_a_fake_tensor_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Torch would log its traceback, where one line says it; the thread's other logs come through."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    try:
        with every_layer_kept():
            logger.critical("not said")
            logging.getLogger("another").critical("said within")
        logger.critical("said after")
    finally:
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"said within", "said after"}


def test_code_compiled_before_is_seen_into() -> None:
    """In a mode of its own a thread runs no compiled code, and outside of it compiled code is compiled still."""
    runs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: runs.append(1) or graph.forward(*args)

    double = torch.compile(lambda x: x * 2, backend=backend)
    double(X)
    with Seeing():
        double(X)
        double(X[:1])
    assert (len(runs), Seeing.operators) == (1, ["aten.mul.Tensor", "aten.slice.Tensor", "aten.mul.Tensor"])
    double(X)
    assert len(runs) == 2


class Seeing(OwnMode):
    """Lists what it sees."""

    operators: ClassVar[list[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Whatever is called."""
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


# -- overriding for one thread -----------------------------------------------------------------------------------------


class Base:
    """Something to override."""

    def method(self, n: int) -> Any:
        """Plain."""
        return self, n

    @classmethod
    def of_class(cls, n: int) -> Any:
        """Of the class."""
        return cls, n

    @staticmethod
    def of_none(n: int) -> Any:
        """Of nothing."""
        return None, n


class Derived(Base):
    """It inherits all of them."""


A, D = Base(), Derived()
OVERRIDDEN: dict[str, tuple[Any, str, Callable[[int], Any]]] = {
    "function of a module": (math, "sqrt", lambda n: math.sqrt(n)),
    "method": (Base, "method", lambda n: D.method(n)),
    "classmethod": (Base, "of_class", lambda n: Derived.of_class(n)),
    "staticmethod": (Base, "of_none", lambda n: D.of_none(n)),
    "inherited method": (Derived, "method", lambda n: D.method(n)),
    "inherited classmethod": (Derived, "of_class", lambda n: Derived.of_class(n)),
    "inherited staticmethod": (Derived, "of_none", lambda n: Derived.of_none(n)),
    "of an object": (A, "method", lambda n: A.method(n)),
}


def marked(mark: str) -> Callable[[Any], Any]:
    """An override that tells its mark and what its original returns."""
    return lambda original: lambda *args: (mark, original(*args))


@pytest.mark.parametrize("what", OVERRIDDEN)
def test_nested_overrides_end_one_by_one(what: str) -> None:
    """An inner override is given the outer one for its original, and the very object of before comes back."""
    owner, name, call = OVERRIDDEN[what]
    missing = object()
    before, plain = vars(owner).get(name, missing), call(3)
    with patched_here(owner, name, marked("outer")):
        assert call(3) == ("outer", plain)
        with patched_here(owner, name, marked("inner")):
            assert call(3) == ("inner", ("outer", plain))
            assert threaded(lambda: call(3)) == plain
        assert call(3) == ("outer", plain)
    assert vars(owner).get(name, missing) is before
    assert call(3) == plain


@pytest.mark.parametrize("what", OVERRIDDEN)
def test_an_exception_ends_the_override_that_it_leaves(what: str) -> None:
    """Those around it hold on until it leaves them, too."""
    owner, name, call = OVERRIDDEN[what]
    missing = object()
    before, plain = vars(owner).get(name, missing), call(3)
    with pytest.raises(ValueError, match="outer"), patched_here(owner, name, marked("outer")):
        with pytest.raises(ValueError, match="inner"), patched_here(owner, name, marked("inner")):
            raise ValueError("inner")
        assert call(3) == ("outer", plain)
        raise ValueError("outer")
    assert vars(owner).get(name, missing) is before


def threaded(function: Callable[[], Any]) -> Any:
    """What `function` returns in a thread of its own."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(WAIT)
    return found[0]


def test_a_stand_in_looks_like_the_original() -> None:
    """Name, documentation and what it wraps are the original's; it goes on working after its time."""

    def replace(original: Any) -> Any:
        return lambda value: "mine"

    with patched_here(Base, "method", replace):
        stand_in: Any = Base.method
    assert stand_in.__name__ == "method"
    assert stand_in.__doc__ == Base.method.__doc__
    assert stand_in.__wrapped__ is Base.method
    assert stand_in(A, 3) == (A, 3)


def test_somebody_elses_patch_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was put into the place in the meantime stays there, as nobody asked for it to be removed."""
    owner = Derived()
    with patched_here(owner, "method", lambda original: lambda n: "mine"):
        theirs = vars(owner)["method"] = lambda n: "theirs"
    assert owner.method is theirs


def test_a_backward_in_autograds_own_threads_is_the_callers() -> None:
    """An override also holds where autograd runs part of a backward pass in another thread, as it does on a GPU."""
    code = """
import os, random, threading, torch
from autorev.patching import patched_here

class Deep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth == 0:
            print(threading.get_ident() == caller, random.random())
        else:
            with torch.enable_grad():
                Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).sum().backward()
        return grad, None

caller = threading.get_ident()
with patched_here(random, "random", lambda original: lambda: "mine"):
    for depth in (1, 80):  # so many backward passes within another are spread over threads
        Deep.apply(torch.ones(1, requires_grad=True), depth).sum().backward()
os.sys.stdout.flush()
os._exit(0)  # torch, with threads for such a backward, does not always end in peace
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert run.stdout.split("\n")[:2] == ["True mine", "False mine"]


@pytest.mark.skipif(not hasattr(torch._C, "_remove_obj_from_tls"), reason="this torch cannot take anything away there")
def test_the_process_ends_in_peace_after_threads_that_captured() -> None:
    """What a thread leaves where torch keeps it is let go of at the thread's end, for which torch takes the GIL: that
    may be while Python ends, and then the process is aborted. So nothing is left there."""
    code = """
import sys, threading, torch, autorev
from torch import nn
from autorev.hush import warnings_hushed
from autorev.patching import patched_here

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x)

def work():
    with patched_here(sys, "getsizeof", lambda original: original), warnings_hushed("x"):
        pass
    autorev.analyze(nn.Sequential(*(Block() for _ in range(3))), torch.randn(2, 4))
    together.wait()
    assert not torch._C._is_key_in_tls(autorev.patching._KEY)

together = threading.Barrier(4)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
