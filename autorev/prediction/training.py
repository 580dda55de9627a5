"""What a training step does besides the model's forward: which parameters train, and which loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from autorev.capture.quantised import StandIn, linear_sizes
from autorev.chunked_loss import head_of, linear_loss, run_without_logits
from autorev.errors import SettingError
from autorev.integrations.transformers import output_head
from autorev.losses import floating_outputs, returned_loss
from autorev.setting import Setting
from autorev.workload import Call

NO_LABELS = "the batch holds no labels, so there is no loss to compute in chunks"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LowRank(nn.Module):
    """A linear layer with a LoRA of rank r beside it, arXiv 2106.09685: `y = W x + s B A x`, only A and B train.

    Operation by operation what PEFT's `lora.Linear.forward` does, and beside packed weights its `lora.Linear4bit`.
    """

    def __init__(self, base: nn.Module, inputs: int, outputs: int, setting: Setting) -> None:
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(setting.lora_dropout) if setting.lora_dropout else nn.Identity()
        dtype = DTYPES[setting.adapter_dtype] if setting.adapter_dtype else next(base.parameters()).dtype
        self.down = nn.Parameter(torch.empty(setting.lora_rank or 0, inputs, dtype=dtype))
        self.up = nn.Parameter(torch.empty(outputs, setting.lora_rank or 0, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]"""
        out: torch.Tensor = self.base(x)
        x = x.to(self.down.dtype)
        added = F.linear(F.linear(self.dropout(x), self.down), self.up) * 2.0
        if isinstance(self.base, StandIn) and not self.base.kept.unpacked:  # which is a plain one to PEFT
            added = added.to(out.dtype)
        return (out + added).to(out.dtype)


def choose_trained(twin: nn.Module, blocks: list[nn.Module], setting: Setting) -> list[str]:
    """Freeze what does not train, and put LoRA beside every linear layer of the blocks when asked.

    Called under the fake mode that `twin` was made in; returns notes for the reader.

    Raises:
        SettingError: the model has no head, or no linear layer inside its blocks.
    """
    if setting.trains == "full":
        return []
    twin.requires_grad_(False)
    if setting.trains == "head":
        return _train_head(twin)
    assert setting.lora_rank is not None
    adapted = 0
    for block in blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                sizes = linear_sizes(child)
                if sizes is not None and not isinstance(parent, LowRank):
                    setattr(parent, name, LowRank(child, *sizes, setting))
                    adapted += 1
    if not adapted:
        raise SettingError(
            "LoRA needs linear layers inside the blocks, and this model has none there; use `trains=full` or head"
        )
    return []


def find_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the model's outputs: its vocabulary head, else a last linear layer."""
    head = output_head(model)
    if head is not None:
        return head
    last: nn.Module | None = None
    for child in model.children():
        if any(True for _ in child.parameters()):
            last = child
    return last if isinstance(last, nn.Linear) else None


def _train_head(twin: nn.Module) -> list[str]:
    head = find_head(twin)
    if head is None:
        raise SettingError(f"{type(twin).__name__} has no output layer to train alone; use `trains=full` or lora")
    elsewhere = {id(p) for m in twin.modules() if m is not head for p in m._parameters.values() if p is not None}
    notes = []
    for name, parameter in list(head.named_parameters(recurse=False)):
        if id(parameter) in elsewhere:
            # Training the shared matrix would send gradients through the embedding, and with it every block.
            setattr(head, name, nn.Parameter(parameter.detach().clone()))
            notes.append("the head shares its weight with the embedding; training it alone unties them")
    head.requires_grad_(True)
    return notes


# -- loss ------------------------------------------------------------


def loss_function(model: nn.Module, loss: str) -> Callable[[nn.Module, Call], torch.Tensor]:
    """What `simulate` calls to get a scalar loss: the model's own, or the chunked loss on its last hidden states.

    Raises:
        SettingError: a chunked loss of a model that has no vocabulary head.
    """
    if loss == "full":
        return own_loss
    if head_of(model) is None:
        raise SettingError(
            f"{type(model).__name__} has no vocabulary head (get_output_embeddings), so there is nothing to chunk; "
            "use `loss=full`"
        )
    return _chunked_loss


def own_loss(model: nn.Module, call: Call) -> torch.Tensor:
    """The loss that the model returns, or the mean of every floating tensor that it returns.

    Raises:
        SettingError: nothing that it returns depends on a trainable parameter.
    """
    args, kwargs = call
    out = model(*args, **kwargs)
    loss = returned_loss(out)
    if loss is not None:
        return loss
    tensors = [tensor for tensor in floating_outputs(out) if tensor.requires_grad]
    if not tensors:
        raise SettingError(f"no output of {type(model).__name__} depends on a trainable parameter: nothing to train")
    total = tensors[0].mean()
    for tensor in tensors[1:]:
        total = total + tensor.mean()
    return total


def _chunked_loss(model: nn.Module, call: Call) -> torch.Tensor:
    """The chunked loss in place of head and loss; whether the labels are shifted makes no difference to memory."""
    args, kwargs = call
    head = head_of(model)
    assert head is not None
    if kwargs.get("labels") is None:
        raise SettingError(NO_LABELS)
    _, hidden = run_without_logits(model, model, head, args, kwargs)
    return linear_loss(head, hidden, kwargs["labels"])
