"""Progress bars, shown only where they were asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from strandline.errors import InvalidArgumentError, UnsupportedError

__all__: list[str] = []

#: ``False`` shows nothing, ``True`` a bar; a function is called with bytes done and bytes total.
ProgressOption = bool | Callable[[int, int], Any]


class _TqdmBar:
    """A bar in a terminal or a notebook, whichever this is."""

    def __init__(self, title: str) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(desc=title, unit="B", unit_scale=True, unit_divisor=1024, leave=True)

    def update(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _RichBar:
    def __init__(self, title: str) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        self._progress = Progress(
            "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn()
        )
        self._task = self._progress.add_task(title, total=None)
        self._progress.start()

    def update(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def close(self) -> None:
        self._progress.stop()


class _FunctionBar:
    def __init__(self, function: Callable[[int, int], Any]) -> None:
        self._function = function

    def update(self, done: int, total: int) -> None:
        self._function(done, total)

    def close(self) -> None:
        pass


def _bar(title: str) -> _TqdmBar | _RichBar:
    for kind in (_TqdmBar, _RichBar):
        try:
            return kind(title)
        except ImportError:
            continue
    raise _no_library()


def _no_library() -> UnsupportedError:
    return UnsupportedError("progress=True needs tqdm or rich: install one, or pass a function")


class Display:
    """Shows how far one piece of work is, from the first update on; a context manager."""

    def __init__(self, option: ProgressOption, title: str) -> None:
        if not isinstance(option, bool) and not callable(option):
            raise InvalidArgumentError(
                "progress must be True, False, or a function of bytes done and bytes total, "
                f"not {option!r}"
            )
        self._option = option
        self._title = title
        self._shown: _TqdmBar | _RichBar | _FunctionBar | None = None
        if option is True and not any(_installed(name) for name in ("tqdm", "rich")):
            raise _no_library()  # Before the work, not in the middle of it.

    @property
    def function(self) -> Callable[[int, int], None] | None:
        """What to call with bytes done and bytes total; None if nothing is shown."""
        return self.update if self._option else None

    def update(self, done: int, total: int) -> None:
        """Shows bytes done and bytes total."""
        if not self._option:
            return
        if self._shown is None:
            if callable(self._option):
                self._shown = _FunctionBar(self._option)
            else:
                self._shown = _bar(self._title)
        self._shown.update(done, total)

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._shown is not None:
            self._shown.close()


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return name in sys.modules or find_spec(name) is not None
