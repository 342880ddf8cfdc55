"""Strandline's side of PyTorch. The one part of the package that imports ``torch``.

:class:`RngState` makes the random number generators a part of a job's state. The others are
PyTorch's stagers (``torch.distributed.checkpoint._experimental.staging``) on Strandline's engine,
imported when they are first used, since PyTorch's interface of them takes a second to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from strandline.torch.rng import RngState

if TYPE_CHECKING:
    from strandline.torch.stagers import (
        CheckpointStager,
        CheckpointStagerConfig,
        DefaultStager,
        StateDictStager,
    )

__all__ = [
    "CheckpointStager",
    "CheckpointStagerConfig",
    "DefaultStager",
    "RngState",
    "StateDictStager",
]

# Found, and shown in tracebacks and pickles, under the package's own name.
RngState.__module__ = __name__

_STAGERS = ("CheckpointStager", "CheckpointStagerConfig", "DefaultStager", "StateDictStager")


def __getattr__(name: str) -> Any:
    if name not in _STAGERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stagers = import_module("strandline.torch.stagers")
    for stager in _STAGERS:
        globals()[stager] = getattr(stagers, stager)
        globals()[stager].__module__ = __name__
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_STAGERS})
