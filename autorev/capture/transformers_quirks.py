"""Where `transformers` behaves otherwise under fake tensors than in real training, and how to stop it.

Two of its functions look at values, which fake tensors do not have, and then choose a path that real training
does not take:

- `masking_utils.find_packed_sequence_indices` asks whether a row packs several texts. Unable to see, it says
  yes, and every causal model then builds and keeps a [batch, 1, sequence, sequence] mask in place of SDPA's
  `is_causal`. The calls that autorev makes hold one text per row.
- `integrations.moe._can_use_grouped_mm` allows a kernel whose fake version exists in bf16 alone, while the
  real one also runs in fp32 and fp16. The fallback that `transformers` brings has a fake version in every
  dtype and keeps the same tensors for backward: the tokens sorted by expert, and the weights, not copied.
  (Of the other implementations "batched_mm" copies the experts' weights for every token, and "eager" asks
  which experts were hit. Real training takes "grouped_mm".)
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quirks() -> Iterator[None]:
    """While it lasts, models of `transformers` take under fake tensors the path they take in training.

    Enter it after the model was built: what is not imported yet is not patched, and nothing is imported here.
    """
    undo: list[tuple[Any, str, Any]] = []

    def patch(module_name: str, name: str, replace: Any) -> None:
        module = sys.modules.get(module_name)
        original = getattr(module, name, None)
        if original is not None:  # another version of transformers may lack the function, and then the quirk
            undo.append((module, name, original))
            setattr(module, name, replace(original))

    patch("transformers.masking_utils", "find_packed_sequence_indices", _one_text_per_row)
    patch("transformers.integrations.moe", "_can_use_grouped_mm", _grouped_only_where_it_can_be_faked)
    try:
        with quiet():
            yield
    finally:
        for module, name, original in reversed(undo):
            setattr(module, name, original)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what `transformers` and PEFT advise on configs and missing kernels."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="transformers|peft")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_files() -> Iterator[None]:
    """`quiet`, and without the bars of `transformers` for files that it reads and writes: autorev has its own."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as theirs

    bar, shown = gguf.tqdm, theirs.is_progress_bar_enabled()
    gguf.tqdm = lambda items, **how: items
    theirs.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        gguf.tqdm = bar
        if shown:
            theirs.enable_progress_bar()


def _one_text_per_row(original: Any) -> Any:
    return lambda position_ids: None


def _grouped_only_where_it_can_be_faked(original: Any) -> Any:
    import torch

    def can_use(input: Any, weight: Any, offs: Any) -> bool:
        return weight.dtype == torch.bfloat16 and bool(original(input, weight, offs))

    return can_use
