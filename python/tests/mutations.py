"""Random states, and the ways in which training changes one behind a stager's back."""

from __future__ import annotations

import ctypes
import gc
import random
from typing import Any

import numpy
import torch
from each_stager import tensors_in
from helpers import bits_of

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int16,
    torch.uint8,
]


# ---- Random states ----


def random_view(rng: random.Random, storage: torch.UntypedStorage) -> torch.Tensor:
    """A tensor of any type, shape, strides and place in a storage; it may overlap itself."""
    dtype = rng.choice(DTYPES)
    count = storage.nbytes() // dtype.itemsize
    dims = rng.randint(0, 3)
    shape, strides, last = [], [], 0
    offset = rng.randrange(count) if count else 0
    for _ in range(dims):
        size = rng.randint(0 if rng.random() < 0.05 else 1, 6)
        stride = rng.choice((0, 1, 1, 2, 3, 7))
        if offset + last + (max(size, 1) - 1) * stride >= count:
            size, stride = 1, 1
        shape.append(size)
        strides.append(stride)
        last += (max(size, 1) - 1) * stride
    if not count:
        shape, strides = [0], [1]
    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, strides)
    if dtype.is_complex and rng.random() < 0.5:
        tensor = rng.choice((tensor.conj(), tensor.conj().imag))
    elif dtype.is_floating_point and rng.random() < 0.2:
        tensor = torch.nn.Parameter(tensor, requires_grad=False)
    return tensor


def random_tensors(rng: random.Random, memory: numpy.ndarray | None = None) -> list[torch.Tensor]:
    """Views of a few storages, in torch's memory or in a given one."""
    tensors: list[torch.Tensor] = []
    used = 0
    for _ in range(rng.randint(1, 4)):
        nbytes = 16 * rng.choice((0, 1, 4, 31, 256, 2048))
        if memory is None:
            if rng.random() < 0.005:
                nbytes = 9 << 20  # Enough for several threads to copy.
            bytes_of = torch.empty(nbytes, dtype=torch.uint8)
        else:
            bytes_of = torch.from_numpy(memory[used : used + nbytes])
            used += nbytes
        # Not through NumPy: torch does not resize memory that it has ever lent out.
        ctypes.memmove(bytes_of.data_ptr(), rng.randbytes(nbytes), nbytes)
        # No view of all of it: what only part of a storage is reached by is staged in part.
        storage = bytes_of.untyped_storage()
        tensors += [random_view(rng, storage) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.5:
            tensors.append(bytes_of)
    return tensors


def nest(rng: random.Random, tensors: list[torch.Tensor]) -> dict[str, Any]:
    """A state of containers that hold the tensors, some in several places."""
    state: dict[str, Any] = {"list": [], "nested": {"step": rng.random()}}
    for i, tensor in enumerate(tensors):
        place = rng.randrange(4)
        if place == 0:
            state[f"t{i}"] = tensor
        elif place == 1:
            state["list"].append(tensor)
        elif place == 2:
            state["nested"][i] = (tensor, "a value")
        else:
            state[f"again{i}"] = [tensor, {"tied": rng.choice(tensors)}]
    return state


class Training:
    """What one seed mutates: a state, and what trains it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.tensors = random_tensors(rng)
        self.state = nest(rng, self.tensors)

    def writable(self) -> list[torch.Tensor]:
        """Those that in-place operations accept: no element of theirs lies on another."""
        found = []
        for t in self.tensors:
            reached = sorted(
                (stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1
            )
            last, distinct = 0, True
            for stride, size in reached:
                distinct &= stride > last
                last += stride * (size - 1)
            if distinct and t.numel():
                found.append(t)
        return found

    def floats(self) -> list[torch.Tensor]:
        real = (torch.float32, torch.float64)
        return [t for t in self.writable() if t.dtype in real and not t.is_neg()]

    def memory(self) -> list[torch.Tensor]:
        """Each storage as bytes."""
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in self.tensors}
        return [torch.empty(0, dtype=torch.uint8).set_(s) for s in storages.values() if s.nbytes()]


class Optimized(Training):
    """A model and an optimizer of torch's."""

    def __init__(self, rng: random.Random, make_optimizer: Any) -> None:
        self.rng = rng
        torch.manual_seed(rng.randrange(1 << 30))
        self.model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
        self.optimizer = make_optimizer(self.model.parameters())
        self.step()
        self.state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 5)).square().sum().backward()
        self.optimizer.step()


# ---- Mutations. Each changes what a stager that did not copy would give. ----


def in_place(training: Training) -> None:
    for tensor in training.writable():
        if tensor.is_neg() or tensor.is_conj() or tensor.dtype is torch.float8_e4m3fn:
            tensor.zero_()
        else:
            training.rng.choice((tensor.zero_, lambda t=tensor: t.fill_(1)))()
    for tensor in training.floats():
        tensor.mul_(3).add_(1)


def out_argument(training: Training) -> None:
    for tensor in training.floats():
        torch.add(tensor, 1, out=tensor)
    for memory in training.memory():
        torch.bitwise_not(memory, out=memory)


def foreach(training: Training) -> None:
    if floats := training.floats():
        torch._foreach_mul_(floats, 3.0)
        torch._foreach_add_(floats, floats, alpha=2)
        torch._foreach_neg_(floats)
    if memory := training.memory():
        torch._foreach_copy_(memory, [torch.bitwise_not(m) for m in memory])


def data_swap(training: Training) -> None:
    for tensor in training.tensors:
        tensor.data = torch.zeros(3, 2, dtype=tensor.dtype)


def set_to_another_storage(training: Training) -> None:
    for tensor in training.tensors:
        tensor.set_(torch.zeros(5, dtype=tensor.dtype))


def resize(training: Training) -> None:
    for tensor in training.tensors:
        tensor.resize_(training.rng.choice(((0,), (2, 3), (5000,))))
        tensor.untyped_storage().fill_(0)


def storage_resize(training: Training) -> None:
    for tensor in training.tensors:
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()  # What other views reach must be there again.
        storage.resize_(0)
        storage.resize_(nbytes)
        storage.fill_(0)


def storage_writes(training: Training) -> None:
    for tensor in training.tensors:
        storage = tensor.untyped_storage()
        training.rng.choice((lambda s=storage: s.fill_(0), lambda s=storage: s.copy_(s.clone())))()
        if storage.nbytes():
            storage[0] = 255 - storage[0]
            storage.fill_(1)


def numpy_writes(training: Training) -> None:
    for memory in training.memory():
        array = memory.numpy()
        array ^= 0xFF


def raw_writes(training: Training) -> None:
    for memory in training.memory():
        ctypes.memset(memory.data_ptr(), 0xA5, memory.numel())


def swapped_tensors(training: Training) -> None:
    for tensor in training.tensors:
        if type(tensor) is torch.Tensor:
            tensor.data = tensor.data.clone().contiguous()
            torch.utils.swap_tensors(tensor, torch.zeros(2, dtype=tensor.dtype))


def containers(training: Training) -> None:
    training.state["nested"].clear()
    training.state["list"].append(torch.ones(1))
    training.state["nested"]["step"] = -1
    for key in [key for key in training.state if key.startswith(("t", "again"))]:
        training.state[key] = None


def free_and_reuse(training: Training) -> None:
    sizes = [tensor.untyped_storage().nbytes() for tensor in training.tensors]
    training.state.clear()
    training.tensors.clear()
    gc.collect(0)
    # The allocator hands out again what it got back.
    for _ in range(2):
        training.tensors += [torch.full((n,), 0x5A, dtype=torch.uint8) for n in sizes]


POOL = numpy.zeros(1 << 18, dtype=numpy.uint8)


class InAPool(Training):
    """Tensors in memory that has another owner, who will hand it out again."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.tensors = random_tensors(rng, POOL)
        self.state = nest(rng, self.tensors)


def pool_reuse(training: Training) -> None:
    numpy.invert(POOL, out=POOL)


def optimizer_step(training: Optimized) -> None:
    training.step()


def forward_only(training: Optimized) -> None:
    with torch.no_grad():
        training.model(torch.randn(4, 5))  # Batch normalisation counts.


def make_optimized(make: Any) -> Any:
    return lambda rng: Optimized(rng, make)


# Name: what makes the training, and what it does then.
KINDS: dict[str, tuple[Any, Any]] = {
    **{
        change.__name__: (Training, change)
        for change in (
            in_place,
            out_argument,
            foreach,
            data_swap,
            set_to_another_storage,
            resize,
            storage_resize,
            storage_writes,
            numpy_writes,
            raw_writes,
            swapped_tensors,
            containers,
            free_and_reuse,
        )
    },
    "pool_reuse": (InAPool, pool_reuse),
    "fused_adamw": (
        make_optimized(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
        optimizer_step,
    ),
    "fused_sgd": (
        make_optimized(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True)),
        optimizer_step,
    ),
    "fused_adagrad": (
        make_optimized(lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True)),
        optimizer_step,
    ),
    "foreach_adam": (
        make_optimized(lambda p: torch.optim.Adam(p, lr=0.1, foreach=True)),
        optimizer_step,
    ),
    "forward": (make_optimized(lambda p: torch.optim.SGD(p, lr=0.1)), forward_only),
}


# ---- What a state is like ----


def description(state: dict[str, Any]) -> dict[str, Any]:
    """All of a state that staging must keep, in values that nothing can change any more."""
    tensors = list(tensors_in(state))
    first_of: dict[int, tuple[int, int]] = {}
    described: dict[str, Any] = {"structure": skeleton(state)}
    for number, (path, tensor) in enumerate(tensors):
        where = None
        if tensor.numel():
            cdata = tensor.untyped_storage()._cdata
            first, its_address = first_of.setdefault(cdata, (number, tensor.data_ptr()))
            where = (first, tensor.data_ptr() - its_address)
        described[path] = (
            type(tensor).__name__,
            str(tensor.dtype),
            tuple(tensor.shape),
            tensor.stride(),
            (tensor.is_conj(), tensor.is_neg(), tensor.requires_grad),
            where,
            bits_of(tensor),
        )
    return described


def skeleton(value: Any) -> Any:
    """A state without its tensors."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, dict):
        return {key: skeleton(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(skeleton(part) for part in value)]
    return value
