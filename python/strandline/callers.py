"""Finding the line of the user's code that called into the package."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from strandline.errors import StrandlineWarning

__all__: list[str] = []


def _depth() -> int:
    """How many frames of this package lie above its caller, seen from who calls this function."""
    depth = 1
    while True:
        try:
            frame = sys._getframe(depth + 1)
        except ValueError:
            return depth
        name = frame.f_globals.get("__name__", "")
        if name != "strandline" and not name.startswith("strandline."):
            return depth
        depth += 1


def caller() -> str:
    """``file:line`` of the code that called into the package."""
    frame = sys._getframe(_depth())
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def warn(messages: Iterable[str]) -> None:
    """Issues warnings that point at the code that called into the package."""
    for message in messages:
        warnings.warn(message, StrandlineWarning, stacklevel=_depth() + 1)
