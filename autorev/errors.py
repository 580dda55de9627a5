"""Every error autorev raises on purpose: what was wrong, where, and what to do about it."""


class AutorevError(Exception):
    """A problem the user can act on. The CLI prints its text, without a traceback, and exits with 1."""


class ModelNotFoundError(AutorevError):
    """MODEL names nothing that can be built."""


class ModelBuildError(AutorevError):
    """MODEL was found but could not be built: a broken config, a truncated file, a factory that raised."""


class CaptureError(AutorevError):
    """The recorded call failed: wrong example inputs, or a forward that raises."""


class NoBlocksError(AutorevError):
    """The model holds no residual block at all, so there is nothing to analyse."""


class UnreadableError(AutorevError):
    """A path or a file that cannot be read, or does not hold what it should."""


class MissingPackageError(AutorevError):
    """A package that this needs is not installed; says which, and how to install it."""


class UntrustedCodeError(AutorevError):
    """A file names code, and code runs where the user asked for it, not where a file does."""


class ProfileError(AutorevError):
    """A device or model profile is missing or does not follow its schema."""


class RecordError(AutorevError):
    """A stored analysis cannot be read: truncated, edited by hand, or of another schema version."""


class SettingError(AutorevError):
    """A training setting that this model cannot have."""


class ConversionError(AutorevError):
    """A model, or this part of it, cannot be converted that way; the model is as it was."""


class ReconstructionError(AutorevError):
    """A reversible chain could not be rebuilt in backward as it was in forward; no gradient may be trusted."""


class FixedPointRangeError(AutorevError):
    """An activation does not fit the fixed-point grid of its chain, or is not a number."""


class DataError(AutorevError):
    """What is to be trained on cannot be read, or holds nothing to learn from."""


class TrainingError(AutorevError):
    """A training run had to stop; says at which step, why, and which checkpoint is the last good one."""


class DamagedError(AutorevError):
    """Stored weights are not those that were written: a file was damaged, replaced or lost."""


class ExportError(AutorevError):
    """A trained model is not written as the plain architecture, because it would not be the same model there."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler sends it. What catches errors lets it pass, as it does Ctrl-C; the CLI exits with 143."""


def message_of(error: BaseException) -> str:
    """What an error of somebody else's says, in one line; empty where it says nothing, or fails at that, too."""
    try:
        return " ".join(str(error).split())
    except Exception:  # its own text fails, in whatever way
        return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail? The CPU's allocator has no exception of its own; torch's class is known by its name."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = message_of(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def one_line(error: BaseException) -> str:
    """Its type, and what it says."""
    text = message_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def first_line(error: BaseException) -> str:
    """Its type, and the first line of what it says: torch explains itself at length."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # likewise
        lines = []
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
