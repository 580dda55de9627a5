"""What random couplings are drawn from: one seed for a forward pass, and the same one where that pass is run again."""

from __future__ import annotations

import torch

from autorev.engine.digest import digest, looked_at
from autorev.errors import ConversionError

MOST = 256
"""Inputs, and passes of one input, that are remembered."""


class Seeds:
    """Those of a chain's latest forward passes.

    A checkpoint around the chain runs it again in backward. PyTorch puts its random numbers back for that
    (`preserve_rng_state`), and the pass draws the seed of its first run once more; where it was told not to, the pass
    is known by its input.
    """

    def __init__(self) -> None:
        self.by_input: dict[int, dict[int, bool]] = {}
        """Digest of the input -> seed -> was that pass run again?"""

    def draw(self, stream: torch.Tensor, name: str) -> int:
        """The seed of the pass through the chain `name` that begins with `stream`.

        Raises:
            ConversionError: it is run again, and its first run is forgotten, or cannot be told from others.
        """
        seed = int(torch.randint(2**62, (), device="cpu")) if looked_at() else 0
        found = digest(stream, exact=True)
        key = int(found) if isinstance(found, int | torch.Tensor) else 0
        if torch._C._current_graph_task_id() == -1:  # no backward pass is under way: a first run
            seeds = self.by_input.setdefault(key, {})
            seeds[seed] = False
            for remembered in (self.by_input, seeds):
                if len(remembered) > MOST:
                    del remembered[next(iter(remembered))]
            return seed
        if key not in self.by_input:
            raise ConversionError(
                f"{name} is run again in backward, and its signs of the first run are not known any more (the "
                f"latest {MOST} are); call backward sooner, or remove the checkpoint around it"
            )
        seeds = self.by_input[key]
        if seed not in seeds:
            waiting = [earlier for earlier, run_again in seeds.items() if not run_again]
            if len(waiting) > 1:
                raise ConversionError(
                    f"{name} is run again in backward, and {len(waiting)} passes had this input: which signs this one "
                    "had is not known. Leave preserve_rng_state=True, or remove the checkpoint around it"
                )
            seed = waiting[0] if waiting else list(seeds)[-1]
        seeds[seed] = True
        return seed
