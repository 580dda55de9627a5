"""One fixed-point grid for all processes: each probes its own rows, and the same row must not have two losses."""

from __future__ import annotations

import itertools
import json
from datetime import timedelta

import torch.distributed as dist

PATIENCE = timedelta(minutes=2)
"""How long the others' probes are waited for; by default a collective would wait half an hour for a process that
converts nothing."""
_conversions = itertools.count()


def agreed(bits: dict[str, int]) -> tuple[dict[str, int], list[str]]:
    """By chain, the coarsest of the grids that all processes of the default group have found; and a note for the user
    where not all of them answered.

    In terms of fraction bits. It goes through the group's store and not by a collective, which would mix with the
    model's own where one process converts and another does something else.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return bits, []
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    conversion = f"autorev/grid/{next(_conversions)}"
    keys = [f"{conversion}/{other}" for other in range(dist.get_world_size())]
    store.set(keys[rank], json.dumps(bits))
    try:
        store.wait(keys, PATIENCE)
    except RuntimeError:  # torch's DistStoreError: the time is over
        return bits, [
            f"not every process converted within {PATIENCE.seconds} seconds, so this one has the grid of its own rows, "
            "and the same row may have another loss elsewhere; convert in every process, or give fraction_bits"
        ]
    found = [json.loads(store.get(key)) for key in keys]
    return {chain: min(other.get(chain, own) for other in found) for chain, own in bits.items()}, []
