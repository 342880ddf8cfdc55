"""Random graphs of objects and tensors: a staged one is what ``copy.deepcopy`` makes of it."""

from __future__ import annotations

import collections
import copy
import dataclasses
import random
import types
from typing import Any

import pytest
import torch

from strandline.torch import StateDictStager

GRAPHS = 2000
DTYPES = (
    torch.float32,
    torch.int64,
    torch.uint8,
    torch.float64,
    torch.complex64,
    torch.bfloat16,
)


@dataclasses.dataclass
class Record:
    a: Any
    b: Any = None


class SetsState:
    """Computes on its tensors when it gets them."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __getstate__(self) -> Any:
        return {"part": self.part}

    def __setstate__(self, state: Any) -> None:
        self.part = state["part"]
        self.sums = [sum_of(tensor) for tensor in tensors_of(self.part)]


class CopiesItself:
    """Computes on the copies of its tensors, and makes views of them."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __deepcopy__(self, memo: Any) -> CopiesItself:
        twin = CopiesItself.__new__(CopiesItself)
        memo[id(self)] = twin
        twin.part = copy.deepcopy(self.part, memo)
        tensors = tensors_of(twin.part)
        twin.sums = [sum_of(tensor) for tensor in tensors]
        twin.views = [tensor[...] for tensor in tensors[:2]]
        return twin


def sum_of(tensor: torch.Tensor) -> float:
    return float(torch.view_as_real(tensor).sum() if tensor.is_complex() else tensor.double().sum())


def tensors_of(graph: Any, sums: list[Any] | None = None) -> list[torch.Tensor]:
    """The tensors of a graph, as often as they are met on a way through each object once. What
    objects have computed is added to `sums`."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                value = list(value.values())
            elif hasattr(value, "__dict__"):
                if sums is not None:
                    sums.append(getattr(value, "sums", None))
                value = list(vars(value).values())
            if isinstance(value, (list, tuple, collections.deque)):
                for item in value:
                    visit(item)

    visit(graph)
    return found


class Maker:
    """Makes a random graph whose tensors share storages and whose objects are met several times."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        torch.manual_seed(seed)
        self._tensors: list[torch.Tensor] = []
        self._objects: list[Any] = []

    def state(self) -> dict[str, Any]:
        return {str(i): self._value(4) for i in range(5)}

    def _value(self, depth: int) -> Any:
        kind = self._random.random()
        if self._tensors and kind < 0.12:
            return self._random.choice(self._tensors)
        if self._objects and kind < 0.17:
            return self._random.choice(self._objects)
        return self._tensor() if depth == 0 or kind < 0.5 else self._object(depth - 1)

    def _tensor(self) -> torch.Tensor:
        plain = [tensor for tensor in self._tensors if type(tensor) is torch.Tensor]
        base = self._random.choice(plain) if plain and self._random.random() < 0.5 else None
        if base is None or base.dim() == 0:
            shape = [self._random.randrange(5) for _ in range(self._random.randrange(3))]
            tensor = (torch.rand(shape) * 100).to(self._random.choice(DTYPES))
        else:
            tensor = [
                lambda: base[self._random.randrange(base.shape[0] + 1) :],
                lambda: base.transpose(0, -1),
                lambda: base.unsqueeze(0).expand(3, *base.shape),
                # Of its own memory: copy.deepcopy() does not keep what a parameter shares.
                lambda: torch.nn.Parameter(base.clone(), requires_grad=base.is_floating_point()),
            ][self._random.randrange(4)]()
        self._tensors.append(tensor)
        return tensor

    def _object(self, depth: int) -> Any:
        kind = self._random.randrange(9)
        if kind == 0:
            return tuple(self._value(depth) for _ in range(self._random.randrange(4)))
        if kind in (1, 2):  # These may come to contain themselves.
            container: Any = [] if kind == 1 else {}
            self._objects.append(container)
            items = [self._value(depth) for _ in range(self._random.randrange(4))]
            if kind == 1:
                container.extend(items)
            else:
                container.update(enumerate(items))
            return container
        make = (
            Record,
            SetsState,
            CopiesItself,
            lambda value: collections.OrderedDict(x=value),
            lambda value: collections.deque([value]),
            lambda value: types.SimpleNamespace(x=value),
        )[kind - 3]
        made = make(self._value(depth))
        self._objects.append(made)
        return made


def assert_same_graph(staged: Any, expected: Any, shared: bool) -> None:
    sums: list[Any] = []
    expected_sums: list[Any] = []
    found, wanted = tensors_of(staged, sums), tensors_of(expected, expected_sums)
    assert sums == expected_sums
    assert len(found) == len(wanted)
    storages: dict[int, int] = {}
    for a, b in zip(found, wanted, strict=True):
        assert (type(a), a.dtype, a.shape, a.stride()) == (type(b), b.dtype, b.shape, b.stride())
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a, b)
        if a.numel() > 0:
            assert a.is_shared() == shared
            storage = a.untyped_storage()._cdata
            assert storages.setdefault(b.untyped_storage()._cdata, storage) == storage
    assert len(set(storages.values())) == len(storages)
    identities = [[id(tensor) for tensor in tensors] for tensors in (found, wanted)]
    first, second = ([ids.index(one) for one in ids] for ids in identities)
    assert first == second


@pytest.mark.parametrize("shared", [False, True])
def test_staging_is_deepcopy_into_memory_of_the_stager(shared):
    stager = StateDictStager(share_memory=shared)
    for seed in range(GRAPHS):
        state = Maker(seed).state()
        with torch.no_grad():
            expected = copy.deepcopy(state)
        staged = stager.stage(state)
        try:
            assert_same_graph(staged, expected, shared)
            sources = {tensor.data_ptr() for tensor in tensors_of(state) if tensor.numel() > 0}
            copies = {tensor.data_ptr() for tensor in tensors_of(staged) if tensor.numel() > 0}
            assert not sources & copies
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
