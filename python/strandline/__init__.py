"""Checkpoints of running training jobs: taken in milliseconds, never lost or torn.

    import strandline

    job = {"model": model, "optimizer": optimizer, "rng": strandline.torch.RngState()}
    with strandline.Checkpointer("checkpoints", keep=3) as checkpointer:
        done = checkpointer.restore(job, default=0)
        while done < steps:
            train(done)
            done += 1
            checkpointer.save(done, job)

    weights = strandline.load("checkpoints", keys="model")

``strandline.torch`` is imported when it is first used, so that the package needs no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from strandline import _core
from strandline.checkpoint import load, save
from strandline.checkpointer import Checkpointer, Outcome, Save
from strandline.errors import (
    AlreadyExistsError,
    CorruptError,
    Error,
    InvalidArgumentError,
    IoError,
    MemoryLimitError,
    MismatchError,
    NotFoundError,
    StrandlineWarning,
    TimeoutError,
    UnavailableError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from strandline import torch as torch

__all__ = [
    "AlreadyExistsError",
    "Checkpointer",
    "CorruptError",
    "Error",
    "InvalidArgumentError",
    "IoError",
    "MemoryLimitError",
    "MismatchError",
    "NotFoundError",
    "Outcome",
    "Save",
    "StrandlineWarning",
    "TimeoutError",
    "UnavailableError",
    "UnsupportedError",
    "__version__",
    "load",
    "save",
]

__version__: str = _core.version()

# The classes are found, and shown in tracebacks, under the package's own name.
for _class in (
    AlreadyExistsError,
    Checkpointer,
    CorruptError,
    Error,
    InvalidArgumentError,
    IoError,
    MemoryLimitError,
    MismatchError,
    NotFoundError,
    Outcome,
    Save,
    StrandlineWarning,
    TimeoutError,
    UnavailableError,
    UnsupportedError,
):
    _class.__module__ = __name__
del _class


def __getattr__(name: str) -> Any:
    if name == "torch":
        return import_module("strandline.torch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "torch"]
