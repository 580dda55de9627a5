"""Every way a command can end, in one place: what the user sees, and the exit code.

0 the result was printed; 1 there is none, or `verify` found wrong gradients; 2 wrong usage; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from autorev.cli.output import say, show_what_cannot_be_written
from autorev.errors import AutorevError, Terminated, is_out_of_memory, message_of, one_line
from autorev.finetuning import world
from autorev.format import visible

COMMAND = "autorev.command"
"""Where the command as it was typed is kept in click's context: a report says how it was made."""
_INTERRUPTED, _TERMINATED = 130, 143
"""What a shell reports for a program that Ctrl-C, or SIGTERM, ended."""
_ENDS = ("_exit", "execv", "execve")
"""Functions of os that no handler of exceptions sees; `os.execl` and the others call these."""
_PARAMETER = re.compile(r"`(\w+)(?:=([^`]+))?`")
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Group(click.Group):
    """A group whose commands end as the file's docstring says."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """As click's, on terminals of few letters, too."""
        show_what_cannot_be_written()
        if sys.stdout is None:  # closed by whoever started it: better said now than after the work
            say("Error: there is no stdout to print the result to; leave it open, or send it to /dev/null", err=True)
            sys.exit(1)
        try:
            return super().main(*args, **extra)
        except OSError:  # of stderr, which cannot even be told of an error
            sys.exit(1)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """As click's, with the command as it was typed."""
        program = ["python", info_name] if info_name and info_name.endswith(".py") else ["autorev"]
        command = shlex.join([*program, *args])
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[COMMAND] = command
        return context

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an exception becomes a line and an exit code. Of several processes, one prints the line."""
        try:
            return self._invoke(ctx)
        except click.ClickException as error:
            if world.speaks():
                raise
            ctx.exit(error.exit_code)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            with _terminated(), _exit_noticed(), _visible_log():
                return super().invoke(ctx)
        except click.ClickException as error:
            vars(error)["message"] = visible(error.message)  # names of files and models stand there
            raise
        except (click.Abort, click.exceptions.Exit):
            raise
        except Terminated as error:
            if world.speaks():
                say(f"Terminated: {_in_flags(str(error) or _what_is_left(ctx), ctx)}.", err=True)
            ctx.exit(_TERMINATED)
        except KeyboardInterrupt:
            if world.speaks():
                say("Interrupted.", err=True)
            ctx.exit(_INTERRUPTED)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of a pipe went away, which click ends quietly
            if os.environ.get("AUTOREV_TRACEBACK"):
                traceback.print_exc()
            raise click.ClickException(visible(_in_flags(_in_words(error), ctx))) from None


def _options_of(ctx: click.Context) -> dict[str | None, click.Parameter]:
    """Of the command that was given, by the names of the library's parameters."""
    group = ctx.command
    assert isinstance(group, click.Group)
    command = group.commands.get(ctx.invoked_subcommand or "")
    return {option.name: option for option in command.params} if command else {}


def _what_is_left(ctx: click.Context) -> str:
    """After SIGTERM: some commands write as they go, and go on from there."""
    if "resume" in _options_of(ctx):
        return (
            "ended by SIGTERM; what was written until then stays, and a run whose record is there goes on by `resume`"
        )
    return "ended by SIGTERM, so there is no result"


def _in_flags(text: str, ctx: click.Context) -> str:
    """What the library says of its parameters, as `lora_rank=16`, in the flags of the command."""
    options = _options_of(ctx)

    def flag(found: re.Match[str]) -> str:
        option = options.get(found[1])
        if not isinstance(option, click.Option):
            return found[1].upper() if option else found[0]
        named = option.opts[0]
        without = found[2] is None or (option.is_flag and found[2] == "True")
        return named if without else f"{named} {found[2]}"

    return _PARAMETER.sub(flag, text)


def _in_words(error: BaseException) -> str:
    if isinstance(error, AutorevError):
        return str(error)
    text = message_of(error)
    if not isinstance(error, Exception):  # SystemExit and the like, which nothing of autorev's own raises
        from autorev.capture.source import raised_line

        return (
            f"{type(error).__name__} was raised at {raised_line(error)} ({text or 'no message'}), so there is no result"
        )
    if isinstance(error, ImportError):
        from autorev.packages import missing_by

        if missing := missing_by(error):
            return f"this needs {missing}"
    if isinstance(error, OSError) and error.errno in _NO_PLACE:
        where = error.filename or "a file"
        return f"{where} cannot be written: {error.strerror}; free some space, or have it written somewhere else"
    if is_out_of_memory(error):
        return f"this machine has not the memory for it ({text or type(error).__name__}); ask for less"
    return (
        f"autorev failed on {one_line(error)}. This is a bug in autorev: please report "
        "it with the command, and set AUTOREV_TRACEBACK=1 for the traceback."
    )


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends what goes on as Ctrl-C does: it is cleaned up."""

    def end(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def _exit_noticed() -> Iterator[None]:
    """`os._exit(0)` and `os.execv` in a model's code would end the command in silence, and as if there were a result.

    What ends it behind Python's back (`_exit` of the C library, by ctypes or in compiled code) cannot be noticed in the
    process itself: nothing is printed then, and a record that was begun is not marked as complete.
    """
    command, before = os.getpid(), {name: getattr(os, name) for name in _ENDS}

    def noticed(name: str) -> Callable[..., Any]:
        def end(*arguments: Any) -> Any:
            if os.getpid() != command:  # a forked process ends so
                return before[name](*arguments)
            status = arguments[0] if name == "_exit" else ""
            say(f"Error: the process was ended by os.{name}({status}) in {_model_s()}, so there is no result", err=True)
            return before["_exit"](status or 1)

        return end

    for name in _ENDS:
        setattr(os, name, noticed(name))
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(os, name, own)


def _model_s() -> str:
    """The file and the function that called the one in os, be it by others in os."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals is vars(os):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}, {frame.f_code.co_name}"  # noqa: PTH119 - maybe of no file


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextmanager
def _visible_log() -> Iterator[None]:
    """What autorev logs goes to stderr; it names what stands in files, where control codes may be.

    torch logs a traceback of its own where sizes overflow, beside the exception, which becomes our line.
    """
    log, handler = logging.getLogger("autorev"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible())
    handler.setLevel(logging.WARNING)
    log.addHandler(handler)
    theirs = logging.getLogger("torch._subclasses.fake_tensor")
    theirs.addFilter(_nothing)
    try:
        yield
    finally:
        log.removeHandler(handler)
        theirs.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False
