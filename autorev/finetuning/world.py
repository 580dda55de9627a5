"""This process among those that train one model together, as `torchrun` starts them.

Each holds the whole model and trains on its share of a step's rows (`transformers.Trainer` shares them out, and DDP
averages the gradients). The first one alone claims the folder, writes to it, and speaks; whatever is no matter of a
process's own rows, all compute alike. For a process by itself, nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from autorev.errors import AutorevError, SettingError, TrainingError, message_of
from autorev.packages import require

T = TypeVar("T")
_ENDING = "autorev/ending"
"""Of the group's store: who was the first to end."""
_OTHERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism of its own",
}
"""Ways to train that `accelerate launch` puts into the environment."""


def rank() -> int:
    """This process's number, from 0."""
    if _joined():
        import torch.distributed as dist

        return dist.get_rank()
    return int(os.environ["RANK"]) if _launched() else 0


def size() -> int:
    """How many processes train together."""
    if _joined():
        import torch.distributed as dist

        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def join() -> None:
    """Meet the others that were launched with this process.

    Raises:
        SettingError: there is no GPU for it.
        MissingPackageError: accelerate is not installed.
    """
    if _joined() or size() == 1:
        return
    require("fine-tuning", "accelerate", "transformers")
    import torch
    from accelerate import PartialState

    here, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if torch.cuda.is_available() and here >= gpus:
        raise SettingError(f"each process trains on a GPU of its own, and this machine has {gpus}; launch no more")
    PartialState(cpu=not torch.cuda.is_available())


def check_launched(autocast: str | None) -> None:
    """That whatever launched this process asks for nothing that the run's own options do not say.

    Raises:
        SettingError: `accelerate launch`, or its configuration, does.
    """
    for name, what in _OTHERS.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise SettingError(
                f"accelerate's configuration trains by {what}, which `finetune` does not: launch it by torchrun, or "
                "with a configuration of several processes alone; `shard=fsdp` spreads the weights"
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", autocast):
        raise SettingError(
            f"accelerate's configuration has a mixed precision of {precision}; launch with --mixed_precision no, and "
            "give `autocast=bf16` to compute in bfloat16"
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        raise SettingError(f"`finetune` compiles nothing; launch with --dynamo_backend no, not {compiler.lower()}")


def leave() -> None:
    """Before the process ends, where all went well."""
    if _joined():
        import torch.distributed as dist

        dist.destroy_process_group()


def gathered(value: T) -> list[T]:
    """Every process's `value`, by rank. All have to call it, and each waits for the others."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def each(act: Callable[[], T]) -> list[T]:
    """What `act` gives in every process, by rank.

    Raises:
        Exception: in one of them it failed, so it has in all of them: nobody waits for one that will not come.
    """
    if size() == 1:
        return [act()]
    found = own = None
    try:
        found = act()
    except Exception as error:
        own = error
    told = own if own is None or isinstance(own, AutorevError) else TrainingError(message_of(own))
    answers = gathered((found, told))
    if own is not None:
        raise own
    for _, theirs in answers:
        if theirs is not None:
            raise theirs
    return [answer for answer, _ in answers]  # type: ignore[misc]  # nowhere did it fail


def first(act: Callable[[], T]) -> T:
    """What `act` gives in the first process, which alone runs it.

    Raises:
        Exception: it failed there.
    """
    return each(act if rank() == 0 else lambda: None)[0]  # type: ignore[return-value]  # that of rank 0


def speaks() -> bool:
    """Is it this process that says why all of them end? Whoever asks first; the others end because of it."""
    if not _joined() or size() == 1:
        return True
    import torch.distributed as dist

    me = str(rank())
    try:
        return bool(dist.distributed_c10d._get_default_store().compare_set(_ENDING, "", me).decode() == me)
    except RuntimeError:  # the store is gone, with the process that held it and spoke
        return False


def _launched() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def _joined() -> bool:
    import sys

    if "torch" not in sys.modules:  # the command line asks before anything is loaded
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()
