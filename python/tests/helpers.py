"""What several tests need."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import strandline


def bits_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's values in row-major order."""
    # A copy: exporting memory to NumPy would pin the storage of a tensor that a test resizes.
    resolved = tensor.detach().resolve_conj().resolve_neg().clone().contiguous()
    whole = torch.empty(0, dtype=torch.uint8).set_(resolved.untyped_storage())
    first = resolved.storage_offset() * resolved.element_size()
    return whole[first : first + resolved.numel() * resolved.element_size()].numpy().tobytes()


def assert_same(a: Any, b: Any, path: str = "value") -> None:
    """Fails unless both are equal to the last bit, type for type."""
    assert type(a) is type(b), f"{path}: {type(a)} is not {type(b)}"
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert bits_of(a) == bits_of(b), path
    elif isinstance(a, (numpy.ndarray, numpy.generic)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), path
    elif isinstance(a, dict):
        assert list(map(type, a)) == list(map(type, b)), path
        assert [repr(key) for key in a] == [repr(key) for key in b], path
        for (key, x), y in zip(a.items(), b.values(), strict=False):
            assert_same(x, y, f"{path}.{key}")
        if isinstance(a, OrderedDict):
            assert hasattr(a, "_metadata") == hasattr(b, "_metadata"), path
            if hasattr(a, "_metadata"):
                assert_same(a._metadata, b._metadata, f"{path}._metadata")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            assert_same(x, y, f"{path}[{i}]")
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b), path
    elif isinstance(a, complex):
        assert struct.pack("dd", a.real, a.imag) == struct.pack("dd", b.real, b.imag), path
    elif isinstance(a, io.BytesIO):
        assert (a.getvalue(), a.tell()) == (b.getvalue(), b.tell()), path
    else:
        assert a == b, path


def round_trip(value: Any, directory: Path, **options: Any) -> Any:
    """Saves a value under a key and loads it again."""
    strandline.save(directory / "one", {"value": value}, **options)
    return strandline.load(directory / "one", keys=("value",), **options)


def package_environment() -> dict[str, str]:
    """The environment in which another interpreter finds the same package as this one."""
    package = Path(strandline.__file__).parent.parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), *sys.path])}


def run_python(
    code: str, *arguments: object, prefix: Sequence[str] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, which `prefix` starts."""
    return subprocess.run(
        [*prefix, sys.executable, "-c", code, *map(str, arguments)],
        env=package_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


# Stops one thread of its parent, says so, and lets it go on when its input ends.
_STOPPER = """
import ctypes, os, sys
SEIZE, INTERRUPT = 0x4206, 0x4207
thread = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
for request in (SEIZE, INTERRUPT):
    if libc.ptrace(request, thread, None, None) != 0:
        sys.exit(os.strerror(ctypes.get_errno()))
os.waitpid(thread, 0x40000000)  # __WALL
print("stopped", flush=True)
sys.stdin.read()  # The kernel lets the thread go when this process ends.
"""


def newest_thread_called(name: str) -> int:
    """The id of that thread of this process which was started last."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            # Of what follows the name in parentheses, the twentieth is when it was started.
            called, fields = (task / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
        except FileNotFoundError:
            continue  # It has ended meanwhile.
        if called == name:
            found.append((int(fields.split()[19]), int(task.name)))
    return max(found)[1]


@contextlib.contextmanager
def writing_stopped() -> Iterator[None]:
    """In the block the Checkpointer opened last does not write. It must be idle."""
    allow_tracing, by_anybody = 0x59616D61, -1  # PR_SET_PTRACER; by default only parents may.
    ctypes.CDLL(None).prctl(allow_tracing, ctypes.c_ulong(by_anybody), 0, 0, 0)
    stopper = subprocess.Popen(
        [sys.executable, "-c", _STOPPER, str(newest_thread_called("strandline-io"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if stopper.stdout.readline() != "stopped\n":
            pytest.skip(f"may not stop a thread: {stopper.stderr.read().strip()}")
        yield
    finally:
        stopper.communicate()
