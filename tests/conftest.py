"""Stands here so that pytest puts the folder above on the path: tests import `tests.zoo` and `tests.handwritten`."""
