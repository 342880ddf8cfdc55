"""PyTorch's stagers on Strandline's engine: the same names, arguments and results.

What PyTorch calls staging is here in three steps: walk.py makes the objects of the copy, the engine
copies the bytes, and storages.py gives them back as memory of the copy's tensors. What is different
from PyTorch's own, and why, stands in docs/stagers.md.
"""

from __future__ import annotations

import abc
import concurrent.futures
import functools
import gc
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch

from strandline import _core
from strandline.callers import warn
from strandline.errors import InvalidArgumentError, MemoryLimitError, UnavailableError
from strandline.torch import futures
from strandline.torch.walk import Walk, copying

__all__ = ["CheckpointStager", "CheckpointStagerConfig", "DefaultStager", "StateDictStager"]

try:
    from torch.distributed.checkpoint._experimental.staging import CheckpointStager as _Interface
except ImportError:  # A build without torch.distributed, or one where the experiment has ended.
    _Interface = abc.ABC


class CheckpointStager(_Interface):  # type: ignore[misc]
    """The interface of whatever stages a state, PyTorch's own where this PyTorch has it."""

    @abc.abstractmethod
    def stage(self, state_dict: Any, **kwargs: Any) -> Any:
        """The staged state, or a ``Future`` of it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the stager. What it has staged stays valid."""


@dataclass
class CheckpointStagerConfig:
    """How a :class:`DefaultStager` stages.

    Attributes:
        use_pinned_memory: Stage into memory that devices copy to faster; no effect without one.
        use_shared_memory: Stage into memory that other processes can map.
        use_async_staging: Return a ``Future``. Tensors in host memory are copied on return, only
            devices may still copy then.
        use_non_blocking_copy: Let copies from devices run beside each other; needs an accelerator.
        host_bytes_max: The ceiling of staged bytes, results that are still held included. By
            default half of what the host and its memory cgroup have free.
        copy_threads: Threads that help to copy; by default half the cores, at most 8.
    """

    use_pinned_memory: bool = True
    use_shared_memory: bool = True
    use_async_staging: bool = True
    use_non_blocking_copy: bool = True
    host_bytes_max: int | None = None
    copy_threads: int | None = None


def _usable_pin_memory(pin_memory: bool) -> bool:
    if pin_memory and not torch.cuda.is_available():
        warn(["staged memory is not pinned, since CUDA is not available"])
        return False
    return pin_memory


class StateDictStager:
    """Copies states into memory of its own; done on return.

    The copy is what ``copy.deepcopy`` would make, with every tensor in host memory: aliases and
    views stay so, each storage is copied once, as far as it is reached. A result is never
    overwritten: its memory is used again when the last tensor of it is gone.

    Args:
        pin_memory: Stage into memory that devices copy to faster; needs CUDA.
        share_memory: Stage into memory that other processes can map.
        pin_memory_min_bytes: Accepted as PyTorch's; all of a result is pinned, or nothing.
        host_bytes_max: See :class:`CheckpointStagerConfig`.
        copy_threads: See :class:`CheckpointStagerConfig`.
    """

    def __init__(
        self,
        pin_memory: bool = False,
        share_memory: bool = False,
        pin_memory_min_bytes: int = 5,
        *,
        host_bytes_max: int | None = None,
        copy_threads: int | None = None,
    ) -> None:
        self.pin_memory = _usable_pin_memory(pin_memory)
        self.share_memory = share_memory
        self.pin_memory_min_bytes = pin_memory_min_bytes
        self._core = _core.StateDictStager(
            pin_memory=self.pin_memory,
            share_memory=share_memory,
            host_bytes_max=host_bytes_max,
            copy_threads=copy_threads,
        )

    def stage(self, state_dict: Any, non_blocking: bool = False, **kwargs: Any) -> Any:
        """The staged state. ``non_blocking`` and unknown arguments are accepted as PyTorch's."""
        with copying():
            walk = Walk()
            staged_state = walk.copy(state_dict, "")
            places = walk.places()
            staged = _with_room(lambda: self._core.stage(walk.sources, walk.paths))
            walk.put(places, staged, self.share_memory)
        return staged_state

    def close(self) -> None:
        """Ends the stager. What it has staged stays valid. Closing again does nothing."""
        self._core.close()

    @property
    def host_bytes_in_use(self) -> int:
        """Bytes of staging memory that results hold."""
        return self._core.host_bytes_in_use

    @property
    def host_bytes_mapped(self) -> int:
        """Bytes of staging memory that results hold and that are kept for the next ones."""
        return self._core.host_bytes_mapped


class DefaultStager(CheckpointStager):
    """Copies states into memory of its own, as :class:`StateDictStager` does, for a checkpointer.

    ``stage()`` returns the staged state, or with ``use_async_staging`` a ``Future`` of it. Either
    way, tensors in host memory are copied when it returns. Use it as a context manager, or close
    it. It can also be given to ``torch.distributed.checkpoint.async_save`` and, as a
    ``CheckpointStager``, to ``torch_checkpointing``.

    Args:
        config: What to do; PyTorch's own ``CheckpointStagerConfig`` will do as well.
        staging_executor: Accepted as ``torch_checkpointing``'s. No thread of it is needed.
    """

    # What torch.distributed.checkpoint asks of an AsyncStager.
    _synchronize_after_execute = True

    def __init__(
        self,
        config: Any = None,
        *,
        staging_executor: concurrent.futures.Executor | None = None,
    ) -> None:
        config = CheckpointStagerConfig() if config is None else config
        if config.use_non_blocking_copy and not torch.accelerator.is_available():
            raise AssertionError(
                "use_non_blocking_copy needs an accelerator, and none is available: pass "
                "CheckpointStagerConfig(use_non_blocking_copy=False)"
            )
        if staging_executor is not None and not config.use_async_staging:
            raise InvalidArgumentError("staging_executor needs use_async_staging=True")
        self._config = config
        self._core = _core.DefaultStager(
            pin_memory=_usable_pin_memory(config.use_pinned_memory),
            share_memory=config.use_shared_memory,
            host_bytes_max=getattr(config, "host_bytes_max", None),
            copy_threads=getattr(config, "copy_threads", None),
        )
        self._closed = False
        self._process = os.getpid()
        self._last: Future[Any] | None = None
        self._outstanding: weakref.WeakSet[Future[Any]] = weakref.WeakSet()
        _register()

    def stage(
        self, state_dict: Any, keys_not_requiring_copy: Sequence[str] = (), **kwargs: Any
    ) -> Any:
        """Stages a state, or any other object.

        Args:
            state_dict: What to stage.
            keys_not_requiring_copy: Keys of a dict whose values are passed on as they are.
            kwargs: Ignored; PyTorch's checkpointer passes the writer's arguments.
        """
        if self._closed:
            raise UnavailableError("this stager is closed: make a new one")
        self._last = None  # Its memory can be used for what is staged now.
        if not self._config.use_async_staging:
            staging, finish = self._begin(state_dict, keys_not_requiring_copy)
            futures.wait_for(staging)
            staged_state = finish(staging)
            self._last = Future()
            self._last.set_result(staged_state)
            return staged_state
        try:
            future = futures.future_of(*self._begin(state_dict, keys_not_requiring_copy))
        except Exception as error:
            future = Future()
            future.set_exception(error)
        self._outstanding.add(future)
        self._last = future
        return future

    def _begin(
        self, state_dict: Any, left_out: Sequence[str]
    ) -> tuple[_core.Staging, Callable[[_core.Staging], Any]]:
        to_stage = state_dict
        if left_out:
            to_stage = state_dict.copy()
            for key in left_out:
                to_stage.pop(key, None)
        with copying():
            walk = Walk()
            staged_state = walk.copy(to_stage, "")
            put: Callable[[_core.Staged, bool], None] | None
            put = functools.partial(walk.put, walk.places())
            staging = _with_room(lambda: self._core.stage(walk.sources, walk.paths))
            if staging.wait(0):
                # As always where no device takes part: the future only has to be resolved.
                put(staging.result(), self._config.use_shared_memory)
                put = None
        for key in left_out:
            if key in state_dict:
                staged_state[key] = state_dict[key]
        return staging, functools.partial(
            _finish, staged_state, put, self._config.use_shared_memory
        )

    def get_staged_state_dict(self) -> Any:
        """What was staged last; None if that failed or is not done, and after ``close()``."""
        last = self._last
        if last is None or not last.done() or last.exception() is not None:
            return None
        return last.result()

    def pinned_num_bytes(self) -> int:
        """Bytes of pinned memory, which are none before the engine knows devices."""
        return 0

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether ``async_save`` calls :meth:`synchronize_staging` before it returns."""
        return self._synchronize_after_execute

    def synchronize_staging(self) -> None:
        """Waits until the last staging has ended; raises what it failed with."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Waits for stagings that still run and ends the stager. Results stay valid. Closing again
        does nothing."""
        self._closed = True
        # In a forked child nothing runs of what its parent began.
        if not futures.on_waiter_thread() and os.getpid() == self._process:
            concurrent.futures.wait(list(self._outstanding))
        self._last = None
        self._core.close()

    def __enter__(self) -> DefaultStager:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_Staged = TypeVar("_Staged")


def _with_room(stage: Callable[[], _Staged]) -> _Staged:
    """What `stage` gives; where memory is full, after cycles that hold results are gone.

    Results in a cycle, such as a dict that holds itself, are not freed when they are dropped, and
    the collector does not know how much memory they hold.
    """
    try:
        return stage()
    except MemoryLimitError:
        gc.collect()
    return stage()


def _finish(
    staged_state: Any,
    put: Callable[[_core.Staged, bool], None] | None,
    shared: bool,
    staging: _core.Staging,
) -> Any:
    if put is not None:
        with copying():
            put(staging.result(), shared)
    return staged_state


def _register() -> None:
    """Makes the stager one of torch_checkpointing's, where a program uses that."""
    module = sys.modules.get("torch_checkpointing.staging")
    if module is not None and not issubclass(DefaultStager, module.CheckpointStager):
        module.CheckpointStager.register(DefaultStager)


_register()
