"""Bringing a job up to date with the tree that was read for it.

The engine has filled the job's tensors in place already, and has checked all names, shapes and
dtypes. What is left is Python's: assigning plain values, and calling ``load_state_dict()``.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter, OrderedDict
from typing import Any

from strandline.errors import MismatchError

__all__: list[str] = []

_DICTS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple)


def _accepts_strict(method: Any) -> bool:
    try:
        return "strict" in inspect.signature(method).parameters
    except (TypeError, ValueError):
        return False


def _is_rng_state(stateful: Any) -> bool:
    module = sys.modules.get("strandline.torch")
    return module is not None and isinstance(stateful, module.RngState)


class _Assignment:
    """What ``match()`` of the engine compared item by item is filled in place, the rest replaced.

    The two must agree: dicts of all kinds are alike, and so are lists and tuples; a list is filled
    item by item if it holds a tensor or an object, at any depth, and was saved with its length.
    """

    def __init__(self, objects: list[Any], tensors: list[Any], strict: bool) -> None:
        self._stateful = {id(stateful) for stateful in objects}
        self._places = self._stateful | {id(tensor) for tensor in tensors}
        self._strict = strict
        self.loads: list[tuple[str, Any, Any]] = []

    def place(self, old: Any, saved: Any, path: tuple[Any, ...]) -> Any:
        """What is to stand where the job has ``old``; changes containers in place if it can."""
        if id(old) in self._stateful:
            self.loads.append((".".join(map(str, path)), old, saved))
            return old
        if old is saved:  # A tensor or array, filled in place.
            return old
        if type(old) in _DICTS and type(saved) in _DICTS:
            return self._fill_dict(old, saved, path)
        if type(old) in _SEQUENCES and type(saved) in _SEQUENCES:
            return self._fill_sequence(old, saved, path)
        return saved

    def _fill_dict(self, old: Any, saved: Any, path: tuple[Any, ...]) -> Any:
        if not old:
            for key in saved:  # Not update(), by which a Counter would count keys.
                old[key] = saved[key]
            return old
        for key in old:
            if key in saved:
                old[key] = self.place(old[key], saved[key], (*path, key))
        return old

    def _fill_sequence(self, old: Any, saved: Any, path: tuple[Any, ...]) -> Any:
        if len(old) == len(saved) and self._holds_places(old):
            saved = type(old)(
                self.place(a, b, (*path, i))
                for i, (a, b) in enumerate(zip(old, saved, strict=True))
            )
        if type(old) is tuple:
            return saved
        old[:] = saved
        return old

    def _holds_places(self, value: Any) -> bool:
        """Whether there is anything below that keeps its identity: an object or a tensor."""
        if id(value) in self._places:
            return True
        if type(value) in _DICTS:
            return any(map(self._holds_places, value.values()))
        return type(value) in _SEQUENCES and any(map(self._holds_places, value))

    def load(self, path: str, stateful: Any, saved: Any) -> None:
        method = stateful.load_state_dict
        try:
            if not self._strict and _accepts_strict(method):
                method(saved, strict=False)
            else:
                method(saved)
        except Exception as error:
            raise MismatchError(
                f"cannot restore '{path}': its load_state_dict() raised "
                f"{type(error).__name__}: {error}; objects restored before it keep their new state",
                key_path=path,
            ) from error


def assign(job: Any, saved: Any, *, objects: list[Any], tensors: list[Any], strict: bool) -> None:
    """Puts the saved tree into the job.

    ``objects`` are those of the job whose ``state_dict()`` was collected, ``tensors`` all its
    tensors and arrays. Random number generators come last, so that what another object draws while
    it loads does not change them.
    """
    assignment = _Assignment(objects, tensors, strict)
    assignment.place(job, saved, ())
    for path, stateful, state in sorted(assignment.loads, key=lambda load: _is_rng_state(load[1])):
        assignment.load(path, stateful, state)
