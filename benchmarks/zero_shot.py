"""Loss of SmolLM2-135M under every coupling, without any training: python -m benchmarks.zero_shot

Sixteen stretches of 256 tokens from CPython's language reference; the mean over them in nats a token, and beside the
difference to the original its standard error over the stretches.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch

import autorev
from benchmarks.workloads import TEXT, smollm2, tokens_of

STRETCHES = 16

ROWS: list[tuple[str, dict[str, Any]]] = [
    ("momentum 1/16", {"gamma": 1 / 16}),
    ("**momentum 1/8** (the default)", {}),
    ("momentum 1/8, c = 7/8 throughout", {"c": 7 / 8}),
    ("momentum 1/8, c = 1 throughout", {"c": 1.0}),
    ("momentum 1/4", {"gamma": 1 / 4}),
    ("momentum 1/4, c = 1", {"gamma": 1 / 4, "c": 1.0}),
    ("momentum 1/2", {"gamma": 1 / 2}),
    ("momentum 1/8, per sub-layer", {"granularity": "sublayer"}),
    *((f"momentum {gamma}, c compensated", {"compensated": gamma}) for gamma in ("1/8", "1/4", "1/2", "3/4", "1")),
    ("bdia", {"method": "bdia"}),
    ("midpoint_a", {"method": "midpoint_a"}),
    ("leapfrog", {"method": "leapfrog"}),
    ("midpoint", {"method": "midpoint"}),
    ("hamiltonian", {"method": "hamiltonian"}),
    ("revnet", {"method": "revnet"}),
]


def main() -> None:
    """Print a Markdown table."""
    model, tokenizer = smollm2()
    texts = [tokens_of(tokenizer, place * len(TEXT) // STRETCHES, 256) for place in range(STRETCHES)]

    def losses(training: bool = False) -> torch.Tensor:
        model.train(training)  # there is no dropout; BDIA alone tells training from evaluation
        with torch.no_grad():
            return torch.stack([model(input_ids=ids, labels=ids, use_cache=False).loss for ids in texts])

    original = losses()
    print("| coupling | side bits | grid | loss | less the original's |\n|---|---:|---:|---:|---:|")
    print(f"| original | | | {original.mean():.3f} | |", flush=True)
    for name, how in ROWS:
        gamma = how.get("compensated")
        done = autorev.convert(model, **({"gamma": float(Fraction(gamma))} if gamma else how))
        if gamma:
            autorev.recouple(model, gamma=float(Fraction(gamma)))
        found = losses(training=how.get("method") == "bdia")
        chain, gap = done.chains[0], found - original
        print(
            f"| {name} | {max(chain.side_bits)} | 2^-{chain.fraction_bits} | {found.mean():.3f} | "
            f"{gap.mean():+.3f} +- {gap.std() / STRETCHES**0.5:.3f} |",
            flush=True,
        )
        autorev.revert(model)


if __name__ == "__main__":
    main()
