"""The sweep over models: its finder, which knows nothing of autorev, and a sample of its models.

python -m pytest tests/integration/test_models_sweep.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.models import verdict
from benchmarks.residual_adds import residual_chains

WEIGHT = torch.eye(4, requires_grad=True)


def f(x: torch.Tensor) -> torch.Tensor:
    """A branch."""
    return torch.tanh(x) @ WEIGHT


def norm(x: torch.Tensor) -> torch.Tensor:
    """Without weights."""
    return F.layer_norm(x, (4,))


def repeated(step: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Three times."""
    return lambda x: step(step(step(x)))


def other_half(x: torch.Tensor) -> torch.Tensor:
    """What is added first comes from the other half."""
    a, b = x.chunk(2)
    a = a + f(b)
    return a + f(a)


def broadcast(x: torch.Tensor) -> torch.Tensor:
    """The first sum is larger than what it adds to."""
    row = x[:1]
    h = row + f(torch.cat([row, row]))
    return h + f(h)


def through_views(x: torch.Tensor) -> torch.Tensor:
    """The stream in another shape, and times one."""
    h = x.flatten().view(2, 2, 2)
    return (h + f(x).view(2, 2, 2)).div(1.0).reshape(2, 4).clone()


# name -> (step or model, adds that follow each other)
GRAPHS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], list[int]]] = {
    "pre-norm": (repeated(lambda x: x + f(norm(x))), [3]),
    "the stream last": (repeated(lambda x: f(x) + x), [3]),
    "subtracted": (repeated(lambda x: x - f(x)), [3]),
    "negated": (repeated(lambda x: f(x) - x), []),
    "scaled": (repeated(lambda x: torch.add(f(x), x, alpha=2)), []),
    "two terms": (repeated(lambda x: x + f(x) + f(norm(x))), [3]),
    "a sum of terms": (repeated(lambda x: x + (f(x) + f(norm(x)))), [3]),
    "by a matrix product": (repeated(lambda x: torch.addmm(x, f(x), WEIGHT)), [3]),
    "in place": (repeated(lambda x: f(x).add_(x)), [3]),
    "through views": (repeated(through_views), [3]),
    "post-norm": (repeated(lambda x: norm(x + f(x))), []),
    "post-activation": (repeated(lambda x: torch.relu(x + f(x))), []),
    "from the other half": (other_half, []),
    "broadcast": (broadcast, []),
    "a bias": (repeated(lambda x: f(x) + WEIGHT[0]), []),
    "one add": (lambda x: x + f(x), []),
    "two streams": (lambda x: torch.cat([repeated(lambda h: h + f(h))(x), repeated(lambda h: h - f(h))(f(x))]), [3, 3]),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_finder_counts_what_a_reader_counts(name: str) -> None:
    """On the autograd graph alone."""
    run, expected = GRAPHS[name]
    x = torch.linspace(-1, 1, 8).reshape(2, 4).requires_grad_() * 1.5
    assert residual_chains([run(x)]) == expected


VERIFIED = """
hand/nanogpt hand/parallel hand/rescaled_branch hand/subtracting hand/dropping hand/tuple hand/shared_weights hand/joint
hand/two_streams hand/loop hand/torch_encoder hand/pre-activation hand/layer-drop_in_the hand/deep_supervision
foreign/Scripted foreign/MatrixProduct foreign/Stacked foreign/Windows foreign/OwnGenerator foreign/loop_of
foreign/steps_between foreign/of_states foreign/growing zoo/llama zoo/gpt2 zoo/opt-pre zoo/t5 zoo/vit zoo/swin
transformers/bloom transformers/whisper
"""
"""Prefixes of names, with _ for a blank."""
REFUSED = {
    "hand/PostNorm": "post-norm",
    "hand/Pooling": "shape-change",
    "hand/Highway": "scaled-shortcut",
    "hand/Unseen": "unseen-code",
    "hand/Inside": "own-backward",
    "zoo/bert": "post-norm",
    "zoo/resnet-basic": "post-activation",
    "transformers/mvp": "post-norm",
}


@pytest.mark.slow
def test_of_a_sample_none_is_wrong_and_every_miss_has_its_reason(tmp_path: Path) -> None:
    """As a user runs it; a second run of the same has nothing to do."""
    file = tmp_path / "models.jsonl"
    prefixes = [prefix.replace("_", " ") for prefix in VERIFIED.split()] + [*REFUSED]
    command = [sys.executable, "-m", "benchmarks.models", *prefixes, "--record", str(file)]
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    table = subprocess.run(command, check=True, capture_output=True, text=True, env=own).stdout
    written = file.read_text()
    records = {record["name"]: record for record in map(json.loads, written.splitlines())}
    assert "WRONG" not in set(map(verdict, records.values()))
    for prefix in prefixes:
        found = [record for name, record in records.items() if name.startswith(prefix)]
        assert found, prefix
        for record in found:
            code = next((code for start, code in REFUSED.items() if record["name"].startswith(start)), "")
            if code:
                assert code in str(record["reasons"]) and not record.get("converted"), record
            else:
                assert verdict(record) == "verified", record

    again = subprocess.run(command, check=True, capture_output=True, text=True, env=own)
    assert (again.stdout, file.read_text()) == (table, written)
    assert "verified (" not in again.stderr
