"""What is remembered of operations on fake tensors is what torch answers.

python -m pytest tests/unit/test_metadata_cache.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from autorev import metadata_cache
from autorev.own_mode import OwnFakeMode

OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "by a whole number": lambda x, w: w.long() * 2,
    "by a fraction": lambda x, w: w.long() * 2.0,
    "product": lambda x, w: x @ w,
    "linear": F.linear,
    "to bf16": lambda x, w: x.to(torch.bfloat16),
    "to a dtype of a number": lambda x, w: x.half() + torch.ones(()),
    "view": lambda x, w: x.view(8, 2, 4),
    "view of a part": lambda x, w: x.narrow(0, 1, 7).view(-1).narrow(0, 3, 9),
    "transposed": lambda x, w: x.t(),
    "transposed and made anew": lambda x, w: x.t().reshape(-1),
    "split": lambda x, w: x.split(3),
    "chunks by position": lambda x, w: torch.tensor_split(x, 3, dim=1),
    "unbind": lambda x, w: x.unbind(),
    "in place": lambda x, w: x.clone().add_(1),
    "a part in place": lambda x, w: x.clone().narrow(0, 2, 3).mul_(2.0),
    "into": lambda x, w: torch.add(x, 1, out=torch.empty(8, 8)),
    "into a smaller one": lambda x, w: torch.mul(w, 1, out=torch.empty(0)),
    "several": lambda x, w: torch.topk(x, 2),
    "sorted": lambda x, w: x.sort(dim=0),
    "index": lambda x, w: x.index_select(0, torch.zeros(2, dtype=torch.long)),
    "embedding": lambda x, w: F.embedding(torch.zeros(2, 3, dtype=torch.long), w),
    "norm": lambda x, w: F.layer_norm(x, (8,), w.select(0, 0), w.select(0, 1)),
    "attention": lambda x, w: F.scaled_dot_product_attention(
        x.view(1, 2, 4, 8), x.view(1, 2, 4, 8), x.view(1, 2, 4, 8)
    ),
    "convolution": lambda x, w: F.conv1d(x.view(1, 8, 8), w.view(8, 8, 1)),
    "channels last": lambda x, w: x.view(1, 2, 4, 8).to(memory_format=torch.channels_last) * 2,
    "complex": lambda x, w: torch.view_as_complex(x.view(8, 4, 2)).conj() * 1j,
    "expanded": lambda x, w: x.select(0, 0).expand(5, 8),
    "strides of another": lambda x, w: torch.empty_like(x.t()),
    "made of nothing": lambda x, w: torch.zeros(3, dtype=torch.int8),
    "random": lambda x, w: F.dropout(x, 0.5) + torch.randn(8, 8),
    "of one element": lambda x, w: x.sum() * x.mean(0),
    "for each": lambda x, w: torch._foreach_add([x, w], 1.0),
    "squeezed in place": lambda x, w: x.clone().view(8, 8, 1).squeeze_(-1),
    "resized": lambda x, w: x.clone().resize_(4, 4),
}


def seen(value: Any, given: tuple[torch.Tensor, ...]) -> list[Any]:
    """All that a user of the result can tell."""
    memories = [tensor.untyped_storage()._cdata for tensor in given]
    found: list[Any] = []
    for leaf in tree_leaves(value):
        assert isinstance(leaf, FakeTensor)
        storage = leaf.untyped_storage()
        whose = memories.index(storage._cdata) if storage._cdata in memories else len(memories)
        memories.append(storage._cdata)
        found += [leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device, leaf.requires_grad]
        found += [leaf.is_conj(), storage.nbytes(), whose, leaf._version, leaf._is_view()]
        found.append(str(torch._C._dispatch_key_set(leaf)))
    return [type(value), *found]


def run(mode: FakeTensorMode, operation: Callable[..., Any], device: str, grad: bool = False) -> list[list[Any]]:
    with mode, torch.device(device):
        x, w = torch.empty(8, 8, requires_grad=grad), torch.empty(8, 8)
        return [seen(operation(x, w), (x, w)) for _ in range(3)]


REFUSED = {"into", "into a smaller one", "squeezed in place", "resized"}
"""By torch, where gradients are recorded."""
CASES = [
    *((name, device, False) for name in OPERATIONS for device in ("cpu", "cuda")),
    *((name, "cpu", True) for name in OPERATIONS if name not in REFUSED),
]


@pytest.mark.parametrize(("name", "device", "grad"), CASES)
def test_the_answer_is_torchs(name: str, device: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time, and when it is remembered; torch's CPU build records no gradients of a GPU's tensors."""
    monkeypatch.setattr(metadata_cache, "_known", {})
    theirs, ours = (run(mode(), OPERATIONS[name], device, grad) for mode in (FakeTensorMode, OwnFakeMode))
    assert theirs == ours


GIVEN: dict[str, Callable[[], torch.Tensor]] = {
    "as it is": lambda: torch.empty(4, 6),
    "another dtype": lambda: torch.empty(4, 6, dtype=torch.float64),
    "whole numbers": lambda: torch.empty(4, 6, dtype=torch.long),
    "transposed": lambda: torch.empty(6, 4).t(),
    "a part": lambda: torch.empty(6, 6).narrow(0, 2, 4),
    "another part": lambda: torch.empty(6, 6).narrow(0, 1, 4),
    "expanded": lambda: torch.empty(1, 6).expand(4, 6),
    "complex": lambda: torch.empty(4, 6, dtype=torch.complex64),
    "conjugated": lambda: torch.empty(4, 6, dtype=torch.complex64).conj(),
}
ASKED: dict[str, Callable[[torch.Tensor], Any]] = {
    "whole": lambda x: x * 2,
    "fraction": lambda x: x * 2.0,
    "truth": lambda x: x * True,
    "quotient": lambda x: x / 3,
    "part": lambda x: x.narrow(1, 2, 3),
    "first": lambda x: x.select(0, 0),
    "copy": lambda x: x.clone(),
    "in a row": lambda x: x.contiguous(),
    "materialised": lambda x: x.resolve_conj(),
    "flat": lambda x: x.reshape(-1),
    "sum": lambda x: x.sum(0),
}


def test_no_two_calls_are_taken_for_one() -> None:
    """Whatever was asked before: all shapes are the same here, and the cache is, too."""
    for _ in range(2):
        for given, operation in itertools.product(GIVEN.values(), ASKED.values()):
            found = []
            for mode in (FakeTensorMode(), OwnFakeMode()):
                with mode:
                    x = given()
                    found.append(seen(operation(x), (x,)))
            assert found[0] == found[1]


def test_it_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is asked once."""
    monkeypatch.setattr(metadata_cache, "_known", {})
    asked: list[Any] = []
    dispatch = FakeTensorMode.__torch_dispatch__

    def counting(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked.extend([func] if func.namespace == "aten" else [])
        return dispatch(self, func, types, args, kwargs)

    monkeypatch.setattr(FakeTensorMode, "__torch_dispatch__", counting)
    for mode in (OwnFakeMode(), OwnFakeMode()):
        with mode:
            x = torch.empty(4, 4)
            for _ in range(5):
                (x @ x).t().split(2)[0].clone().add_(1)
    assert len(asked) == len(set(asked)) and len(asked) >= 5


def test_what_was_written_in_place_is_seen() -> None:
    """Autograd refuses a value that it saved, and that was changed since."""
    with OwnFakeMode():
        for _ in range(2):
            x = torch.ones(4, requires_grad=True)
            y = x.exp()
            y.view(2, 2)[0].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_arguments_of_one_memory() -> None:
    """Of whose memory a result is, is not learned from arguments that share theirs."""
    with OwnFakeMode():
        x, y = torch.empty(4), torch.empty(4)
        for first, second in ((x, x), (x, y), (y, x), (x, x.view(4))):
            assert first.add_(second) is first
            assert first.view_as(second).untyped_storage()._cdata == first.untyped_storage()._cdata
            assert len({t.untyped_storage()._cdata for t in (first, first + second)}) == 2


def test_known_numbers_stay_known() -> None:
    """A number that a fake tensor remembers, and what depends on values."""
    with OwnFakeMode(allow_non_fake_inputs=True):
        for number in (3, 4, 3):
            assert torch.tensor(number).item() == number
            assert (torch.tensor(number) + 1).item() == number + 1
        for _ in range(2):
            with pytest.raises(torch._subclasses.fake_tensor.DynamicOutputShapeException):
                torch.zeros(3).nonzero()


def test_what_is_set_for_a_thread_matters() -> None:
    """The default dtype, and inference mode."""
    with OwnFakeMode():
        whole = torch.zeros(2, dtype=torch.long)
        one = [(whole / 3).dtype for _ in range(2)]
        torch.set_default_dtype(torch.float64)
        try:
            other = (whole / 3).dtype
        finally:
            torch.set_default_dtype(torch.float32)
        for _ in range(2):
            with torch.inference_mode():
                assert (whole + 1).is_inference() and torch.zeros(2).is_inference()
            assert not (whole + 1).is_inference() and not torch.zeros(2).is_inference()
    assert [*one, other] == [torch.float32, torch.float32, torch.float64]


def test_it_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that looks at one model after another does not grow."""
    monkeypatch.setattr(metadata_cache, "_known", {})
    monkeypatch.setattr(metadata_cache, "MOST_ENTRIES", 8)
    with OwnFakeMode():
        for size in range(1, 50):
            torch.empty(size) + 1
    assert 0 < len(metadata_cache._known) <= 8
