"""The Checkpointer: saves a job in the background and restores it."""

from __future__ import annotations

import atexit
import contextlib
import math
import numbers
import operator
import os
import time
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, TypeVar, cast, overload

from strandline import _core
from strandline.callers import caller, warn
from strandline.errors import Error, InvalidArgumentError, TimeoutError, UnsupportedError
from strandline.progress import Display, ProgressOption
from strandline.restoring import assign

__all__ = ["Checkpointer", "Outcome", "Save"]

_Default = TypeVar("_Default")

# How often a wait shows progress and looks for Ctrl-C.
_SLICE_S = 0.1


class Outcome(str):
    """How a save ended: ``"committed"``, ``"failed"`` or ``"skipped"``, as that text."""

    #: Why it failed or was skipped; None if it was committed.
    cause: Error | None

    def __new__(cls, kind: str, cause: Error | None = None) -> Outcome:
        outcome = super().__new__(cls, kind)
        outcome.cause = cause
        return outcome


class Save:
    """The handle of one save. ``print(save)`` gives one line about it."""

    def __init__(self, core: _core.Save, progress: ProgressOption, wait_s: float) -> None:
        self._core = core
        self._progress = progress
        self._wait_s = wait_s
        self._warnings_issued = 0

    @property
    def step(self) -> int:
        """The step that it saves."""
        return self._core.step

    def wait_staged(self, deadline_s: float | None = None) -> None:
        """Waits until the state may change again, which is so when ``save()`` has returned.

        Raises what made the save fail, or TimeoutError at the deadline (by default the
        Checkpointer's ``finish_wait_s``).
        """
        deadline_s = _deadline(deadline_s, self._wait_s)
        if not self._core.wait_staged(deadline_s):
            raise self._timeout("staged", deadline_s)

    def wait_durable(self, deadline_s: float | None = None) -> Outcome:
        """Waits until the checkpoint would survive a power cut, and returns the outcome.

        Raises what made the save fail, or TimeoutError at the deadline (by default the
        Checkpointer's ``finish_wait_s``); the save goes on then. A save that was skipped gives its
        outcome.
        """
        deadline_s = _deadline(deadline_s, self._wait_s)
        end = time.monotonic() + deadline_s
        with Display(self._progress, f"step {self.step}") as display:
            try:
                while not self._core.wait_durable(min(_SLICE_S, max(0.0, end - time.monotonic()))):
                    self._show(display)
                    if time.monotonic() >= end:
                        raise self._timeout("durable", deadline_s)
            finally:
                self._show(display)
                self._issue_warnings()
        outcome = self.outcome
        assert outcome is not None
        return outcome

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while it runs."""
        ended = self._core.outcome()
        if ended is None:
            return None
        kind, cause = ended
        return Outcome(kind, cast("Error | None", cause))

    @property
    def progress(self) -> _core.Progress:
        """How far it has come, in bytes."""
        return self._core.progress()

    @property
    def timings(self) -> _core.Timings:
        """Where its time went, in milliseconds."""
        return self._core.timings()

    @property
    def warnings(self) -> list[str]:
        """What went differently although the save went on."""
        return self._core.warnings()

    def cancel(self) -> None:
        """Gives the save up if it is not committed yet, as ``wait_durable()`` tells."""
        self._core.cancel()

    def __str__(self) -> str:
        return self._core.summary()

    def __repr__(self) -> str:
        return f"<strandline.Save {self}>"

    def _show(self, display: Display) -> None:
        progress = self._core.progress()
        display.update(progress.bytes_written, progress.bytes_total)

    def _timeout(self, what: str, deadline_s: float) -> TimeoutError:
        return TimeoutError(
            f"step {self.step} was not {what} after {deadline_s:g} s; the save goes on: wait again"
        )

    def _issue_warnings(self) -> None:
        messages = self._core.warnings()
        issued, self._warnings_issued = self._warnings_issued, len(messages)
        warn(messages[issued:])


class Checkpointer:
    """Saves and restores the state of one job in one directory of checkpoints.

    The state is a dict of PyTorch tensors, NumPy arrays, plain values, containers of these, and
    objects with ``state_dict()`` and ``load_state_dict()``. Use it as a context manager: on leaving
    the block the last save is durable, or the block raises what went wrong.

    Args:
        directory: Where checkpoints are kept; made by the first save.
        keep: How many checkpoints to keep; by default all.
        on_error: What ``save()`` does about an earlier save that failed in the background:
            ``"warn"`` warns, and raises at the third failure in a row; ``"raise"`` raises.
        when_memory_is_full: Whether ``save()`` waits for earlier saves to free staging memory, at
            most ``memory_wait_s``, or skips.
        verify: What is read back before anything older is deleted: ``"headers"``, or with
            ``"read_back"`` all data too.
        host_bytes_max: The ceiling of staging memory; below the state's size saves block longer.
            By default two generations of the largest state seen, at most half of what is free.
        copy_threads: Threads that help to copy; by default half the cores, at most 8.
        memory_wait_s: See ``when_memory_is_full``.
        finish_wait_s: How long closing waits for running saves before it gives them up.
        allow_pickle: Store what is not supported otherwise as a pickle, and run pickles on restore.
        progress: Show a bar in calls that wait: True, or a function of bytes done and bytes total.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        when_memory_is_full: Literal["wait", "skip"] = "wait",
        verify: Literal["headers", "read_back"] = "headers",
        host_bytes_max: int | None = None,
        copy_threads: int | None = None,
        memory_wait_s: float = 600,
        finish_wait_s: float = 1800,
        allow_pickle: bool = False,
        progress: ProgressOption = False,
    ) -> None:
        options = _core.Options()
        options.keep = _count("keep", keep, 32)
        options.host_bytes_max = _count("host_bytes_max", host_bytes_max, 64)
        options.copy_threads = _count("copy_threads", copy_threads, 32)
        options.verify_data = _choice("verify", verify, ("headers", "read_back")) == "read_back"
        options.set_policies(
            raise_errors=_choice("on_error", on_error, ("warn", "raise")) == "raise",
            skip_when_memory_is_full=_choice(
                "when_memory_is_full", when_memory_is_full, ("wait", "skip")
            )
            == "skip",
        )
        self._finish_wait_s = _seconds("finish_wait_s", finish_wait_s)
        options.set_waits(
            memory_s=_seconds("memory_wait_s", memory_wait_s), finish_s=self._finish_wait_s
        )
        options.opened_at = caller()
        self._allow_pickle = _flag("allow_pickle", allow_pickle)
        self._progress = progress
        self._saves: list[Save] = []  # Those that may still run or have warnings to issue.
        self._process = os.getpid()
        self._close_called = False
        Display(progress, "")  # Fails now if progress cannot be shown.
        self._core = _core.Checkpointer(directory, options)
        _open.add(self)

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Save:
        """Saves ``state`` as it is now; returns when it is copied, and writes in the background.

        Args:
            step: Steps completed.
            state: The state of the job; see the class.
            metrics: Numbers to keep with it, such as ``{"loss": 0.31}``.
            metadata: Plain values to keep with it.
            overwrite: Replace this step if it is committed already.
        """
        self._flush_warnings()
        core = self._core.save(
            _step(step),
            state,
            metrics=_mapping("metrics", metrics),
            metadata=_mapping("metadata", metadata),
            overwrite=_flag("overwrite", overwrite),
            extra_files=extra_files(state),
            allow_pickle=self._allow_pickle,
        )
        save = Save(core, self._progress, self._finish_wait_s)
        self._saves.append(save)
        save._issue_warnings()
        return save

    @overload
    def restore(
        self,
        state: Any,
        *,
        step: int | None = None,
        default: None = None,
        strict: bool = True,
        verify_first: bool = False,
    ) -> int | None: ...

    @overload
    def restore(
        self,
        state: Any,
        *,
        step: int | None = None,
        default: _Default,
        strict: bool = True,
        verify_first: bool = False,
    ) -> int | _Default: ...

    def restore(
        self,
        state: Any,
        *,
        step: int | None = None,
        default: Any = None,
        strict: bool = True,
        verify_first: bool = False,
    ) -> Any:
        """Restores the newest good checkpoint into ``state``, in place, and returns its step.

        Names, shapes and dtypes are compared before anything is changed. Then tensors and arrays
        are filled in place, plain values are assigned, and objects get ``load_state_dict()``. A
        save that is still running is waited for first, at most ``finish_wait_s``.

        Args:
            state: The job, as it is given to ``save()``.
            step: The step to restore; by default the newest that verifies.
            default: What to return if there is no checkpoint at all, whatever ``step`` is.
            strict: Whether a name on one side only is an error. If not, such names are left alone,
                and one warning lists them.
            verify_first: Change nothing until every byte has been read and verified.
        """
        step = None if step is None else _step(step)
        _flag("strict", strict)
        _flag("verify_first", verify_first)
        self.wait_until_finished()  # The engine waits too, but would not notice Ctrl-C.
        with Display(self._progress, "restoring") as display:
            restored = self._core.restore(
                state,
                step=step,
                strict=strict,
                verify_first=verify_first,
                allow_pickle=self._allow_pickle,
                progress=display.function,
            )
        if restored is None:
            return default
        warn(restored.warnings)
        warn(_left_alone(restored.missing, restored.unexpected))
        assign(
            state,
            restored.tree,
            objects=restored.objects,
            tensors=restored.tensors,
            strict=strict,
        )
        return restored.step

    def latest_step(self) -> int | None:
        """The step committed last; None if there is none."""
        return self._core.latest_step()

    def steps(self) -> list[int]:
        """The committed steps, oldest commit first."""
        return self._core.steps()

    def wait_until_finished(self, deadline_s: float | None = None) -> None:
        """Waits until no save is running.

        Raises TimeoutError at the deadline (by default ``finish_wait_s``). That a save failed is
        told by its handle, by ``failures``, and by ``close()``.
        """
        deadline_s = _deadline(deadline_s, self._finish_wait_s)
        if not self._wait(deadline_s):
            raise TimeoutError(f"saves still run after {deadline_s:g} s: wait again")

    @property
    def failures(self) -> list[Error]:
        """The errors of saves that failed in the background and were not raised yet."""
        return cast("list[Error]", self._core.failures())

    @property
    def path(self) -> str:
        """The directory of checkpoints, made absolute."""
        return self._core.path

    @property
    def run(self) -> str:
        """The id of this Checkpointer, which its checkpoints carry."""
        return self._core.run

    @property
    def host_bytes_mapped(self) -> int:
        """Bytes of staging memory that are mapped now."""
        return self._core.host_bytes_mapped

    def close(self) -> None:
        """Finishes what is running, and releases the directory. Raises what went wrong and was not
        raised yet. Closing again does nothing."""
        if self._close_called:
            return
        began = time.monotonic()
        try:
            finished = self._wait(self._finish_wait_s)
            self._close_called = True
            try:
                self._core.close()
            except TimeoutError:
                if finished:  # A save that ended so.
                    raise
                raise TimeoutError(
                    f"saves still ran {time.monotonic() - began:.1f} s after close() was called, "
                    "and were given up: raise finish_wait_s, or save less often"
                ) from None
            finally:
                _open.discard(self)
        finally:
            self._flush_warnings()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            self.close()
            return
        try:
            self.close()
        except BaseException as problem:  # The body's own exception is what the user must see.
            note = f"closing the Checkpointer failed as well: {type(problem).__name__}: {problem}"
            if hasattr(exc, "add_note"):
                exc.add_note(note)
            else:
                warn([note])

    def __repr__(self) -> str:
        return f"<strandline.Checkpointer {self.path!r}>"

    def _wait(self, deadline_s: float) -> bool:
        end = time.monotonic() + deadline_s
        with Display(self._progress, "saving") as display:
            while not self._core.wait_until_finished(
                min(_SLICE_S, max(0.0, end - time.monotonic()))
            ):
                progress = [save.progress for save in self._saves]
                display.update(
                    sum(one.bytes_written for one in progress),
                    sum(one.bytes_total for one in progress),
                )
                if time.monotonic() >= end:
                    return False
        self._flush_warnings()
        return True

    def _flush_warnings(self) -> None:
        # Without a lock, since the handler of a signal may come here in the middle of this: of all
        # who find a save that has ended, the one that takes it out of the list issues its warnings.
        for save in list(self._saves):
            if save.outcome is None:
                continue
            try:
                self._saves.remove(save)
            except ValueError:
                continue
            save._issue_warnings()


# Checkpointers that were not closed; closed at exit, so that a save that is on its way arrives.
_open: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


@atexit.register
def _close_open() -> None:
    failures = []
    for checkpointer in list(_open):
        if checkpointer._process != os.getpid():
            continue  # A forked child's copy is dead; its parent closes its own.
        try:
            checkpointer.close()
        except Error as error:
            failures.append(f"{checkpointer!r} was closed at exit: {error}")
    warn(failures)  # After all are closed: where warnings are errors, it raises.


def _left_alone(missing: list[str], unexpected: list[str]) -> list[str]:
    """The warning about names that a restore without ``strict`` has left alone, if any."""
    parts = [
        f"{title} ({len(names)}): {', '.join(names)}"
        for title, names in (
            ("missing from the checkpoint", missing),
            ("unexpected, only in the checkpoint", unexpected),
        )
        if names
    ]
    return [f"these names were not restored: {'; '.join(parts)}"] if parts else []


def extra_files(state: Any) -> dict[str, str]:
    """More files for a step's directory: the configuration of a Hugging Face model."""
    if not isinstance(state, Mapping):
        return {}
    try:
        model = state.get("model")
        to_json_string = getattr(getattr(model, "config", None), "to_json_string", None)
        if not callable(to_json_string) or not callable(getattr(model, "state_dict", None)):
            return {}
        text = to_json_string()
        if not isinstance(text, str):
            raise TypeError(f"it gives {type(text).__name__} instead of str")
        text.encode()  # Lone surrogates cannot stand in a file.
    except Exception as error:
        raise UnsupportedError(
            "cannot save 'model': the to_json_string() of its config, for config.json, failed with "
            f"{type(error).__name__}: {error}",
            key_path="model",
        ) from error
    return {"config.json": text}


def _deadline(seconds: float | None, default: float) -> float:
    return default if seconds is None else _seconds("deadline_s", seconds)


def _step(step: Any) -> int:
    number = _whole(step)
    if not 0 <= number < 2**63:
        raise InvalidArgumentError(f"step must be a whole number of at least 0, not {step!r}")
    return number


def _count(name: str, value: Any, bits: int) -> int | None:
    if value is None:
        return None
    number = _whole(value)
    if not 1 <= number < 2**bits:
        raise InvalidArgumentError(f"{name} must be a whole number of at least 1, not {value!r}")
    return number


def _whole(value: Any) -> int:
    """The whole number that a value is; -1 if it is none."""
    if isinstance(value, bool):  # Python takes True for 1, the caller hardly meant that.
        return -1
    try:
        return operator.index(value)
    except TypeError:
        return -1


def _seconds(name: str, value: Any) -> float:
    seconds = math.nan
    # Python's numbers and NumPy's; not text, of which float() would read some.
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):
            seconds = float(value)
    if not seconds >= 0:
        raise InvalidArgumentError(f"{name} must be a number of seconds, 0 or more, not {value!r}")
    return seconds


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):  # Any text is true in Python, "no" too.
        raise InvalidArgumentError(f"{name} must be True or False, not {value!r}")
    return value


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise InvalidArgumentError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def _mapping(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, Mapping):
        raise InvalidArgumentError(f"{name} must be a dict, not {type(value).__name__}")
    return value
