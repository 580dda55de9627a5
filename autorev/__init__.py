"""Memory profiling and automatic reversibilization of PyTorch models.

The public names are loaded when they are first used, so that `import autorev` stays instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from autorev.analysis import Analysis as Analysis
    from autorev.analysis import Block as Block
    from autorev.analysis import Chain as Chain
    from autorev.analysis import Setting as Setting
    from autorev.chunked_loss import chunk_loss as chunk_loss
    from autorev.chunked_loss import unchunk_loss as unchunk_loss
    from autorev.conversion.convert import convert as convert
    from autorev.conversion.convert import drift as drift
    from autorev.conversion.convert import revert as revert
    from autorev.conversion.load import load as load
    from autorev.conversion.recouple import recouple as recouple
    from autorev.conversion.summary import Conversion as Conversion
    from autorev.errors import AutorevError as AutorevError
    from autorev.finetuning.calibrate import calibrate as calibrate
    from autorev.finetuning.record import FineTuning as FineTuning
    from autorev.finetuning.run import finetune as finetune
    from autorev.fx.annotate import AnnotateResiduals as AnnotateResiduals
    from autorev.fx.reverse import ReverseChains as ReverseChains
    from autorev.pipeline import analyze as analyze
    from autorev.pipeline import forecast as forecast
    from autorev.profiler.record import Profile as Profile
    from autorev.profiler.run import profile as profile
    from autorev.verification import Verification as Verification
    from autorev.verification import verify as verify

_home = {
    "Analysis": "autorev.analysis",
    "Block": "autorev.analysis",
    "Chain": "autorev.analysis",
    "Setting": "autorev.analysis",
    "AutorevError": "autorev.errors",
    "calibrate": "autorev.finetuning.calibrate",
    "FineTuning": "autorev.finetuning.record",
    "finetune": "autorev.finetuning.run",
    "AnnotateResiduals": "autorev.fx.annotate",
    "analyze": "autorev.pipeline",
    "chunk_loss": "autorev.chunked_loss",
    "unchunk_loss": "autorev.chunked_loss",
    "Profile": "autorev.profiler.record",
    "profile": "autorev.profiler.run",
    "forecast": "autorev.pipeline",
    "convert": "autorev.conversion.convert",
    "drift": "autorev.conversion.convert",
    "revert": "autorev.conversion.convert",
    "recouple": "autorev.conversion.recouple",
    "load": "autorev.conversion.load",
    "ReverseChains": "autorev.fx.reverse",
    "Conversion": "autorev.conversion.summary",
    "Verification": "autorev.verification",
    "verify": "autorev.verification",
}
__all__ = sorted(_home)


def __getattr__(name: str) -> Any:
    if name not in _home:
        raise AttributeError(f"module 'autorev' has no attribute {name!r}")
    return getattr(import_module(_home[name]), name)
