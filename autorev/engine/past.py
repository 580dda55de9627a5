"""Causal attention of a tile of positions: its queries look at its own keys and values, and at those before it.

        tile 0 --> q, k, v ---> attention(q, k    , v    )
        tile 1 --> q, k, v ---> attention(q, k k  , v v  )      what comes from tiles before is the `Past`
        tile 2 --> q, k, v ---> attention(q, k k k, v v v)

NOTE [ Causal tiles ]

Of a module whose positions meet in one call of attention (`detect.causal`), the keys and values of all positions are
alive, and one tile's share of everything else. The kernel is PyTorch's own, told by `causal_lower_right` (on a CPU by
a mask) where the queries are. Tiles run in order, and each adds its keys and values to the past.

In backward the last tile comes first. By the time that a tile has its turn, the queries of those behind it have left
their gradients of its keys and values (`_Extend`), and its own add the rest: so it runs once.

Rule 1. Before any tile runs again, the keys and values of all are made again: each runs up to its call of attention.
Rule 2. The gradients of keys and values are added up in float32 at least, as a kernel adds them up within itself.
Rule 3. A tile runs with gradients, or without, as it did the first time: kernels are chosen by that.

A padded batch comes with a mask, of all queries by all keys, and then nobody says `is_causal`: the mask's values do.
They are looked at before the tiles run (`mask`). The code of a tile is given the mask of its own positions, as a
shorter call would be, and hands it to attention (`detect.masks`), where the rows of its queries take its place, up to
the last key that there is. A query that is shown no key, as those of left padding are, gets what the kernel makes of
such a row (zeros, and no gradient): a tile calls the same one, with the same row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from autorev.engine.autograd import apply
from autorev.engine.mask import rows
from autorev.errors import ConversionError

AXIS = -2
"""Of queries, keys and values: their positions."""
FEW = 64
"""Queries that a CPU's kernel is given at a time."""


_as_a_gpu: ContextVar[bool] = ContextVar("autorev attends as a GPU", default=False)


@contextmanager
def attending_as_a_gpu() -> Iterator[None]:
    """While it lasts, tensors without values that are said to be on a CPU stand for a GPU's."""
    token = _as_a_gpu.set(True)
    try:
        yield
    finally:
        _as_a_gpu.reset(token)


class Past:
    """The keys and values of one run over the tiles of a call."""

    def __init__(self, positions: int, mask: torch.Tensor | None = None) -> None:
        """`positions`: how many the call has; `mask`: what it is given for its attention, of all of them."""
        self.positions, self.mask = positions, mask
        self.whole: list[torch.Tensor] = []
        """The keys, and the values, as far as they are known."""
        self.tokens: list[torch.Tensor | None] = [None, None]
        """Tensors without values, by which autograd hands the gradients of `whole` from tile to tile."""
        self.parts: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []

    # Around the run of the tile that begins at position `start`:

    def first(self, start: int) -> TorchFunctionMode:
        """Its graph leads on to those of the tiles before it."""
        return _Attending(partial(self._linked, start), self.mask)

    def values(self, start: int) -> TorchFunctionMode:
        """It has no graph, or one that nobody will use."""
        return _Attending(partial(self._added, start), self.mask)

    def again(self, start: int) -> TorchFunctionMode:
        """All keys and values are known."""
        return _Attending(partial(self._known, start), self.mask)

    def keys(self, start: int) -> TorchFunctionMode:
        """It ends with its call of attention, and only its keys and values are wanted."""
        return _UpToAttention(partial(self._added, start), self.mask)

    def joined(self) -> TorchFunctionMode:
        """For the oracle: by ordinary autograd."""
        return _Attending(self._joined, self.mask)

    # What its keys (0), or its values (1), become:

    def _linked(self, start: int, which: int, mine: torch.Tensor) -> torch.Tensor:
        whole = self._room(which, mine)
        seen: torch.Tensor
        self.tokens[which], seen = apply(_Extend, mine, self.tokens[which], [whole], start)
        return seen

    def _added(self, start: int, which: int, mine: torch.Tensor) -> torch.Tensor:
        self._room(which, mine).narrow(AXIS, start, mine.shape[AXIS]).copy_(mine.detach())
        return self._known(start, which, mine)

    def _known(self, start: int, which: int, mine: torch.Tensor) -> torch.Tensor:
        seen = self.whole[which].narrow(AXIS, 0, start + mine.shape[AXIS])
        return seen.detach().requires_grad_(mine.requires_grad)

    def _joined(self, which: int, mine: torch.Tensor) -> torch.Tensor:
        self.parts[which].append(mine)
        return torch.cat(self.parts[which], AXIS)

    def _room(self, which: int, mine: torch.Tensor) -> torch.Tensor:
        if len(self.whole) == which:
            shape = [*mine.shape]
            shape[AXIS] = self.positions
            self.whole.append(mine.new_empty(shape))
        return self.whole[which]


class _Attending(TorchFunctionMode):
    def __init__(self, extended: Callable[[int, torch.Tensor], torch.Tensor], mask: torch.Tensor | None) -> None:
        super().__init__()
        self.extended, self.mask = extended, mask
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attending = func is F.scaled_dot_product_attention
        self.calls += attending
        return (self.attention if attending else func)(*args, **(kwargs or {}))

    def __exit__(self, *raised: Any) -> bool | None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        if raised[0] is None and self.calls != 1:
            raise ConversionError(
                f"a block whose attention is tiled called scaled_dot_product_attention {self.calls} times, and once "
                "when it was analysed: it attends by other code now (`set_attn_implementation`); convert again"
            )
        return None

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **how: Any,
    ) -> torch.Tensor:
        """In the place of `scaled_dot_product_attention`."""
        own = key.shape[AXIS]
        known = is_causal or query.shape[AXIS] == 1 if attn_mask is None else self._is_mine(attn_mask, own)
        if dropout_p or not known:
            raise ConversionError(
                "a block whose attention is tiled calls it with another mask, with dropout, or not causally, which it "
                "did not when it was analysed; convert again"
            )
        key, value = self.extended(0, key), self.extended(1, value)
        shown = None
        if attn_mask is not None and self.mask is not None:
            shown = rows(self.mask, key.shape[AXIS] - own, own).to(attn_mask.dtype)
        if query.device.type == "cpu" and not _as_a_gpu.get() and query.shape[AXIS] == own:
            return _on_a_cpu(query, key, value, shown, **how)
        if shown is not None:
            return F.scaled_dot_product_attention(query, key, value, shown, **how)
        bias = lower_right(query.shape[AXIS], key.shape[AXIS])
        return F.scaled_dot_product_attention(query, key, value, bias, **how)

    def _is_mine(self, attn_mask: torch.Tensor, own: int) -> bool:
        return self.mask is not None and attn_mask.shape[-2:] == (own, own)


def lower_right(queries: int, keys: int) -> CausalBias:
    """Torch's `causal_lower_right`; its own takes 2 x queries x keys numbers of the host's memory, and uses none."""
    with _disable_current_modes():  # a bias is a tensor of a class of its own, which no mode can make
        bias: CausalBias = torch.Tensor._make_subclass(CausalBias, torch.empty(0))
    bias.variant, bias.seq_len_q, bias.seq_len_kv = CausalVariant.LOWER_RIGHT, queries, keys
    return bias


def _on_a_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shown: torch.Tensor | None, **how: Any
) -> torch.Tensor:
    """The CPU's kernel is not told where the queries are: it takes a mask, and makes numbers of it. So a few queries at
    a time are given theirs. Where there is none, all share one: of those before, it is a part of that of the last ones.
    """
    queries, keys = query.shape[AXIS], key.shape[AXIS]
    few = min(FEW, queries)
    last = _causal(few, keys, query) if shown is None else query.new_empty(0)
    parts = []
    for start in range(0, queries, few):
        end = min(start + few, queries)
        seen = keys - queries + end
        parts.append(
            F.scaled_dot_product_attention(
                query.narrow(AXIS, start, end - start),
                key.narrow(AXIS, 0, seen),
                value.narrow(AXIS, 0, seen),
                last[few - (end - start) :, keys - seen :] if shown is None else shown[..., start:end, :seen],
                **how,
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, AXIS)


def _causal(queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    later = torch.arange(keys, device=like.device) > keys - queries + torch.arange(queries, device=like.device)[:, None]
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill_(later, float("-inf"))


class _UpToAttention(_Attending):
    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **how: Any) -> Any:
        self.extended(0, key), self.extended(1, value)
        raise _Reached

    def __exit__(self, *raised: Any) -> bool:
        super().__exit__(*raised)
        if raised[0] is _Reached:
            raised[1].__traceback__ = None  # its frames hold what the tile has computed so far
        return raised[0] is _Reached


class _Reached(Exception):  # noqa: N818 - it is no error
    """A tile has come to its call of attention."""


class _Extend(torch.autograd.Function):
    """A tile's keys, the gradient token of the tiles before -> the token of all so far, all keys so far."""

    @staticmethod
    def forward(
        ctx: Any, mine: torch.Tensor, token: torch.Tensor | None, whole: list[torch.Tensor], start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (buffer,) = whole  # in a list it is no input of the node
        ctx.start, ctx.length, ctx.shape, ctx.dtype = start, mine.shape[AXIS], buffer.shape, mine.dtype
        ctx.set_materialize_grads(False)
        buffer.narrow(AXIS, start, ctx.length).copy_(mine)
        wide = torch.promote_types(mine.dtype, torch.float32)
        passed = torch.zeros((), dtype=wide, device=mine.device).expand(buffer.shape)
        return passed, buffer.narrow(AXIS, 0, start + ctx.length).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total, seen = grads
        if seen is not None:
            if total is None:  # it is the last tile; from here on, nobody but these nodes sees it
                total = seen.new_zeros(ctx.shape, dtype=torch.promote_types(ctx.dtype, torch.float32))
            total.narrow(AXIS, 0, ctx.start + ctx.length).add_(seen)
        own = None if total is None else total.narrow(AXIS, ctx.start, ctx.length).to(ctx.dtype)
        return own, total if ctx.needs_input_grad[1] else None, None, None
