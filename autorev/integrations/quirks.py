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

Two more things are about pictures in a text:

- `torch_compilable_check` asks whether there are as many places for a picture in the text as there are pieces of it.
  Calls that autorev makes are so, and a fake tensor is believed.
- How large a picture is stands in a small tensor of numbers (`image_sizes`), which loops run over: see
  `known_numbers`.

Two are torch's. `ctc_loss` has to know how long each text is before it can tell what it keeps for backward: beside the
logarithms of the probabilities, which its stand-in keeps too, a table of as many steps by twice the text's length. And
a forward that calls `.to(dtype)` of a module (the routers of Switch Transformers) swaps fake
weights with their copies, which torch refuses of tensors that anybody watches. Where nothing changes, nothing is done.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from autorev.hush import logs_hushed, warnings_hushed
from autorev.integrations.known_numbers import known_numbers_stay
from autorev.patching import patched_here


@contextmanager
def quirks() -> Iterator[None]:
    """While it lasts, models of `transformers` take under fake tensors the path they take in training.

    Enter it after the model was built: what is not imported yet is not patched, and nothing is imported here.
    """
    places = (
        ("transformers.masking_utils", "find_packed_sequence_indices", _one_text_per_row),
        ("transformers.integrations.moe", "_can_use_grouped_mm", _grouped_only_where_it_can_be_faked),
        ("torch", "_check_tensor_all_with", _fake_ones_are_believed),
        ("torch.nn.functional", "ctc_loss", _keeps_what_ctc_keeps),
    )
    with ExitStack() as stack:
        for module_name, name, replace in places:
            module = sys.modules.get(module_name)
            if hasattr(module, name):  # another version of transformers may lack the function, and then the quirk
                stack.enter_context(patched_here(module, name, replace))
        stack.enter_context(patched_here(nn.Module, "_apply", fake_weights_replaced))
        stack.enter_context(quiet())
        stack.enter_context(known_numbers_stay())
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what `transformers` and PEFT advise on configs and missing kernels, to this thread."""
    with logs_hushed("transformers", logging.ERROR), warnings_hushed("transformers|peft"):
        yield


@contextmanager
def quiet_files() -> Iterator[None]:
    """`quiet`, and without the bars of `transformers` for files that it reads and writes: autorev has its own."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as theirs

    with (
        patched_here(gguf, "tqdm", lambda original: lambda items, **how: items),
        patched_here(
            type(theirs.tqdm), "__call__", lambda original: lambda bar, *a, **how: theirs.EmptyTqdm(*a, **how)
        ),
        quiet(),
    ):
        yield


def fake_weights_replaced(original: Any) -> Any:
    """In the place of `nn.Module._apply`: what `.to()`, `.half()` and the like call."""

    def apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        if not any(isinstance(tensor, FakeTensor) for tensor in (*module.parameters(), *module.buffers())):
            return cast(nn.Module, original(module, function, recurse))
        for kind in ("_parameters", "_buffers"):
            replace_tensors(module, kind, function)
        return module

    return apply


def replace_tensors(model: nn.Module, kind: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put `function` of each parameter or buffer in its place; what is returned as it is stays."""
    replaced: dict[int, torch.Tensor] = {}  # tied weights stay tied
    with torch.no_grad():
        for module in model.modules():
            tensors: dict[str, torch.Tensor | None] = getattr(module, kind)
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in replaced:
                    new = function(old)
                    made_anew = isinstance(old, nn.Parameter) and new is not old
                    replaced[id(old)] = nn.Parameter(new, old.requires_grad) if made_anew else new
                tensors[name] = replaced[id(old)]


def _fake_ones_are_believed(original: Any) -> Any:
    def check(error: Any, condition: Any, *message: Any) -> None:
        if not isinstance(condition, FakeTensor):
            original(error, condition, *message)

    return check


def _keeps_what_ctc_keeps(original: Any) -> Any:
    def ctc_loss(log_probs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(log_probs, FakeTensor):
            return cast(torch.Tensor, original(log_probs, *args, **kwargs))
        return log_probs.square().mean()

    return ctc_loss


def _one_text_per_row(original: Any) -> Any:
    return lambda position_ids: None


def _grouped_only_where_it_can_be_faked(original: Any) -> Any:
    def can_use(input: Any, weight: Any, offs: Any) -> bool:
        return weight.dtype == torch.bfloat16 and bool(original(input, weight, offs))

    return can_use
