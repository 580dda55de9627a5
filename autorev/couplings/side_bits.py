"""Pack the low k bits of each integer of a stream into k/8 bytes an element, and unpack them again.

Eight elements share k bytes. They are not neighbours: the stream is taken as eight rows, and the bits of one column go
into one word, so that every step is a whole-row operation.

    stream of 8 n elements, k = 3                  one int32 word per column, of which 3 bytes are kept

    row 0   e_0    e_1    ...  e_n-1               bits  0- 2   of row 0
    row 1   e_n    ...                             bits  3- 5   of row 1
    ...                                            ...
    row 7   e_7n   ...         e_8n-1              bits 21-23   of row 7

A word holds 8 rows of up to 4 bits. More bits than that are packed four at a time, each four into words of their own.
"""

from __future__ import annotations

import torch

ROWS = 8
WORD = 4
"""Bits per element that eight rows fit into an int32."""


def pack(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """The low `bits` bits of an int32 tensor as uint8: `bits` bytes for every eight elements, begun ones included."""
    rows = _as_rows(stream)  # (8, n) int32
    parts = []
    for low in range(0, bits, WORD):
        width = min(WORD, bits - low)
        source = rows if low == 0 else rows >> low
        word = source[0] & _mask(width)  # (n,) int32
        row = torch.empty_like(word)
        for i in range(1, ROWS):
            torch.bitwise_and(source[i], _mask(width), out=row)
            # A shift and an `or` in one pass. With 4 bits, row 7 reaches the sign bit: the sum wraps round to it.
            word.add_(row, alpha=1 << (width * i))
        # Eight rows of `width` bits are `width` bytes, the lowest ones of the word (little-endian).
        parts.append(word.view(torch.uint8).view(-1, WORD)[:, :width].contiguous())  # (n, width) uint8
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # (n, bits) uint8


def unpack(packed: torch.Tensor, bits: int, stream: torch.Tensor) -> torch.Tensor:
    """Put the bits that `pack` took from a tensor back into `stream`, where they are zeros; returns it."""
    if stream.is_contiguous() and stream.numel() % ROWS == 0:
        _put_back(packed, bits, stream.view(ROWS, -1))
        return stream
    rows = torch.zeros(ROWS, packed.shape[0], dtype=torch.int32, device=packed.device)
    _put_back(packed, bits, rows)
    return stream.bitwise_or_(rows.view(-1)[: stream.numel()].view(stream.shape))  # without the padding


def _put_back(packed: torch.Tensor, bits: int, rows: torch.Tensor) -> None:
    columns = packed.shape[0]  # of rows (8, n)
    row = torch.empty(columns, dtype=torch.int32, device=packed.device)
    for low in range(0, bits, WORD):
        width = min(WORD, bits - low)
        word = torch.zeros(columns, WORD, dtype=torch.uint8, device=packed.device)
        word[:, :width] = packed[:, low : low + width]
        word = word.view(torch.int32).view(-1)  # (n,): the bytes that were cut off are zeros
        for i in range(ROWS):
            torch.bitwise_right_shift(word, width * i, out=row)  # brings copies of the sign, which the mask takes off
            rows[i].add_(row.bitwise_and_(_mask(width)), alpha=1 << low)


def _as_rows(stream: torch.Tensor) -> torch.Tensor:
    flat = stream.reshape(-1)
    missing = -flat.numel() % ROWS
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(ROWS, -1)


def _mask(width: int) -> int:
    return (1 << width) - 1
