"""Override a function for the calling thread alone.

Capture has to answer calls that a model's code makes of things which the whole process shares: `random.random`,
`autograd.Function.apply`, a function of `transformers`. Patched for everybody, as `unittest.mock` does it, the answer
would also reach whoever trains in another thread meanwhile; and of two threads that undo their patches in another
order than they made them, one leaves its patch for good. Here the first override puts a *stand-in* into the
attribute's place. It asks who is calling: a thread with an override gets that, and everybody else the original. When
the last override of any thread ends, the original object is put back.

A thread's overrides also hold in the backward passes that it starts, part of which autograd runs in threads of its
own.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

_KEY = "autorev: this thread"
_lock = threading.Lock()
"""Held to install, to end and to put back; calling a stand-in takes no lock."""
_installed: dict[tuple[int, str], _Overridden] = {}
_inherited = object()


class _Thread:
    """Stands for a thread and for its backward passes."""

    users = 0


@contextmanager
def this_thread() -> Iterator[_Thread]:
    """While it lasts, what `is_here` knows the calling thread by, and backward passes that it starts; no other thread.

    It is kept where torch keeps what autograd's own threads are to find as the thread that called `backward` had it.
    A thread's number would not do: those threads have others, and the number of a dead one is used again. Nothing is
    left there: at a thread's end torch asks Python to let go of that, and while Python itself ends, the answer is that
    the process is aborted.
    """
    thread = _found() or _Thread()
    if not thread.users:
        torch._C._stash_obj_in_tls(_KEY, thread)
    thread.users += 1
    try:
        yield thread
    finally:
        thread.users -= 1
        if not thread.users and _found() is thread:
            _remove(_KEY)


def is_here(thread: object) -> bool:
    """Is the calling thread, or who started the backward pass that it runs, `thread`?"""
    return _found() is thread


def _found() -> _Thread | None:
    found: _Thread | None = torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None
    return found


_remove: Callable[[str], None] = getattr(torch._C, "_remove_obj_from_tls", lambda key: None)  # torch 2.12 has none


@contextmanager
def patched_here(owner: Any, name: str, replace: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While it lasts, the calling thread's calls of `owner.name` are calls of `replace(original)`.

    `owner` is a class, a module or an object with a `__dict__`. Of overrides nested in one thread, an inner one's
    original is the outer one. Where `owner` is a class and `name` a method of it, a classmethod too, the replacement
    and the original are given the object or class first.
    """
    with this_thread() as caller:
        with _lock:
            overridden = _installed.get((id(owner), name))
            if overridden is None:
                overridden = _Overridden(owner, name)
            stack = overridden.stacks.setdefault(caller, [])
            entry = replace(stack[-1] if stack else overridden.original)
            stack.append(entry)
        try:
            yield
        finally:
            with _lock:
                stack.remove(entry)
                if not stack:
                    del overridden.stacks[caller]
                if not overridden.stacks:
                    overridden.put_back()


class _Overridden:
    """One attribute with a stand-in in its place."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.own = vars(owner).get(name, _inherited)
        found = inspect.getattr_static(owner, name) if isinstance(owner, type) else getattr(owner, name)
        decorator = type(found) if isinstance(found, classmethod | staticmethod) else None
        self.original: Callable[..., Any] = found if decorator is None else found.__func__
        self.stacks: dict[object, list[Callable[..., Any]]] = {}
        """Thread -> its overrides, innermost last; only that thread's entry is ever changed by it."""
        stand_in = _stand_in(self.original, self.stacks)
        self.placed: Any = stand_in if decorator is None else decorator(stand_in)
        self._put(self.placed)
        _installed[id(owner), name] = self

    def put_back(self) -> None:
        del _installed[id(self.owner), self.name]
        if vars(self.owner).get(self.name) is not self.placed:
            return  # somebody patched it in the meantime; a stand-in that they put back hands every call on
        if self.own is not _inherited:
            self._put(self.own)
        elif isinstance(self.owner, type):
            delattr(self.owner, self.name)
        else:
            del vars(self.owner)[self.name]

    def _put(self, value: Any) -> None:
        if isinstance(self.owner, type):
            setattr(self.owner, self.name, value)
        else:
            vars(self.owner)[self.name] = value  # past a `__setattr__` that hands on to another object


def _stand_in(original: Callable[..., Any], stacks: dict[object, list[Callable[..., Any]]]) -> Callable[..., Any]:
    @wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        # A thread that compiles its model just now compiles the original into it.
        if not torch.compiler.is_dynamo_compiling():
            thread = _found()
            stack = stacks.get(thread) if thread is not None else None
            if stack:
                return stack[-1](*args, **kwargs)
        return original(*args, **kwargs)

    return stand_in
