"""Code of users that runs while a state is walked, and the tensors that it touches.

Problem: a walk makes the tensors of the copy before it knows where their bytes will be; they get
their memory when all is known. But some objects copy themselves by code of their own
(``__deepcopy__``, ``__setstate__``, the functions that ``__reduce__`` names). That code may look
into the tensors, compute with them, make views of them, or copy tensors by itself.

Approach: tensors that are given to such code get a private copy of their source's storage first,
so that it meets right values; what it does to them is staged. It runs under a
``TorchFunctionMode``, which sees every call that it makes to PyTorch: tensors that come to it by
other ways, inside of objects, get their bytes when they are first used. Copies that the code makes
(``clone()``, ``copy.deepcopy()``) and views of any of these are recorded, so that they too end up
in the engine's memory, and what shared a storage shares one again.

The mode alone would not do: some functions of PyTorch read a tensor without its knowing, such as
``torch.Generator.set_state``. Private copies alone would double the cost of every model that is
staged as an object. So code of PyTorch's own modules and optimizers gets its tensors without them
(:func:`is_known`); it uses them in ways that the mode sees.
"""

from __future__ import annotations

import copyreg
import dataclasses
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

__all__: list[str] = []


class Tensors(Protocol):
    """What a walk lets user code's calls do to its tensors."""

    memo: dict[int, Any]

    def copy(self, x: Any, path: str) -> Any: ...
    def source_of(self, y: Any) -> Any: ...
    def fill(self, y: Any) -> None: ...
    def adopt(self, y: Any, path: str, *, owner: bool) -> None: ...


# What a tensor of the copy answers as its source does; no bytes are needed for it.
_GEOMETRY: frozenset[Any] = frozenset(
    (
        torch.Tensor.shape.__get__,
        torch.Tensor.ndim.__get__,
        torch.Tensor.size,
        torch.Tensor.stride,
        torch.Tensor.storage_offset,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.nelement,
        torch.Tensor.is_contiguous,
        torch.Tensor.__len__,
    )
)
# What it knows itself.
_OWN: frozenset[Any] = frozenset(
    (
        torch.Tensor.dtype.__get__,
        torch.Tensor.device.__get__,
        torch.Tensor.layout.__get__,
        torch.Tensor.requires_grad.__get__,
        torch.Tensor.is_leaf.__get__,
        torch.Tensor.is_cpu.__get__,
        torch.Tensor.is_cuda.__get__,
        torch.Tensor.is_meta.__get__,
        torch.Tensor.is_sparse.__get__,
        torch.Tensor.element_size,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
    )
)
_COPIES: frozenset[Any] = frozenset((torch.Tensor.clone, torch.clone, torch.Tensor.__deepcopy__))


class UserCode(TorchFunctionMode):  # type: ignore[misc]
    """Holds while code of a user runs on tensors of a walk; `path` is where the walk has come."""

    def __init__(self, tensors: Tensors, path: str) -> None:
        super().__init__()
        self._tensors = tensors
        self._path = path

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = self._tensors
        if func is torch.Tensor.__deepcopy__ and args[1] is tensors.memo:
            y = tensors.copy(args[0], self._path)
            for_each_tensor(y, tensors.fill)
            return y
        if func in _OWN:
            return func(*args, **kwargs)
        if func in _GEOMETRY:
            return func(tensors.source_of(args[0]), *args[1:], **kwargs)
        for_each_tensor((args, kwargs), tensors.fill)
        result = func(*args, **kwargs)
        is_copy = func in _COPIES and not (
            func is torch.Tensor.__deepcopy__ and id(args[0]) in args[1]
        )
        for_each_tensor(result, lambda y: tensors.adopt(y, self._path, owner=is_copy))
        return result


class Memo(dict[int, Any]):
    """What is copied already, for ``copy.deepcopy`` in user code too: it gets filled tensors."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        # Weak: in a cycle the whole copy would live until the garbage collector comes.
        self._tensors = weakref.ref(tensors)

    def get(self, key: int, default: Any = None) -> Any:
        found = super().get(key, default)
        tensors = self._tensors()
        if tensors is not None:
            for_each_tensor(found, tensors.fill)
        return found


def for_each_tensor(value: Any, visit: Callable[[Any], None]) -> None:
    """Visits the tensors in a value and in the plain containers that it consists of."""
    seen: set[int] = set()
    ahead = [value]
    while ahead:
        value = ahead.pop()
        if isinstance(value, torch.Tensor):
            visit(value)
        elif type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            ahead.extend(value.values() if isinstance(value, dict) else value)


_CONTAINERS = frozenset((list, tuple, dict, set, OrderedDict, defaultdict, deque))

# What makes a container of its arguments and looks at none of them.
_KNOWN_MAKERS: frozenset[Any] = frozenset(
    (OrderedDict, defaultdict, Counter, deque, set, frozenset)
)
# By class, what sets the state of a frozen dataclass with slots.
_DATACLASS_SET_STATE = getattr(dataclasses, "_dataclass_setstate", None)


def is_known(code: Any, arguments: tuple[Any, ...] = ()) -> bool:
    """Whether code that is given tensors is known to use none of them, or only as the mode sees."""
    if isinstance(code, type) and code in _KNOWN_MAKERS:
        return True
    if code is copyreg.__newobj__:  # type: ignore[attr-defined]
        new = arguments[0].__new__
        # The code of named tuples is generated in a module of this name.
        return new is object.__new__ or str(new.__module__).startswith("namedtuple_")
    if not isinstance(code, types.FunctionType):
        return False
    return code is _DATACLASS_SET_STATE or str(code.__module__).startswith(
        ("torch.nn.", "torch.optim.")
    )
