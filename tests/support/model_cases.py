"""Small images and windows for tests of the whole model, and the parameters that they share."""

from __future__ import annotations

import pytest

from catseg_fast import SlidingWindow
from catseg_fast.config import Version
from support.tiny import picture

VERSIONS: tuple[Version, ...] = ("v1", "v2")


WINDOW = SlidingWindow(96, 0.25, (96, 140))  # two crops, and the whole image


SMALL = {"height": 24, "width": 32}


IMAGE = picture(60, 90)


versions = pytest.mark.parametrize("version", VERSIONS)


backends = pytest.mark.parametrize("backend", ["torch", "reference"])


paths = pytest.mark.parametrize("sliding", [True, False], ids=["sliding", "whole"])
