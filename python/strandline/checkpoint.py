"""One checkpoint, without a Checkpointer: save it, load it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from strandline import _core
from strandline.callers import warn
from strandline.checkpointer import _flag, _mapping, _step, extra_files
from strandline.errors import InvalidArgumentError
from strandline.progress import Display, ProgressOption

__all__ = ["load", "save"]

#: Text such as ``"model.weight"``, or the keys one by one.
KeyPath = str | tuple[Any, ...]


def save(
    path: str | os.PathLike[str],
    state: Any,
    *,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
) -> None:
    """Saves one checkpoint; it is complete and durable when the call returns.

    ``path`` becomes a directory. A checkpoint of Strandline that stands there is replaced; anything
    else is refused. The arguments are those of :meth:`strandline.Checkpointer.save`.
    """
    _core.save(
        path,
        state,
        metrics=_mapping("metrics", metrics),
        metadata=_mapping("metadata", metadata),
        extra_files=extra_files(state),
        allow_pickle=_flag("allow_pickle", allow_pickle),
    )


def load(
    path: str | os.PathLike[str],
    *,
    keys: KeyPath | list[KeyPath] | None = None,
    step: int | None = None,
    allow_pickle: bool = False,
    progress: ProgressOption = False,
) -> Any:
    """Loads a checkpoint, or parts of it, as plain containers, tensors and values.

    Tensors and arrays come back as what they were saved from; as NumPy arrays where PyTorch is
    missing. Those that shared memory share it again. Nothing is executed unless ``allow_pickle``.

    Args:
        path: A step's directory, or a directory of checkpoints, of which the newest good one is
            taken.
        keys: One key path gives what is there; a list of key paths gives a dict of them. A str is
            split at dots where no key of that text exists; a tuple gives the keys one by one.
        step: Which step of a directory of checkpoints.
        allow_pickle: Load pickles, which can run any code: only from people you trust.
        progress: Show a bar: True, or a function of bytes done and bytes total.
    """
    wanted = keys if isinstance(keys, list) else None if keys is None else [keys]
    if wanted is not None and not wanted:
        raise InvalidArgumentError("keys is an empty list: name a key path, or leave it out")
    with Display(progress, "loading") as display:
        trees, _, warnings = _core.load(
            path,
            keys=wanted,
            step=None if step is None else _step(step),
            allow_pickle=_flag("allow_pickle", allow_pickle),
            progress=display.function,
        )
    warn(warnings)
    if isinstance(keys, list):
        return dict(zip(keys, trees, strict=False))
    return trees[0]
