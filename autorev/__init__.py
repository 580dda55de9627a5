"""Memory profiling and automatic reversibilization of PyTorch models.

The public names are loaded when they are first used, so that `import autorev` stays instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from autorev.chunked_loss import chunk_loss as chunk_loss
    from autorev.chunked_loss import unchunk_loss as unchunk_loss
    from autorev.conversion.convert import convert as convert
    from autorev.conversion.convert import drift as drift
    from autorev.conversion.convert import revert as revert
    from autorev.conversion.load import load as load
    from autorev.conversion.recouple import recouple as recouple
    from autorev.errors import AutorevError as AutorevError
    from autorev.finetuning.calibrate import calibrate as calibrate
    from autorev.finetuning.run import finetune as finetune
    from autorev.methods import Method as Method
    from autorev.pipeline import analyze as analyze
    from autorev.pipeline import predict as predict
    from autorev.planning.fit import fit as fit
    from autorev.profiler.run import profile as profile
    from autorev.verification import verify as verify

_home = {
    "analyze": "autorev.pipeline",
    "AutorevError": "autorev.errors",
    "calibrate": "autorev.finetuning.calibrate",
    "chunk_loss": "autorev.chunked_loss",
    "convert": "autorev.conversion.convert",
    "drift": "autorev.conversion.convert",
    "finetune": "autorev.finetuning.run",
    "fit": "autorev.planning.fit",
    "load": "autorev.conversion.load",
    "Method": "autorev.methods",
    "predict": "autorev.pipeline",
    "profile": "autorev.profiler.run",
    "recouple": "autorev.conversion.recouple",
    "revert": "autorev.conversion.convert",
    "unchunk_loss": "autorev.chunked_loss",
    "verify": "autorev.verification",
}
__all__ = sorted(_home)


def __getattr__(name: str) -> Any:
    if name not in _home:
        raise AttributeError(f"module 'autorev' has no attribute {name!r}")
    return getattr(import_module(_home[name]), name)
