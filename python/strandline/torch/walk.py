"""The copy of a state: its objects here, the bytes of its tensors by the engine.

Problem: the copy must be what ``copy.deepcopy`` would make of any Python objects, with every tensor
in memory of the engine; what shared a storage shares one in the copy; and the time in which the
trainer waits goes to the bytes, not to Python.

Approach: one walk on the caller's thread. It makes the copy of every object, and of every tensor an
empty one of the same class, and lists sources and copies side by side. Then the engine copies the
bytes of all sources at once, without Python, and each tensor of the copy is set to its place in the
engine's memory. Which sources share a storage is the engine's to find; nothing is cached from one
walk to the next.

The order of questions at an object is that of ``copy.deepcopy`` and of PyTorch's own stager, so
that the same user code runs: tensor, container, class, ``__deepcopy__``, the reduction that
pickling uses. User code gets the walk's own memo. The tensors that it may touch are the matter of
user_code.py.

Rejected: replacing tensors in the result of ``copy.deepcopy`` (it would copy every byte first);
pickling with persistent ids (objects that cannot be pickled can be staged).
"""

from __future__ import annotations

import copyreg
import functools
import itertools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

from strandline import _core
from strandline.errors import InvalidArgumentError
from strandline.torch.storages import empty_storage, storage_over
from strandline.torch.user_code import Memo, UserCode, for_each_tensor, is_known

__all__: list[str] = []

_MISSING = object()


def _child(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


class _Place(NamedTuple):
    """What a tensor of the copy needs to become what its source is now."""

    size: Any
    stride: Any
    conjugate: bool
    negative: bool

    @classmethod
    def of(cls, source: Any) -> _Place:
        conjugate = source.is_complex() and source.is_conj()
        return cls(source.size(), source.stride(), conjugate, source.is_neg())

    def put(self, y: Any, storage: Any, offset: int) -> None:
        torch.Tensor.set_(y, storage, offset, self.size, self.stride)
        if self.conjugate:
            torch._C._set_conj(y, True)
        if self.negative:
            torch._C._set_neg(y, True)


@contextmanager
def copying() -> Iterator[None]:
    """PyTorch's modes for making copies: nothing is recorded for gradients."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def _as_plain_tensors() -> Iterator[None]:
    """Subclasses are treated as what they are in memory; no code of theirs runs."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        yield


class Walk:
    """One copy of one state. Use it inside :func:`copying`."""

    def __init__(self) -> None:
        self.memo: dict[int, Any] = Memo(self)
        self.sources: list[Any] = []  # Plain tensors; the copy itself where it has right bytes.
        self.paths: list[str] = []
        self._copies: list[Any] = []
        self._requires_grad: list[Any] = []
        # Below: only what user code needs. Storages of private copies, by the address of what they
        # copy; their own addresses; where a tensor of the copy, and a source storage, is listed.
        self._private: dict[int, Any] = {}
        self._own: set[int] = set()
        self._listed: dict[int, int] = {}
        self._by_storage: dict[int, list[int]] = {}
        self._indexed = 0

    # ---- After the walk ----

    def places(self) -> list[_Place | None]:
        """How the tensors lie in their memory, where they lie in any: the engine refuses others.
        To be asked before the bytes are copied, since another thread may change them meanwhile."""
        return [
            None if source.is_nested or source.layout != torch.strided else _Place.of(source)
            for source in self.sources
        ]

    def put(self, places: Iterable[_Place | None], staged: _core.Staged, shared: bool) -> None:
        """Sets the tensors of the copy to staged memory."""
        storages = [storage_over(capsule, shared) for capsule in staged.memory]
        no_bytes = empty_storage(shared)
        with _as_plain_tensors():
            for y, place, extent, offset in zip(
                self._copies, places, staged.extents, staged.offsets, strict=True
            ):
                assert place is not None
                if extent < 0:
                    place.put(y, no_bytes, 0)
                else:
                    place.put(y, storages[extent], offset // y.element_size())
            for y in self._requires_grad:
                y.requires_grad_(True)

    # ---- Any object ----

    def copy(self, x: Any, path: str) -> Any:
        """The copy of an object; the same one each time."""
        cls = type(x)
        if cls in _ATOMIC:
            return x
        memo = self.memo
        if (y := dict.get(memo, id(x), _MISSING)) is not _MISSING:
            return y
        if isinstance(x, torch.Tensor):
            y = self._tensor(x, path)
        elif (copier := _COPIERS.get(cls)) is not None:
            y = copier(self, x, path)
        elif issubclass(cls, type) or isinstance(x, _by_reference()):
            return x
        elif (deepcopy := getattr(x, "__deepcopy__", None)) is not None:
            y = self._by_own_code(deepcopy, path)
        else:
            y = self._by_reduction(x, path)
        if y is not x:
            memo[id(x)] = y
            self._keep_alive(x)
        return y

    def _keep_alive(self, x: Any) -> None:
        # The memo knows objects by their address, which another one would get if they died. The
        # place for it is that of copy.deepcopy(), with which user code goes on.
        try:
            self.memo[id(self.memo)].append(x)
        except KeyError:
            self.memo[id(self.memo)] = [x]

    def _list(self, x: list[Any], path: str) -> list[Any]:
        y: list[Any] = []
        self.memo[id(x)] = y
        for i, item in enumerate(x):
            y.append(self.copy(item, _child(path, i)))
        return y

    def _tuple(self, x: tuple[Any, ...], path: str) -> Any:
        y = [self.copy(item, _child(path, i)) for i, item in enumerate(x)]
        # If it is part of a cycle, it was copied on the way.
        if id(x) in self.memo:
            return self.memo[id(x)]
        if all(a is b for a, b in zip(x, y, strict=True)):
            return x
        return tuple(y)

    def _dict(self, x: dict[Any, Any], path: str) -> dict[Any, Any]:
        y: dict[Any, Any] = {}
        self.memo[id(x)] = y
        for key, value in x.items():
            y[self.copy(key, path)] = self.copy(value, _child(path, key))
        return y

    def _method(self, x: types.MethodType, path: str) -> types.MethodType:
        return type(x)(x.__func__, self.copy(x.__self__, path))

    def _by_own_code(self, deepcopy: Callable[[dict[int, Any]], Any], path: str) -> Any:
        known = len(self.memo)
        with UserCode(self, path):
            y = deepcopy(self.memo)
        # nn.Parameter copies itself in a way that the mode does not see the end of.
        made = list(itertools.islice(self.memo.values(), known, None))
        for value in (made, getattr(y, "__dict__", None)):
            for_each_tensor(value, lambda tensor: self.adopt(tensor, path, owner=False))
        return y

    def _by_reduction(self, x: Any, path: str) -> Any:
        reductor = copyreg.dispatch_table.get(type(x))
        reduced = x.__reduce_ex__(4) if reductor is None else reductor(x)
        if isinstance(reduced, str):
            return x
        return self._reconstruct(x, path, *reduced)

    def _reconstruct(
        self,
        x: Any,
        path: str,
        make: Callable[..., Any],
        arguments: tuple[Any, ...],
        state: Any = None,
        items: Any = None,
        pairs: Any = None,
        set_state: Callable[[Any, Any], None] | None = None,
    ) -> Any:
        arguments = tuple(self.copy(argument, path) for argument in arguments)
        user_code = UserCode(self, path)
        if not is_known(make, arguments):
            for_each_tensor(arguments, self.fill)
        with user_code:
            y = make(*arguments)
        self.memo[id(x)] = y
        if state is not None:
            state = self.copy(state, path)
            set_state = set_state or getattr(type(y), "__setstate__", None)
            if set_state is not None and not is_known(set_state):
                for_each_tensor(state, self.fill)
            with user_code:
                _set_state(y, state, set_state)
        for i, item in enumerate(items or ()):
            item = self.copy(item, _child(path, i))
            if type(y).append not in _PLAIN:
                for_each_tensor(item, self.fill)
            with user_code:
                y.append(item)
        is_plain = pairs is not None and type(y).__setitem__ in _PLAIN
        for key, value in pairs or ():
            key, value = self.copy(key, path), self.copy(value, _child(path, key))
            if is_plain:
                y[key] = value
                continue
            for_each_tensor((key, value), self.fill)
            with user_code:
                y[key] = value
        return y

    # ---- Tensors ----

    def _tensor(self, x: Any, path: str) -> Any:
        cls = type(x)
        if cls is torch.Tensor:
            y = torch.empty(0, dtype=x.dtype, device="cpu")
            self._add(x, y, path)
        elif cls is Parameter:
            y = Parameter(torch.empty(0, dtype=x.dtype, device="cpu"), requires_grad=False)
            self._add(x, y, path)
            if x.requires_grad:
                self._requires_grad.append(y)
        elif hasattr(cls, "__tensor_flatten__") and hasattr(cls, "__tensor_unflatten__"):
            return self._wrapper(x, path)
        elif torch.nn.parameter.is_lazy(x):
            return self._by_own_code(x.__deepcopy__, path)
        else:
            y = self._subclass(x, path)
        self._attributes(x, y, path)
        return y

    def _add(self, x: Any, y: Any, path: str) -> None:
        self.memo[id(x)] = y
        self.sources.append(x)
        self._copies.append(y)
        self.paths.append(path)
        # A tensor on a device comes to the host through PyTorch.
        on_device = not x.is_cpu and not x.is_meta
        if on_device or (self._private and _storage_id(x) in self._private):
            self.fill(y)

    def _attributes(self, x: Any, y: Any, path: str, but: Sequence[str] = ()) -> None:
        for name, value in x.__dict__.items():
            if name not in but:
                y.__dict__[name] = self.copy(value, _child(path, name))
        if type(x) in (torch.Tensor, Parameter):
            return
        for name in _slots(type(x)):
            if name not in but and hasattr(x, name):
                setattr(y, name, self.copy(getattr(x, name), _child(path, name)))

    def _wrapper(self, x: Any, path: str) -> Any:
        """The copy of a tensor that consists of others and says of which, such as a DTensor."""
        names, context = x.__tensor_flatten__()
        parts = {name: self.copy(getattr(x, name), _child(path, name)) for name in names}
        context = self.copy(context, path)
        with UserCode(self, path):
            y = type(x).__tensor_unflatten__(parts, context, x.size(), x.stride())
        self.memo[id(x)] = y
        # What the class makes of its parts need not say it.
        y.requires_grad_(isinstance(x, Parameter) and x.requires_grad)
        self._attributes(x, y, path, but=names)
        return y

    def _subclass(self, x: Any, path: str) -> Any:
        cls = type(x)
        with _as_plain_tensors():
            if x.numel() != 0 and x.data_ptr() == 0 and not x.is_meta:
                # Without memory of its own: what it consists of are its attributes.
                y = torch.Tensor._make_wrapper_subclass(
                    cls, x.size(), strides=x.stride(), dtype=x.dtype, layout=x.layout, device="cpu"
                )
                self.memo[id(x)] = y
                return y
            y = torch.Tensor._make_subclass(cls, torch.empty(0, dtype=x.dtype, device="cpu"))
            self._add(x.as_subclass(torch.Tensor), y, path)
        self.memo[id(x)] = y
        if isinstance(x, Parameter) and x.requires_grad:
            self._requires_grad.append(y)
        return y

    # ---- Tensors that user code touches (user_code.py) ----

    def source_of(self, y: Any) -> Any:
        """The source of a tensor of the copy; of any other tensor itself."""
        i = self._position(y)
        return y if i is None else self.sources[i]

    def fill(self, y: Any) -> None:
        """Gives a tensor of the copy, and all that share its storage, right bytes now."""
        i = self._position(y)
        if i is None or self.sources[i] is y or self.sources[i].layout != torch.strided:
            return
        storage = self.sources[i].untyped_storage()
        private = self._private.get(storage._cdata)
        if private is None:
            private = torch.UntypedStorage(storage.nbytes(), device="cpu").copy_(storage)
            self._private[storage._cdata] = private
            self._own.add(private._cdata)
        sharing = self._by_storage.pop(storage._cdata)
        with _as_plain_tensors():
            for i in sharing:
                source, copied = self.sources[i], self._copies[i]
                _check_memory(source, storage, self.paths[i])
                _Place.of(source).put(copied, private, source.storage_offset())
                self.sources[i] = copied
                self._keep_alive(source)

    def adopt(self, y: Any, path: str, *, owner: bool) -> None:
        """Has a tensor that user code made staged as well: where `owner`, one with a storage of its
        own, else one whose storage is known to be a private copy."""
        if type(y) not in (torch.Tensor, Parameter) or not y.is_cpu or y.layout != torch.strided:
            return
        storage = y.untyped_storage()._cdata
        if owner:
            self._own.add(storage)
        elif storage not in self._own:
            return
        if self._position(y) is None:
            self.sources.append(y)
            self._copies.append(y)
            self.paths.append(path)

    def _position(self, y: Any) -> int | None:
        for i in range(self._indexed, len(self._copies)):
            self._listed[id(self._copies[i])] = i
            if self.sources[i] is not self._copies[i]:
                self._by_storage.setdefault(_storage_id(self.sources[i]), []).append(i)
        self._indexed = len(self._copies)
        return self._listed.get(id(y))


def _storage_id(tensor: Any) -> int:
    # Others than strided ones have no storage, and are refused with the reason by the engine.
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else 0


def _check_memory(source: Any, storage: Any, path: str) -> None:
    """PyTorch would enlarge the storage of a tensor that reaches beyond it."""
    if source.numel() == 0:
        return
    last = source.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(source.size(), source.stride(), strict=True)
    )
    if (last + 1) * source.element_size() > storage.nbytes():
        raise InvalidArgumentError(
            f"cannot stage '{path}', which reaches beyond its storage: the storage was freed or "
            "resized; gather the tensor first",
            key_path=path,
        )


def _set_state(y: Any, state: Any, set_state: Callable[[Any, Any], None] | None) -> None:
    if set_state is not None:
        set_state(y, state)
    else:
        slots = None
        if isinstance(state, tuple) and len(state) == 2:
            state, slots = state
        if state is not None:
            y.__dict__.update(state)
        for name, value in (slots or {}).items():
            setattr(y, name, value)


def _slots(cls: type) -> list[str]:
    # As copy.deepcopy() finds them: with the names that private ones have, and not __dict__.
    return copyreg._slotnames(cls)  # type: ignore[attr-defined,no-any-return]


@functools.cache
def _by_reference() -> tuple[type, ...]:
    """What stands for things outside of this process's memory: the copy names the same ones."""
    distributed = torch.distributed
    if not distributed.is_available():
        return ()
    return distributed.ProcessGroup, distributed.device_mesh.DeviceMesh


# What only stores what it is given.
_PLAIN: frozenset[Any] = frozenset(
    (list.append, deque.append, dict.__setitem__, OrderedDict.__setitem__)
)

# Immutable, or what copy.deepcopy() takes as it is.
_ATOMIC: frozenset[type] = frozenset(
    (
        type(None),
        type(Ellipsis),
        type(NotImplemented),
        int,
        float,
        bool,
        complex,
        bytes,
        str,
        type,
        range,
        property,
        types.CodeType,
        types.BuiltinFunctionType,
        types.FunctionType,
        weakref.ref,
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
        torch.Size,
    )
)

_COPIERS: dict[type, Callable[[Walk, Any, str], Any]] = {
    list: Walk._list,
    tuple: Walk._tuple,
    dict: Walk._dict,
    types.MethodType: Walk._method,
}
