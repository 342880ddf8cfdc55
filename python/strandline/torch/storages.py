"""PyTorch storages over memory of the engine, and how they reach another process.

Memory enters PyTorch as a DLPack capsule, whose deleter gives it back to the engine when the last
storage of it is gone; no Python takes part in that. Memory that other processes can map is a
:class:`SharedStorage`. Pickled for another process it becomes a few numbers with which that one
maps the same bytes: however many tensors are sent, one file descriptor is opened for them. Copied
or pickled in any other way it becomes an ordinary storage of its own.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from strandline import _core

__all__: list[str] = []


class SharedStorage(torch.UntypedStorage):  # type: ignore[misc]
    """A storage over memory that other processes can map."""

    def is_shared(self) -> bool:
        return True

    def share_memory_(self) -> SharedStorage:
        # PyTorch would move the bytes into a file of its own, with a descriptor of its own.
        return self

    def clone(self) -> Any:
        # Also what copy.deepcopy() makes. Other memory, so not shared any more.
        return torch.UntypedStorage(self.nbytes(), device=self.device).copy_(self)

    def __reduce__(self) -> Any:
        # An ordinary pickle is a copy; PyTorch's own way does not know this class.
        return _storage_of, (_bytes_of(self).numpy().tobytes(),)


def storage_over(capsule: object, shared: bool) -> Any:
    """A storage of all bytes of a DLPack capsule of the engine's."""
    storage = torch.from_dlpack(capsule).untyped_storage()
    if shared:
        storage.__class__ = SharedStorage
    return storage


def empty_storage(shared: bool) -> Any:
    """A storage without bytes, for tensors that have none."""
    storage = torch.UntypedStorage(0, device="cpu")
    if shared:
        storage.__class__ = SharedStorage
    return storage


def _storage_of(data: bytes) -> Any:
    storage = torch.UntypedStorage(len(data), device="cpu")
    _bytes_of(storage).numpy()[:] = memoryview(data)
    return storage


def _bytes_of(storage: Any) -> Any:
    # The device is named because torch.set_default_device() may have chosen another one.
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)


def attach_storage(
    pid: int, descriptor: int, slab: str, generation: int, offset: int, size: int
) -> Any:
    """A storage over what another process described; pickles of storages call this."""
    return storage_over(_core.attach(pid, descriptor, slab, generation, offset, size), True)


def _reduce_for_process(storage: SharedStorage) -> tuple[Any, tuple[Any, ...]]:
    if storage.nbytes() == 0:
        return empty_storage, (True,)
    return attach_storage, _core.share(storage.data_ptr(), storage.nbytes())


ForkingPickler.register(SharedStorage, _reduce_for_process)
