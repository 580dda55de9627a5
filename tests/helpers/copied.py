"""A converted model costs a second to make, most of it to choose what to store, and next to nothing to copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

_made: dict[str, Any] = {}


def copied(build: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """A copy of what `build(*args, **settings)` gave when it was first asked for."""
    key = f"{build.__module__}.{build.__qualname__} {args} {sorted(settings.items())}"
    if key not in _made:
        _made[key] = build(*args, **settings)
    return copy.deepcopy(_made[key])
