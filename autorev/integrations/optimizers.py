"""Optimisers as programs make them: torch's, bitsandbytes' and torchao's own, and stepped in backward where asked."""

from __future__ import annotations

import weakref
from importlib import import_module
from typing import Any

import torch
from torch import nn

from autorev.errors import TrainingError
from autorev.optimizers import KINDS, MOMENTUM, Optimizer
from autorev.packages import require


def check_runs(optimizer: Optimizer, kind: str) -> None:
    """Raise unless it can be run here, on a device of that kind (cuda or cpu).

    Raises:
        SettingError: it needs a GPU.
        MissingPackageError: its library is not installed.
    """
    optimizer.check_device(kind)
    require(f"the optimizer {optimizer}", optimizer.library)


def make_optimizer(model: nn.Module, spec: str, learning_rate: float) -> torch.optim.Optimizer:
    """The optimiser that `spec` spells (`adamw-fused:step=backward`), of the parameters of `model` that train. What it
    keeps of embeddings is fp32, as in a Trainer.

    Raises:
        SettingError: it spells none, or one that needs a GPU.
        MissingPackageError: its library is not installed.
    """
    optimizer = Optimizer.parse(spec)
    check_runs(optimizer, next(model.parameters()).device.type)
    cls, options = _class_of(optimizer)
    made: torch.optim.Optimizer = cls([p for p in model.parameters() if p.requires_grad], lr=learning_rate, **options)
    if optimizer.is_8bit:
        manager = import_module("bitsandbytes.optim").GlobalOptimManager.get_instance()
        for module in (module for module in model.modules() if isinstance(module, nn.Embedding)):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    if optimizer.step == "backward":
        step_in_backward(made, model)
    return made


def trainer_options(optimizer: Optimizer, learning_rate: float) -> tuple[str, tuple[Any, dict[str, Any]] | None]:
    """(`TrainingArguments.optim`, `Trainer(optimizer_cls_and_kwargs=...)`): the latter for what has no name there."""
    name = KINDS[optimizer.name].trainer
    if name is not None and optimizer.foreach is None:
        return name, None
    cls, options = _class_of(optimizer)
    adam = {"betas": (0.9, 0.999), "eps": 1e-8} if optimizer.momenta == 2 else {}
    return name or "adamw_torch", (cls, {"lr": learning_rate, **adam, **options})


def _class_of(optimizer: Optimizer) -> tuple[Any, dict[str, Any]]:
    """The library's class, and what it is told."""
    if optimizer.on_host:
        return _offloading(), {"offload_gradients": optimizer.gradients == "host"}
    if optimizer.library == "bitsandbytes":
        bits = {"optim_bits": 8 if optimizer.is_8bit else 32, "is_paged": optimizer.paged}
        return import_module("bitsandbytes.optim").AdamW, bits
    if optimizer.name == "adamw-fused":
        return torch.optim.AdamW, {"fused": True}
    foreach = {"foreach": {None: None, "on": True, "off": False}[optimizer.foreach]}
    if optimizer.name == "adamw":
        return torch.optim.AdamW, foreach
    return torch.optim.SGD, {"momentum": MOMENTUM if optimizer.momenta else 0.0, **foreach}


def _offloading() -> Any:
    """torchao's `CPUOffloadOptimizer`. Once a state is loaded (accelerate loads one before training), its groups of
    small parameters are other dicts than those that it shows, and a schedule would move their learning rate in vain.
    """
    own = import_module("torchao.optim").CPUOffloadOptimizer

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        own.load_state_dict(self, state_dict)
        if self.d_opt is not None:
            self.d_param_groups = self.d_opt.param_groups

    return type(own.__name__, (own,), {"load_state_dict": load_state_dict})


def step_in_backward(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """From now on `optimizer` updates each parameter as soon as its gradient is there, and frees the gradient.

    As torch's tutorial "How to save memory by fusing the optimizer step into the backward pass" does, with one
    optimiser instead of one per parameter: no other gradient is there when it steps. Its state, its groups and their
    learning rates, and what its `state_dict` holds stay its own; `step` by itself updates nothing. Lasts as long as
    the optimiser.

    Raises in backward:
        TrainingError: a gradient arrives twice between two calls of `step`, so that one would be of a part.
    """
    own, alive = type(optimizer), weakref.ref(optimizer)
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    updated: set[torch.Tensor] = set()

    def arrived(parameter: torch.Tensor) -> None:
        one = alive()
        if one is None:
            return
        if parameter in updated:
            raise TrainingError(
                f"the gradient of {names[parameter]} arrived a second time before the step ended, so that it was "
                "updated by a part of it; an optimizer that steps in backward takes one backward pass a step"
            )
        updated.add(parameter)
        own.step(one)
        parameter.grad = None

    def step(self: torch.optim.Optimizer, closure: Any = None) -> None:
        updated.clear()

    def zero_grad(self: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        updated.clear()
        own.zero_grad(self, set_to_none)

    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        weakref.finalize(optimizer, parameter.register_post_accumulate_grad_hook(arrived).remove).atexit = False
    optimizer.__class__ = type(own.__name__, (own,), {"step": step, "zero_grad": zero_grad})
