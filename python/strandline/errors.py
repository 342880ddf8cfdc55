"""What Strandline raises: one class for each kind of problem, each saying what to do about it.

Every class derives from :class:`Error` and from the builtin that Python or PyTorch raises in such a
case, so that code which catches the builtin keeps working.
"""

from __future__ import annotations

import builtins

__all__ = [
    "AlreadyExistsError",
    "CorruptError",
    "Error",
    "InvalidArgumentError",
    "IoError",
    "MemoryLimitError",
    "MismatchError",
    "NotFoundError",
    "StrandlineWarning",
    "TimeoutError",
    "UnavailableError",
    "UnsupportedError",
]


class StrandlineWarning(UserWarning):
    """Something went differently from what was asked for, and the work went on."""


class Error(Exception):
    """Base of all errors of Strandline. What led to it is its ``__cause__``."""

    #: The tensor or value concerned, such as ``"model.layer.weight"``.
    key_path: str | None
    #: The file or directory concerned.
    path: str | None
    #: The operating system's error number.
    errno: int | None

    def __init__(
        self,
        message: str,
        *,
        key_path: str | None = None,
        path: str | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.key_path = key_path
        self.path = path
        self.errno = errno


class InvalidArgumentError(Error, ValueError):
    """An argument or option is wrong: correct the call."""


class UnsupportedError(Error, TypeError):
    """A value of the state cannot be saved or read: convert or remove it."""


class NotFoundError(Error, FileNotFoundError):
    """There is no such checkpoint, file or key: check the path or the name."""

    errno: int | None


class AlreadyExistsError(Error, FileExistsError):
    """The step or path is taken: choose another one or pass ``overwrite=True``."""

    errno: int | None


class MismatchError(Error, RuntimeError):
    """The checkpoint and the job differ in names, shapes or dtypes."""


class CorruptError(Error, RuntimeError):
    """The checkpoint is damaged: use an older one. Damaged bytes are never loaded."""


class IoError(Error, OSError):
    """The file system refused: see ``errno``, free space and rights."""

    errno: int | None


class MemoryLimitError(Error, MemoryError):
    """The ceiling of host memory does not allow it: raise it or save less."""


class TimeoutError(Error, builtins.TimeoutError):
    """A wait reached its deadline: wait again or raise the deadline."""

    errno: int | None


class UnavailableError(Error, RuntimeError):
    """Closed, cancelled, forked, or another writer holds the directory."""
