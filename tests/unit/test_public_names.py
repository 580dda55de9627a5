"""What `import autorev` offers, whatever was imported before, and that it touches nothing of the user's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import autorev
from autorev.capture.fake import fake_copy, new_fake_mode
from tests.helpers import handwritten as hand

TOKENS = torch.zeros(2, 8, dtype=torch.long)


def test_public_names_are_not_shadowed_by_folders() -> None:
    """A folder of the package, once imported, must not hide the function of its name."""
    program = (
        "import autorev, autorev.pipeline, autorev.models.resolve\n"
        "names = autorev.__all__\n"
        "assert all(callable(getattr(autorev, name)) for name in names), names"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stderr == ""


def test_importing_autorev_imports_no_torch() -> None:
    """The public names are loaded when they are first used."""
    program = "import sys, autorev; assert not {'torch', 'pandas', 'transformers', 'plotly'} & sys.modules.keys()"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stderr == ""


def test_the_copy_that_is_analysed_holds_no_weights() -> None:
    """Every parameter and buffer of the copy is fake, and tied weights are tied in it."""
    model = hand.stack_of(hand.Block)
    model.tied = model.embedding.weight  # type: ignore[assignment]
    copied = fake_copy(model, new_fake_mode())
    assert all(isinstance(t, FakeTensor) for t in [*copied.parameters(), *copied.buffers()])
    assert copied.tied is copied.embedding.weight


def test_a_model_on_the_meta_device_is_analysed() -> None:
    """A model that has no weights at all is as good as one that has."""
    with torch.device("meta"):
        model = hand.stack_of(hand.Block)
    analysis = autorev.analyze(model, TOKENS.to("meta"))
    assert [len(chain) for chain in analysis.chains] == [3]


def test_an_analysis_leaves_no_global_hook() -> None:
    """Modules all over the process are called as before; an entry left behind would make torch.compile warn."""
    tables = [v for k, v in vars(nn.modules.module).items() if k.startswith("_global") and isinstance(v, dict)]
    before = [len(table) for table in tables]
    autorev.analyze(hand.stack_of(hand.Block), TOKENS)
    assert len(tables) > 5
    assert [len(table) for table in tables] == before


@pytest.mark.parametrize("write", ["x.abs_()", "x[:, 0] = 0", "torch.relu_(x)"])
def test_a_write_between_blocks_breaks_the_chain(write: str) -> None:
    """The same tensor object is not the same state once the model's loop has written to it."""

    class Writing(hand.Stack):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x)
                if write == "x.abs_()":
                    x.abs_()
                elif write == "x[:, 0] = 0":
                    x[:, 0] = 0
                else:
                    torch.relu_(x)
            result: torch.Tensor = self.head(self.norm(x))
            return result

    analysis = autorev.analyze(Writing(*(hand.Block() for _ in range(3))), TOKENS)
    assert not analysis.chains
    assert all("stream-replaced" in reason for block in analysis.refused for reason in block.reasons)


def test_a_transpose_that_is_undone_does_no_harm() -> None:
    """The skip may be rearranged inside the block as long as it leaves as it came."""
    assert [len(chain) for chain in autorev.analyze(hand.stack_of(hand.UndoneTranspose), TOKENS).chains] == [3]


def test_a_plain_module_without_arguments_is_asked_for_them() -> None:
    """The error says what to pass."""
    with pytest.raises(autorev.AutorevError, match="needs a batch"):
        autorev.analyze(nn.Linear(2, 2))
