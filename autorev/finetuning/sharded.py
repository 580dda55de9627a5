"""Weights, gradients and optimiser states spread over the processes (FSDP2), while the run's files stay whole.

Every block is sharded, and what is left of the model (`fully_shard`). A checkpoint is what one process by itself would
have written, so that a run may go on in any number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from autorev.finetuning import world
from autorev.finetuning.trainer import FineTuner
from autorev.integrations.peft import has_adapters


class ShardedFineTuner(FineTuner):
    """`FineTuner` whose model is sharded when training begins.

    Args:
        blocks: the modules that are gathered one at a time.
    """

    def __init__(self, *args: Any, blocks: Sequence[nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.blocks = blocks

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Of the parts: the model is sharded first."""
        if not isinstance(self.model, FSDPModule):
            mesh = init_device_mesh(self.args.device.type, (world.size(),))
            for module in (*self.blocks, self.model):
                fully_shard(module, mesh=mesh)
            # Autocast is accelerate's; it must not put DDP around, which is what this mark says.
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
            self.model._is_accelerate_prepared = True
        return super().create_optimizer(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # -- files: all processes gather, the first one writes

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole weights; those of the adapters where there are some."""
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=has_adapters(self.model)
        )
        weights = get_model_state_dict(self.model, options=options)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        whole = tree_map_only(DTensor, lambda part: part.full_tensor().cpu(), self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(whole, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_states(self, checkpoint: str) -> None:
        """Each process takes its part."""
        super()._load_states(checkpoint)
        for weight, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(weight, DTensor) and value.shape == weight.shape:
                    state[name] = distribute_tensor(value, weight.device_mesh, weight.placements)
