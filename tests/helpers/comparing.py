"""Analyses of a few methods, for tests of what is the same for each."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

from autorev.prediction import forecast


def comparing(*methods: str) -> AbstractContextManager[object]:
    """While it lasts, an analysis simulates `methods` alone; plain is the first."""
    return mock.patch.object(forecast, "PREDICTED", methods)
