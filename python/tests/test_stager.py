"""The stagers: what the copy of a state is, whatever it consists of."""

from __future__ import annotations

import collections
import copy
import dataclasses
import threading
import types
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from helpers import assert_same, bits_of, run_python
from staging_helpers import assert_staged, stage, storage_of

import strandline
import strandline.torch
from strandline.torch import (
    StateDictStager,
)

# ---- The structure ----


def test_a_staged_tensor_is_a_copy_that_nothing_changes_later():
    source = torch.arange(1000.0)
    staged = stage({"a": source})["a"]
    assert_staged(staged, source)
    source.fill_(-1)
    assert staged.tolist() == list(range(1000))


def test_aliases_and_views_share_memory_again():
    base = torch.arange(24.0).reshape(4, 6)
    staged = stage(
        {"base": base, "same": base, "flat": base.view(24), "t": base.t(), "cut": base[1:3, ::2]}
    )
    assert staged["same"] is staged["base"]
    for name in ("flat", "t", "cut"):
        assert storage_of(staged[name]) == storage_of(staged["base"])
    assert staged["cut"].storage_offset() == base[1:3, ::2].storage_offset()
    assert staged["cut"].stride() == (6, 2)
    staged["base"].fill_(42)
    assert all((staged[name] == 42).all() for name in ("flat", "t", "cut"))


def test_two_tensor_objects_of_one_storage_in_different_containers_share_it():
    base = torch.arange(10.0)

    @dataclasses.dataclass
    class Holder:
        view: torch.Tensor

    staged = stage({"a": [base], "deep": {"er": (Holder(base[2:5]),)}})
    view = staged["deep"]["er"][0].view
    assert storage_of(view) == storage_of(staged["a"][0])
    assert view.storage_offset() == 2


def test_only_what_is_reached_of_a_storage_is_copied():
    huge = torch.zeros(1 << 28, dtype=torch.uint8)
    view = huge[12345678 : 12345678 + 1024]
    view.copy_(torch.arange(1024) % 251)
    stager = StateDictStager()
    staged = stager.stage({"view": view})
    assert_staged(staged["view"], view)
    assert staged["view"].untyped_storage().nbytes() <= 4096
    assert stager.host_bytes_in_use <= 4096


def test_views_of_other_element_types_stay_aligned_and_aliased():
    bytes_ = torch.arange(256, dtype=torch.uint8)
    # The part that is reached begins at a byte where no float could.
    state = {"odd": bytes_[67:71], "floats": bytes_[68:84].view(torch.float32)}
    staged = stage(state)
    for name, source in state.items():
        assert_staged(staged[name], source)
    staged["odd"].zero_()
    assert staged["floats"].view(torch.uint8)[:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.bool,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_every_element_type_is_staged(dtype):
    bytes_ = torch.randint(0, 2, (6 * 16,), dtype=torch.uint8)
    source = bytes_.view(dtype).reshape(2, -1)
    # PyTorch has no bits_of for some of them: compare bytes.
    staged = stage({"a": source})["a"]
    assert (staged.dtype, staged.shape) == (dtype, source.shape)
    assert staged.view(torch.uint8).tolist() == source.view(torch.uint8).tolist()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2), ()])
def test_empty_tensors_and_scalars_keep_their_shape(shape, shared):
    source = torch.ones(shape)
    staged = stage({"a": source}, share_memory=shared)["a"]
    assert_staged(staged, source)
    assert staged.is_shared() == shared


def test_expanded_negative_and_conjugate_tensors_keep_what_they_are():
    complex_ = torch.tensor([1 + 2j, 3 - 4j])
    state = {
        "expanded": torch.arange(3.0).expand(5, 3),
        "conjugate": complex_.conj(),
        "negative": complex_.conj().imag,
        "original": complex_,
    }
    staged = stage(state)
    assert staged["expanded"].stride() == (0, 1)
    assert staged["conjugate"].is_conj()
    assert staged["negative"].is_neg()
    for name, source in state.items():
        assert torch.equal(staged[name], source)
    assert storage_of(staged["conjugate"]) == storage_of(staged["original"])


class Point(NamedTuple):
    at: torch.Tensor
    name: str


@dataclasses.dataclass
class Inner:
    tensor: torch.Tensor
    value: int = 42


@dataclasses.dataclass
class Outer:
    inner: Inner
    values: list[float]


@dataclasses.dataclass(frozen=True)
class Frozen:
    tensor: torch.Tensor
    value: int = 100


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    tensor: torch.Tensor


@dataclasses.dataclass(slots=True)
class Slots:
    tensor: torch.Tensor


def test_containers_of_all_kinds_keep_their_types_and_order():
    def tensor():
        return torch.randn(3)

    ordered = OrderedDict(b=tensor(), a=tensor())
    ordered._metadata = {"": {"version": 2}}
    state = {
        "dict": {1: tensor(), "1": tensor(), (2, 3): "x"},
        "list": [tensor(), [1, [2, tensor()]]],
        "tuple": (tensor(), 1),
        "named": Point(tensor(), "p"),
        "ordered": ordered,
        "default": collections.defaultdict(list, a=[tensor()]),
        "deque": collections.deque([tensor()], maxlen=3),
        "set": {1, 2},
        "frozenset": frozenset({3}),
        "outer": Outer(Inner(tensor()), [1.0, 2.0]),
        "frozen": Frozen(tensor()),
        "frozen_slots": FrozenSlots(tensor()),
        "slots": Slots(tensor()),
        "array": numpy.arange(3),
        "simple": types.SimpleNamespace(tensor=tensor()),
    }
    staged = stage(state)
    assert list(staged) == list(state)
    assert list(staged["dict"]) == [1, "1", (2, 3)]
    assert_same(staged["dict"], state["dict"])
    assert_same(staged["list"], state["list"])
    assert_same(staged["tuple"], state["tuple"])
    assert type(staged["named"]) is Point
    assert staged["named"].name == "p"
    assert_same(staged["ordered"], state["ordered"])
    assert staged["default"].default_factory is list
    assert_same(staged["default"]["a"], state["default"]["a"])
    assert staged["deque"].maxlen == 3
    assert_same(list(staged["deque"]), list(state["deque"]))
    assert staged["set"] == {1, 2}
    assert staged["set"] is not state["set"]
    assert staged["frozenset"] == {3}
    assert staged["outer"].inner.value == 42
    assert staged["outer"].values == [1.0, 2.0]
    assert_staged(staged["outer"].inner.tensor, state["outer"].inner.tensor)
    for name in ("frozen", "frozen_slots", "slots", "simple"):
        assert type(staged[name]) is type(state[name])
        assert_staged(staged[name].tensor, state[name].tensor)
    assert_staged(staged["named"].at, state["named"].at)
    state["array"][0] = 99
    assert staged["array"].tolist() == [0, 1, 2]


def test_cycles_stay_cycles():
    state: dict[str, Any] = {"t": torch.ones(2), "list": []}
    state["self"] = state
    state["list"].append((state["list"], state["t"]))
    staged = stage(state)
    assert staged["self"] is staged
    assert staged["list"][0][0] is staged["list"]
    assert staged["list"][0][1] is staged["t"] is not state["t"]


def test_a_tuple_without_tensors_is_passed_on_and_one_with_them_is_not():
    numbers = (1, (2, "x"))
    staged = stage({"a": numbers, "b": (numbers, torch.ones(1))})
    assert staged["a"] is numbers
    assert staged["b"][0] is numbers


def test_attributes_of_tensors_are_copied():
    source = torch.ones(2)
    source.label = "w"
    source.extra = {"scale": torch.full((1,), 2.0)}
    source.me = source
    staged = stage({"a": source})["a"]
    assert staged.label == "w"
    assert staged.me is staged
    assert_staged(staged.extra["scale"], source.extra["scale"])


def test_parameters_stay_parameters_and_plain_tensors_need_no_gradients():
    state = {
        "trained": torch.nn.Parameter(torch.randn(2)),
        "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "plain": torch.randn(2, requires_grad=True),
        "computed": torch.randn(2, requires_grad=True) * 2,
        "lazy": torch.nn.LazyLinear(2).weight,
    }
    staged = stage(state)
    assert type(staged["trained"]) is torch.nn.Parameter
    assert staged["trained"].requires_grad
    assert type(staged["frozen"]) is torch.nn.Parameter
    assert not staged["frozen"].requires_grad
    for name in ("plain", "computed"):
        assert type(staged[name]) is torch.Tensor
        assert not staged[name].requires_grad
    assert type(staged["lazy"]) is torch.nn.UninitializedParameter
    for name in ("trained", "frozen", "plain", "computed"):
        assert bits_of(staged[name]) == bits_of(state[name])


def test_whole_models_and_optimizers_are_staged_with_their_ties():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)
    )
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    staged = stage({"model": model, "optimizer": optimizer, "weights": model.state_dict()})
    twin = staged["model"]
    assert twin[1].weight is twin[0].weight
    assert staged["optimizer"].param_groups[0]["params"][0] is twin[0].weight
    assert storage_of(staged["weights"]["0.weight"]) == storage_of(twin[0].weight)
    assert storage_of(twin[0].weight) != storage_of(model[0].weight)
    assert_same(dict(staged["weights"]), dict(model.state_dict()))
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), model.eval()(x))


# ---- Tensor subclasses ----


class Tagged(torch.Tensor):
    """Memory of its own, and attributes."""


class SlotTagged(torch.Tensor):
    __slots__ = ("tag",)


class Pair(torch.Tensor):
    """Consists of two others, as DTensor does of one."""

    @staticmethod
    def __new__(cls, a, b, tag):
        return torch.Tensor._make_wrapper_subclass(
            cls, a.shape, strides=a.stride(), dtype=a.dtype, device=a.device
        )

    def __init__(self, a, b, tag):
        self.a, self.b, self.tag = a, b, tag

    def __tensor_flatten__(self):
        return ["a", "b"], {"tag": self.tag}

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        assert parts["a"].shape == size
        return Pair(parts["a"], parts["b"], context["tag"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


class OwnDispatch(torch.Tensor):
    """Memory of its own, and code of its own for all that is done with it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


class Loud(torch.Tensor):
    """Every call to PyTorch with it is an error."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


def test_subclasses_keep_class_memory_and_attributes():
    tagged = torch.arange(4.0).as_subclass(Tagged)
    tagged.tag = [torch.ones(1)]
    slotted = torch.arange(4.0).as_subclass(SlotTagged)
    slotted.tag = "s"
    base = torch.arange(8.0)
    loud = base[2:].as_subclass(Loud)
    dispatching = OwnDispatch(base[1:])
    staged = stage(
        {"tagged": tagged, "slotted": slotted, "loud": loud, "own": dispatching, "base": base}
    )
    assert type(staged["own"]) is OwnDispatch
    with torch._C._DisableTorchDispatch():
        assert storage_of(staged["own"]) == storage_of(staged["base"])
        assert staged["own"].storage_offset() == 1
    assert type(staged["tagged"]) is Tagged
    assert staged["tagged"].tolist() == [0, 1, 2, 3]
    assert staged["tagged"].tag[0] is not tagged.tag[0]
    assert type(staged["slotted"]) is SlotTagged
    assert staged["slotted"].tag == "s"
    assert type(staged["loud"]) is Loud
    with torch._C.DisableTorchFunctionSubclass():
        assert staged["loud"].tolist() == [2, 3, 4, 5, 6, 7]
        assert storage_of(staged["loud"]) == storage_of(staged["base"])


def test_subclasses_that_consist_of_tensors_are_staged_part_by_part():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    pair = Pair(a, b, {"scale": 3})
    pair.note = "kept"
    stager = StateDictStager()
    staged = stager.stage({"pair": pair, "a": a})
    assert type(staged["pair"]) is Pair
    assert staged["pair"].shape == (2, 3)
    assert staged["pair"].a is staged["a"]
    assert_staged(staged["pair"].a, a)
    assert_staged(staged["pair"].b, b)
    assert staged["pair"].tag == {"scale": 3}
    assert staged["pair"].tag is not pair.tag
    assert staged["pair"].note == "kept"


DISTRIBUTED = """
import os, torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, Replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from strandline.torch import StateDictStager

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
"""


def test_dtensors_keep_their_spec():
    done = run_python(
        DISTRIBUTED
        + """
local = torch.randn(3, 3)
dtensor = DTensor.from_local(local, mesh, [Shard(0)]) * 2
parameter = torch.nn.Parameter(DTensor.from_local(local, mesh, [Replicate()]))
staged = StateDictStager(share_memory=False).stage({"d": dtensor, "p": parameter})
result = staged["d"]
assert type(result) is DTensor
assert result._spec == dtensor._spec and result.placements == (Shard(0),)
assert result.device_mesh is mesh
assert result.size() == dtensor.size()
assert torch.equal(result.to_local(), dtensor.to_local())
assert result.to_local().data_ptr() != dtensor.to_local().data_ptr()
dtensor.to_local().zero_()
assert result.to_local().abs().sum() > 0
assert torch.equal((result + result).to_local(), result.to_local() * 2)
assert isinstance(staged["p"], torch.nn.Parameter) and staged["p"].requires_grad
assert not result.requires_grad
dist.destroy_process_group()
print("done")
"""
    )
    assert done.stdout == "done\n", done.stderr


def test_sharded_tensors_keep_their_shards():
    done = run_python(
        DISTRIBUTED
        + """
spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu"])
source = sharded_tensor.rand(spec, 8, 4)
staged = StateDictStager().stage({"s": source})["s"]
assert type(staged) is type(source)
assert staged.size() == source.size()
(shard,), (original,) = staged.local_shards(), source.local_shards()
assert torch.equal(shard.tensor, original.tensor)
assert shard.tensor.data_ptr() != original.tensor.data_ptr()
assert shard.metadata == original.metadata and staged.metadata() == source.metadata()
dist.destroy_process_group()
print("done")
"""
    )
    assert done.stdout == "done\n", done.stderr


# ---- Code of users that runs during the walk ----


class CopiesItself:
    """Copies some parts through the memo, some by itself, and computes on what it has copied."""

    def __init__(self, shared: torch.Tensor) -> None:
        self.shared = shared
        self.own = torch.arange(4.0)
        self.parameter = torch.nn.Parameter(torch.ones(2))
        self.cloned = torch.arange(5.0)
        self.total = 0.0
        self.view = None

    def __deepcopy__(self, memo):
        twin = CopiesItself.__new__(CopiesItself)
        memo[id(self)] = twin
        twin.shared = copy.deepcopy(self.shared, memo)
        twin.own = copy.deepcopy(self.own, memo)
        twin.parameter = copy.deepcopy(self.parameter, memo)
        twin.cloned = self.cloned.clone()
        twin.total = float(twin.shared.sum() + twin.own.sum() + twin.cloned.sum())
        twin.view = twin.shared[1:3]
        twin.own.add_(1)
        return twin


@pytest.mark.parametrize("shared_first", [True, False])
def test_objects_that_copy_themselves_compute_on_right_values_and_are_staged(shared_first):
    shared = torch.arange(100.0)
    holder = CopiesItself(shared)
    names = ("shared", "holder") if shared_first else ("holder", "shared")
    values = {"shared": shared, "holder": holder}
    staged = stage({name: values[name] for name in names}, share_memory=True)
    twin = staged["holder"]
    assert twin.shared is staged["shared"]
    assert twin.total == 4950 + 6 + 10
    assert twin.own.tolist() == [1, 2, 3, 4]
    assert holder.own.tolist() == [0, 1, 2, 3]
    assert type(twin.parameter) is torch.nn.Parameter
    assert twin.parameter.requires_grad
    assert twin.cloned.tolist() == [0, 1, 2, 3, 4]
    for tensor in (twin.shared, twin.own, twin.parameter, twin.cloned, twin.view):
        assert tensor.is_shared()
    assert storage_of(twin.view) == storage_of(twin.shared)
    assert twin.view.tolist() == [1, 2]
    holder.shared.zero_()
    assert twin.shared.sum() == 4950


def test_a_tensor_that_an_object_refuses_to_copy_is_left_alone():
    class Keeps:
        def __init__(self):
            self.live = torch.arange(3.0)

        def __deepcopy__(self, memo):
            memo[id(self.live)] = self.live
            twin = Keeps.__new__(Keeps)
            twin.live = copy.deepcopy(self.live, memo)
            twin.part = twin.live[1:]
            return twin

    holder = Keeps()
    address = holder.live.data_ptr()
    staged = stage({"holder": holder, "live": holder.live})
    assert staged["holder"].live is holder.live
    assert holder.live.data_ptr() == address
    assert storage_of(staged["holder"].part) == storage_of(holder.live)


class SetsState:
    def __init__(self, tensor):
        self.tensor, self.sum = tensor, float(tensor.sum())

    def __getstate__(self):
        return {"tensor": self.tensor}

    def __setstate__(self, state):
        self.tensor = state["tensor"]
        self.shape = self.tensor.shape
        self.sum = float(self.tensor.sum())
        self.array = self.tensor.numpy().copy()


class Reduces:
    def __init__(self, tensor, rest=None):
        self.tensor, self.largest = tensor, tensor.max().item()

    def __reduce__(self):
        return Reduces, (self.tensor,)


class RecordingDict(dict):
    """Looks at what is put into it."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.__dict__.setdefault("sums", []).append(float(value.sum()))


class RecordingList(list):
    def append(self, value):
        super().append(value)
        self.__dict__.setdefault("sums", []).append(float(value.sum()))


def test_state_setters_constructors_and_containers_of_users_see_right_values():
    base = torch.arange(10.0)
    mapping, sequence = RecordingDict(a=base), RecordingList([base[:2]])
    staged = stage(
        {
            "base": base,
            "state": SetsState(base[5:]),
            "reduce": Reduces(base[:7]),
            "mapping": mapping,
            "sequence": sequence,
        }
    )
    assert staged["state"].sum == 35
    assert staged["state"].shape == (5,)
    assert staged["state"].array.tolist() == [5, 6, 7, 8, 9]
    assert staged["reduce"].largest == 6
    assert staged["mapping"].sums == [45]
    assert staged["sequence"].sums == [1]
    for tensor in (staged["state"].tensor, staged["reduce"].tensor, staged["sequence"][0]):
        assert storage_of(tensor) == storage_of(staged["base"])
    assert storage_of(staged["base"]) != storage_of(base)


class Draws:
    """Gives its tensor to a function of PyTorch's that no mode sees."""

    def __init__(self, state):
        self.generator = torch.Generator()
        self.generator.set_state(state)

    def __getstate__(self):
        return {"state": [self.generator.get_state()]}

    def __setstate__(self, state):
        self.__init__(state["state"][0])


class ReducesDraws(Draws):
    def __reduce__(self):
        return ReducesDraws, (self.generator.get_state(),)


class DrawingList(list):
    def append(self, state):
        super().append(state)
        self.generator = torch.Generator().set_state(state)


class DrawingDict(dict):
    def __setitem__(self, key, state):
        super().__setitem__(key, state)
        self.generator = torch.Generator().set_state(state)


class CopiesDraws:
    def __init__(self, state):
        self.state = state

    def __deepcopy__(self, memo):
        twin = CopiesDraws(copy.deepcopy(self.state, memo))
        twin.generator = torch.Generator()
        twin.generator.set_state(twin.state)
        return twin


def test_tensors_are_right_where_no_mode_sees_their_use():
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    expected = torch.rand(3, generator=generator).tolist()
    staged = stage(
        {
            "first": state,  # Its copy is there before anyone asks for its bytes.
            "own": CopiesDraws(state),
            "alone": CopiesDraws(state.clone()),
            "draws": Draws(state),
            "reduces": ReducesDraws(state),
            "list": DrawingList([state.clone()]),
            "dict": DrawingDict(state=state.clone()),
            "generator": torch.Generator().set_state(state),
        }
    )
    assert staged["own"].state is staged["first"]
    drawing = ("own", "alone", "draws", "reduces", "list", "dict")
    for found in [*(staged[name].generator for name in drawing), staged["generator"]]:
        assert torch.rand(3, generator=found).tolist() == expected
    assert_staged(staged["first"], state)


def test_an_object_that_cannot_be_copied_fails_and_the_next_staging_works():
    class Refuses:
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    stager = StateDictStager()
    with pytest.raises(RuntimeError, match="no copies"):
        stager.stage({"a": torch.ones(2), "b": Refuses()})
    with pytest.raises(TypeError, match="pickle"):
        stager.stage({"lock": threading.Lock()})
    assert stager.stage({"a": torch.ones(2)})["a"].tolist() == [1, 1]


def test_modes_and_defaults_of_the_caller_change_nothing():
    source = torch.arange(3.0)
    with torch.inference_mode():
        made_there = torch.arange(3.0)
        first = stage({"a": source, "b": made_there})
    with torch.device("meta"):
        second = stage({"a": source, "s": SetsState(source)})
    for tensor in (first["a"], first["b"], second["a"], second["s"].tensor):
        assert_staged(tensor, source)
    first["a"].add_(1)  # Inference tensors would refuse this.


# ---- What cannot be staged ----


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.empty(3, device="meta"), "meta"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]), "nested"),
        (lambda: torch.empty(2, dtype=torch.quint8), "quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, about such tensors.
def test_tensors_without_plain_memory_are_refused_by_key_path(make, reason):
    tensor = make()
    with pytest.raises(strandline.UnsupportedError, match=reason) as caught:
        stage({"model": {"good": torch.ones(1), "bad": [tensor]}})
    assert caught.value.key_path == "model.bad.0"


def test_a_tensor_whose_storage_was_freed_is_refused_by_key_path():
    tensor = torch.ones(100)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(strandline.InvalidArgumentError) as caught:
        stage({"model": {"w": tensor}})
    assert caught.value.key_path == "model.w"

    class Looks(SetsState):
        def __getstate__(self):
            return {"tensor": tensor}

    with pytest.raises(strandline.InvalidArgumentError, match="storage") as caught:
        stage({"looks": Looks(torch.ones(1))})
    assert caught.value.key_path.startswith("looks")
    assert tensor.untyped_storage().nbytes() == 0


def test_key_paths_that_read_the_same_and_odd_keys_do_no_harm():
    state = {1: torch.ones(1), "1": torch.zeros(1), "\ud800": torch.ones(2), "a.b": torch.ones(3)}
    state["a"] = {"b": torch.zeros(3)}
    assert_same(stage(state), state)
