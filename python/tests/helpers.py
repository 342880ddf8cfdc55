"""What several tests need."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
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


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter; it finds the same package as this one."""
    package = Path(strandline.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), *sys.path])}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
