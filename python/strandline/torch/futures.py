"""The thread that resolves futures of stagings.

A staging ends on a thread of the engine, which must not run Python. So one thread of ours waits for
ends without the GIL, makes the results, and resolves the futures, with it their callbacks. It is
there only while something is outstanding. It is no daemon: an interpreter that exits lets stagings
arrive first.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from strandline import _core

__all__: list[str] = []

# Where concurrent.futures says the same of other exceptions.
_log = logging.getLogger("concurrent.futures")

# How long the thread waits before it looks again whether there is anything to wait for. Ends wake
# it at once; this only bounds how long a lost one could keep it.
_SLICE_S = 60.0


class _Waiter:
    """Resolves the futures of stagings that have been given to it."""

    def __init__(self) -> None:
        # Reentrant, since the handler of a signal may stage in the middle of add().
        self._lock = threading.RLock()
        self._queue = _core.StagingQueue()
        self._numbers = itertools.count()
        self._outstanding: dict[int, tuple[_core.Staging, Callable[[Any], Any], Future[Any]]] = {}
        self._thread: threading.Thread | None = None

    def add(self, staging: _core.Staging, finish: Callable[[Any], Any]) -> Future[Any]:
        """A future of what `finish` makes of the staging when it has ended."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # It cannot be cancelled: it runs.
        if self.is_this_thread():
            # In a callback, which may wait for it: nobody else would resolve it meanwhile.
            _resolve(staging, finish, future)
            return future
        with self._lock:
            number = next(self._numbers)
            self._outstanding[number] = (staging, finish, future)
            has_thread = (self._thread is not None and self._thread.is_alive()) or self._start()
            if not has_thread:
                del self._outstanding[number]
        if has_thread:
            staging.notify(self._queue, number)
        else:
            _resolve(staging, finish, future)
        return future

    def is_this_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def _start(self) -> bool:
        self._thread = threading.Thread(target=self._run, name="strandline-waiter")
        try:
            self._thread.start()
        except RuntimeError:  # The interpreter is exiting, or no thread is to be had.
            self._thread = None
        return self._thread is not None

    def _run(self) -> None:
        while True:
            for number in self._queue.wait(_SLICE_S):
                self._take(number)
            with self._lock:
                if not self._outstanding:
                    self._thread = None
                    return

    def _take(self, number: int) -> None:
        # In a function of its own, so that this thread holds no result while it waits.
        with self._lock:
            staging, finish, future = self._outstanding.pop(number)
        _resolve(staging, finish, future)


def _resolve(staging: _core.Staging, finish: Callable[[Any], Any], future: Future[Any]) -> None:
    try:
        _wait(staging)
        result = finish(staging)
    except BaseException as error:
        _end(future.set_exception, error)
    else:
        _end(future.set_result, result)


def _end(set_outcome: Callable[[Any], None], outcome: Any) -> None:
    # Future logs what its callbacks raise, but for SystemExit and the like, which must end neither
    # this thread nor a stage() without one.
    try:
        set_outcome(outcome)
    except BaseException:
        _log.exception("a callback of a staging's future raised")


def _wait(staging: _core.Staging) -> None:
    # The engine bounds how long it can take. Ctrl-C is noticed.
    while not staging.wait(_SLICE_S):
        pass


_waiter = _Waiter()


def _start_anew() -> None:
    # A forked child has neither the thread nor the stagings.
    global _waiter
    _waiter = _Waiter()


os.register_at_fork(after_in_child=_start_anew)


def future_of(staging: _core.Staging, finish: Callable[[Any], Any]) -> Future[Any]:
    """A future of what `finish` makes, on the waiter thread, of a staging that has ended."""
    return _waiter.add(staging, finish)


def wait_for(staging: _core.Staging) -> None:
    """Waits on this thread until a staging has ended."""
    try:
        _wait(staging)
    except BaseException:
        # A device may still read the sources, which the staging holds.
        future_of(staging, lambda _: None)
        raise


def on_waiter_thread() -> bool:
    """Whether this is the thread that resolves futures, as in their callbacks."""
    return _waiter.is_this_thread()
