"""What a command writes unasked in a checkout is no change of the repository."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        pytest.skip(f"this is no checkout: {done.stderr.strip()}")
    return done.stdout


@pytest.mark.parametrize(
    "path",
    [
        "reports/analyze-SmolLM2-135M-Instruct.html",
        "reports/profile-smollm2-135m-instruct_full_b1_s128_fp32.html",
        "profiles/recorded/smollm2-135m-instruct_full_b1_s128_fp32.json",
        "runs/smollm2-momentum-k-3/run.json",
    ],
)
def test_default_places_are_ignored(path: str) -> None:
    """The README's first commands leave `git status` clean: ignored, and not one of the files that are kept."""
    assert git("check-ignore", path).strip() == path
    assert git("ls-files", path) == ""
