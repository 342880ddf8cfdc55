"""Each way to get a stager, and what must be true of what any of them has staged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import torch
from staging_helpers import plain_config as config

from strandline.torch import DefaultStager, StateDictStager

# Long enough for a loaded machine; only a bug reaches it.
DEADLINE_S = 60


def finish(staged: Any) -> Any:
    """The staged state, whether it comes at once or in a Future."""
    return staged.result(DEADLINE_S) if isinstance(staged, Future) else staged


# Each way to get a stager: the tests of what a staged state is like run with all of them.
STAGERS = {
    "StateDictStager": StateDictStager,
    "StateDictStager-shared": lambda: StateDictStager(share_memory=True),
    "DefaultStager": lambda: DefaultStager(
        config(use_async_staging=False, use_shared_memory=False)
    ),
    "DefaultStager-shared": lambda: DefaultStager(config(use_async_staging=False)),
    "DefaultStager-async": lambda: DefaultStager(config(use_shared_memory=False)),
    "DefaultStager-async-shared": lambda: DefaultStager(config()),
}


def parts_of(value: Any) -> Iterator[tuple[object, Any]]:
    """What a value consists of, each part with its name."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    elif not isinstance(value, (torch.Tensor, type)) and hasattr(value, "__dict__"):
        yield from vars(value).items()


def tensors_in(value: Any, path: str = "state") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a state with its path. The state must be a tree."""
    if isinstance(value, torch.Tensor):
        yield path, value
    for name, part in parts_of(value):
        yield from tensors_in(part, f"{path}.{name}")


def bytes_reached_by(tensor: torch.Tensor) -> range:
    """The addresses from the first to the last byte of a tensor's elements."""
    first = tensor.data_ptr()
    if tensor.numel() == 0:
        return range(first, first)
    steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return range(first, first + (steps + 1) * tensor.element_size())


def storage_of(tensor: torch.Tensor) -> int:
    """What two tensors have in common if one is a view of the other."""
    return tensor.untyped_storage()._cdata


def assert_laid_out_alike(source: Any, staged: Any) -> None:
    """Fails unless tensors are views of one storage, at the same distances, where the sources
    are."""
    sources, results = dict(tensors_in(source)), dict(tensors_in(staged))
    assert list(sources) == list(results)
    first_of: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for path, tensor in sources.items():
        result = results[path]
        assert (result.shape, result.stride()) == (tensor.shape, tensor.stride()), path
        assert result.dtype == tensor.dtype, path
        assert (result.is_conj(), result.is_neg()) == (tensor.is_conj(), tensor.is_neg()), path
        if tensor.numel() == 0:
            continue
        known, its_result = first_of.setdefault(storage_of(tensor), (tensor, result))
        assert storage_of(result) == storage_of(its_result), f"{path}: another storage"
        assert result.data_ptr() - its_result.data_ptr() == tensor.data_ptr() - known.data_ptr(), (
            f"{path}: lies elsewhere in the storage"
        )
    assert len({storage_of(result) for _, result in first_of.values()}) == len(first_of), (
        "tensors share a storage that did not"
    )
