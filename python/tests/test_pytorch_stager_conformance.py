"""PyTorch's tests of its stagers, as tests of ours: see tests/conformance/pytorch.md."""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy
import pytest
import torch
import torch.distributed as dist
from each_stager import (
    STAGERS,
    assert_laid_out_alike,
    bytes_reached_by,
    config,
    finish,
    storage_of,
    tensors_in,
)
from helpers import assert_same, bits_of
from torch.distributed.checkpoint._experimental import staging as original
from torch.distributed.checkpoint._state_dict_stager import StateDictStager as OriginalStager

from strandline.torch import (
    CheckpointStager,
    CheckpointStagerConfig,
    DefaultStager,
    StateDictStager,
)

PIN_AND_SHARE = [(pin, share) for pin in (False, True) for share in (False, True)]


@pytest.fixture(params=STAGERS)
def stage(request):
    """Stages a state and waits for it, with each stager in turn."""
    stager = STAGERS[request.param]()
    yield lambda state: finish(stager.stage(state))
    stager.close()


def a_state():
    return {
        "model": torch.nn.Linear(10, 5).state_dict(),
        "optimizer": {"param_groups": [{"lr": 0.01, "betas": (0.9, 0.99)}]},
        "epoch": 5,
        "step": 1000,
        "tensor": torch.randn(3, 4),
        "nested": {"inner": torch.ones(2, 2), "value": 42, "name": "run", "none": None},
    }


# ---- DefaultStager ----


def test_synchronous_staging_returns_the_state():
    stager = DefaultStager(config(use_async_staging=False))
    state = a_state()
    staged = stager.stage(state)
    assert type(staged) is dict
    assert_same(state, staged)
    stager.close()


def test_asynchronous_staging_returns_a_future_of_the_state():
    stager = DefaultStager(config())
    state = a_state()
    staged = stager.stage(state)
    assert isinstance(staged, Future)
    assert_same(state, staged.result(60))
    stager.close()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_copies_that_do_not_block_need_an_accelerator():
    with pytest.raises(AssertionError, match="accelerator"):
        DefaultStager()
    with pytest.raises(AssertionError, match="accelerator"):
        DefaultStager(CheckpointStagerConfig(use_async_staging=False, use_non_blocking_copy=True))


@pytest.mark.parametrize("use_pinned_memory", [False, True])
@pytest.mark.parametrize("use_shared_memory", [False, True])
@pytest.mark.parametrize("use_async_staging", [False, True])
def test_every_combination_of_options_stages(
    use_pinned_memory, use_shared_memory, use_async_staging
):
    stager = DefaultStager(
        config(
            use_pinned_memory=use_pinned_memory,
            use_shared_memory=use_shared_memory,
            use_async_staging=use_async_staging,
        )
    )
    state = a_state()
    staged = stager.stage(state)
    assert isinstance(staged, Future) == use_async_staging
    staged = finish(staged)
    assert_same(state, staged)
    for path, tensor in tensors_in(staged):
        assert tensor.is_shared() == use_shared_memory, path
    stager.close()


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
def test_tensors_of_an_accelerator_are_staged_into_host_memory(stage):
    device = torch.accelerator.current_accelerator()
    whole = torch.randn(5, 5, device=device)
    state = {"device": whole, "host": torch.randn(2, 3), "mixed": [whole[1:3], torch.ones(2)]}
    expected = {"device": whole.cpu(), "host": state["host"].clone(), "mixed": whole[1:3].cpu()}
    staged = stage(state)
    whole.zero_()
    assert all(tensor.is_cpu for _, tensor in tensors_in(staged))
    assert torch.equal(staged["device"], expected["device"])
    assert torch.equal(staged["host"], expected["host"])
    assert torch.equal(staged["mixed"][0], expected["mixed"])
    assert storage_of(staged["mixed"][0]) == storage_of(staged["device"])


def test_closing_twice_does_nothing_more_and_staging_afterwards_is_an_error():
    for make in STAGERS.values():
        stager = make()
        staged = finish(stager.stage(a_state()))
        expected = copy.deepcopy(staged)
        stager.close()
        stager.close()
        assert_same(expected, staged)
        with pytest.raises(RuntimeError, match="clos"):
            finish(stager.stage(a_state()))


def test_one_stager_stages_states_of_different_structure_in_turn(stage):
    states = [
        {"model1": torch.nn.Linear(5, 3).state_dict()},
        {"model2": torch.nn.Conv2d(3, 16, 3).state_dict()},
        {"optimizer": {"lr": 0.001, "momentum": 0.9}},
        {},
    ]
    staged = [stage(state) for state in states]
    assert_same(states, staged)


def test_the_names_stand_in_for_pytorchs():
    assert issubclass(CheckpointStager, original.CheckpointStager)
    assert issubclass(DefaultStager, CheckpointStager)
    with DefaultStager(config()) as stager:
        assert isinstance(stager, original.CheckpointStager)
    with pytest.raises(RuntimeError, match="clos"):
        finish(stager.stage({}))

    ours = {f.name: f.default for f in dataclasses.fields(CheckpointStagerConfig)}
    theirs = {f.name: f.default for f in dataclasses.fields(original.CheckpointStagerConfig)}
    assert list(ours.items())[: len(theirs)] == list(theirs.items())
    for theirs, ours in (
        (OriginalStager.__init__, StateDictStager.__init__),
        (OriginalStager.stage, StateDictStager.stage),
        (original.DefaultStager.__init__, DefaultStager.__init__),
        (original.DefaultStager.stage, DefaultStager.stage),
    ):
        wanted, given = inspect.signature(theirs).parameters, inspect.signature(ours).parameters
        for name, parameter in wanted.items():
            assert given[name].kind == parameter.kind, f"{ours.__qualname__}({name})"
        by_position = [p.name for p in wanted.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert list(given)[: len(by_position)] == by_position, ours.__qualname__


def test_the_interface_is_abstract_and_can_be_implemented():
    with pytest.raises(TypeError):
        CheckpointStager()

    class Unchanged(CheckpointStager):
        def stage(self, state_dict, **kwargs):
            return state_dict

        def close(self):
            pass

    assert Unchanged().stage({"n": 1}) == {"n": 1}


def test_pytorchs_own_configuration_is_accepted():
    theirs = original.CheckpointStagerConfig(
        use_async_staging=False, use_non_blocking_copy=False, use_shared_memory=True
    )
    with DefaultStager(theirs) as stager:
        staged = stager.stage({"w": torch.ones(3)})
    assert staged["w"].is_shared()


def test_unknown_arguments_are_accepted_and_ignored():
    with DefaultStager(config(use_async_staging=False)) as stager:
        assert_same({"n": 1}, stager.stage({"n": 1}, custom_arg="value", another_arg=42))


def test_an_error_of_staging_is_in_the_future_and_the_next_staging_works():
    uncopyable = {"w": torch.ones(3), "lock": threading.Lock()}
    with DefaultStager(config()) as stager:
        failed = stager.stage(uncopyable)
        assert isinstance(failed.exception(60), TypeError)
        assert_same({"w": torch.ones(3)}, finish(stager.stage({"w": torch.ones(3)})))
    with DefaultStager(config(use_async_staging=False)) as stager:
        with pytest.raises(TypeError, match="lock"):
            stager.stage(uncopyable)
        assert_same({"w": torch.ones(3)}, stager.stage({"w": torch.ones(3)}))


def test_the_interface_of_torch_checkpointing_is_there():
    with ThreadPoolExecutor(max_workers=1) as pool:
        stager = DefaultStager(config(), staging_executor=pool)
        assert stager.get_staged_state_dict() is None
        big, small = torch.ones(4), torch.ones(2)
        staged = finish(stager.stage({"big": big, "small": small}, {"small", "missing"}))
        assert staged["small"] is small  # Passed on as it is, for nobody changes it.
        assert list(staged) == ["big", "small"]
        assert staged["big"] is not big
        assert stager.get_staged_state_dict() is staged
        # Any payload.
        assert torch.equal(finish(stager.stage([big]))[0], big)
        assert finish(stager.stage(7)) == 7
        assert stager.pinned_num_bytes() == 0
        assert isinstance(stager.stage({"lock": threading.Lock()}).exception(60), TypeError)
        assert stager.get_staged_state_dict() is None
        stager.close()
        assert pool.submit(int).result(60) == 0  # It has another owner, who closes it.
        with pytest.raises(ValueError, match="staging_executor"):
            DefaultStager(config(use_async_staging=False), staging_executor=pool)


# ---- StateDictStager: storages ----


@dataclasses.dataclass
class Holder:
    tensor: torch.Tensor
    value: int = 42


@dataclasses.dataclass
class Outer:
    tensor: torch.Tensor
    name: str
    values: list
    inner: Holder


@dataclasses.dataclass(frozen=True)
class Frozen:
    tensor: torch.Tensor
    value: int = 100


@dataclasses.dataclass(slots=True)
class Slotted:
    tensor: torch.Tensor
    value: int = 7


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenAndSlotted:
    tensor: torch.Tensor


def state_with_views():
    first, second = torch.randn(4, 4), torch.randn(4, 4)
    return {
        "whole": first,
        "flat": first.view(16),
        "nested": {"second": second, "held": Holder(second.narrow(0, 0, 2))},
    }


@pytest.mark.parametrize(("pin", "share"), PIN_AND_SHARE)
def test_views_stay_views_of_one_storage_and_each_storage_is_staged_once(pin, share):
    state = state_with_views()
    staged = StateDictStager(pin_memory=pin, share_memory=share).stage(state)
    assert_laid_out_alike(state, staged)
    for (path, before), (_, after) in zip(tensors_in(state), tensors_in(staged), strict=True):
        assert torch.equal(before, after), path
        assert before.storage_offset() == after.storage_offset(), path
        assert after.device.type == "cpu", path
    storages = {storage_of(t): t.untyped_storage() for _, t in tensors_in(staged)}
    assert [s.nbytes() for s in storages.values()] == [64, 64]


@pytest.mark.parametrize(("pin", "share"), PIN_AND_SHARE)
def test_staging_again_sees_new_values_and_leaves_a_held_result_as_it_was(pin, share):
    state = state_with_views()
    stager = StateDictStager(pin_memory=pin, share_memory=share)
    first = stager.stage(state)
    kept = copy.deepcopy(first)
    state["whole"].fill_(0)
    state["nested"]["second"].fill_(0)
    second = stager.stage(state)
    assert all(torch.all(tensor == 0) for _, tensor in tensors_in(second))
    assert_laid_out_alike(state, second)
    assert torch.equal(first["flat"], kept["flat"])
    assert torch.equal(first["nested"]["second"], kept["nested"]["second"])
    addresses = {bytes_reached_by(t).start for _, t in tensors_in(first)}
    assert addresses.isdisjoint(bytes_reached_by(t).start for _, t in tensors_in(second))

    # What nobody holds is used again.
    del first
    state["whole"].fill_(42)
    third = stager.stage(state)
    assert torch.all(third["whole"] == 42)
    assert torch.all(third["flat"] == 42)
    assert third["whole"].data_ptr() in addresses
    assert torch.all(second["whole"] == 0)


def test_views_slices_and_steps_of_one_storage_keep_their_places(stage):
    base = torch.randn(10, 10)
    flat = base.view(100)
    state = {
        "base": base,
        "flat": flat,
        "same": base.view(10, 10),
        "inside": base[2:8, 2:8],
        "left": base[:, :5],
        "range": flat[10:60],
        "turned": base.t(),
        "stepped": flat[3::7],
        "expanded": base[0:1].expand(4, 10),
    }
    staged = stage(state)
    assert_laid_out_alike(state, staged)
    for name, tensor in state.items():
        assert torch.equal(tensor, staged[name]), name
        assert tensor.storage_offset() == staged[name].storage_offset(), name
    staged["base"].fill_(42.0)
    for name, tensor in staged.items():
        assert torch.all(tensor == 42.0), name


def test_only_what_the_tensors_reach_is_staged(stage):
    storage = torch.arange(1 << 20, dtype=torch.float32)
    state = {"row": storage[5000:5256], "inside": storage[5100:5110]}
    staged = stage(state)
    assert torch.equal(state["row"], staged["row"])
    assert torch.equal(state["inside"], staged["inside"])
    assert_laid_out_alike(state, staged)
    bytes_staged = staged["row"].untyped_storage().nbytes()
    assert bytes_staged <= 4096


def test_what_is_staged_is_independent_of_its_source(stage):
    state = {"a": torch.randn(4, 4), "b": torch.randn(8, 8)}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    staged = stage(state)
    for name, tensor in state.items():
        assert tensor.data_ptr() != staged[name].data_ptr(), name
        tensor.fill_(99.0)
    assert_same(kept, staged)
    staged["a"].fill_(1.0)
    assert torch.all(state["a"] == 99.0)


@pytest.mark.parametrize(("pin", "share"), PIN_AND_SHARE)
def test_memory_is_shared_and_pinned_as_asked(pin, share):
    state = {"large": torch.randn(64, 64), "small": torch.tensor(1.0)}
    staged = StateDictStager(pin_memory=pin, share_memory=share).stage(state)
    assert_same(state, staged)
    for name, tensor in staged.items():
        assert tensor.is_shared() == share, name
        assert tensor.untyped_storage().is_shared() == share, name
        assert tensor.is_pinned() == (pin and torch.accelerator.is_available()), name


# ---- Values ----

# All that have bytes of their own: not those of quantized tensors, and none of less than a byte.
DTYPES = sorted(
    {
        dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
        and not re.fullmatch(r"torch\.(q\w+|bits\w+|u?int[1-7])", str(dtype))
    },
    key=str,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_staged_to_the_last_bit(dtype):
    if dtype is torch.bool:
        tensor = torch.randint(0, 2, (16, 4), dtype=dtype)
    else:  # Not numbers included.
        tensor = torch.randint(0, 256, (16, 4 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    for name, make in STAGERS.items():
        staged = finish(make().stage({"t": tensor}))["t"]
        assert staged.dtype == dtype, name
        assert staged.shape == tensor.shape, name
        assert bits_of(staged) == bits_of(tensor), name


def test_conjugate_and_negative_views_keep_values_and_kind(stage):
    tensor = torch.randn(4, 3, dtype=torch.complex64)
    state = {"base": tensor, "conj": tensor.conj(), "neg": tensor.conj().imag}
    assert state["neg"].is_neg()
    staged = stage(state)
    assert_laid_out_alike(state, staged)
    for name, value in state.items():
        assert torch.equal(value, staged[name]), name


@pytest.mark.parametrize(("pin", "share"), PIN_AND_SHARE)
def test_empty_tensors_and_scalars_keep_shape_and_type(pin, share):
    state = {
        "empty": torch.tensor([]),
        "matrix": torch.empty(0, 0, dtype=torch.int64),
        "cube": torch.empty(0, 0, 0),
        "wide": torch.empty(3, 0, 2, dtype=torch.bool),
        "slice": torch.arange(10)[5:5],
        "scalar": torch.tensor(0.25, dtype=torch.float64),
    }
    staged = StateDictStager(pin, share).stage(state)
    assert_same(state, staged)
    assert_laid_out_alike(state, staged)
    for name, tensor in staged.items():
        assert tensor.device.type == "cpu", name


def test_attributes_of_tensors_are_kept_and_tensors_in_them_staged(stage):
    tensor, other = torch.randn(4, 4), torch.randn(3)
    tensor.number, tensor.name_of = 42, ["w"]
    tensor.scale = other
    tensor.itself = tensor
    state = {"tensor": tensor, "view": tensor.view(16), "scale": other}
    staged = stage(state)
    result = staged["tensor"]
    assert (result.number, result.name_of) == (42, ["w"])
    assert result.name_of is not tensor.name_of
    assert result.itself is result
    assert result.scale is staged["scale"]
    other.zero_()
    assert not torch.any(result.scale == 0)
    assert not hasattr(staged["view"], "number")


# ---- Structure ----


def test_dataclasses_nested_frozen_and_with_slots_are_staged(stage):
    state = {
        "tensor": torch.randn(8, 8),
        "outer": Outer(torch.randn(4, 4), "test", [1.0, 2.0], Holder(torch.randn(2, 6))),
        "frozen": Frozen(torch.randn(3, 5)),
        "slotted": Slotted(torch.randn(2)),
        "both": FrozenAndSlotted(torch.randn(2)),
    }
    kept = copy.deepcopy(state)
    staged = stage(state)
    for _, tensor in tensors_in(state):
        tensor.fill_(99.0)
    assert [type(value) for value in staged.values()] == [type(v) for v in state.values()]
    assert (staged["outer"].name, staged["outer"].values) == ("test", [1.0, 2.0])
    assert staged["outer"].values is not state["outer"].values
    assert [staged["outer"].inner.value, staged["frozen"].value, staged["slotted"].value] == [
        42,
        100,
        7,
    ]
    assert_same(dict(tensors_in(kept)), dict(tensors_in(staged)))


class Point(NamedTuple):
    x: torch.Tensor
    label: str


class WithDeepcopy:
    """What an exponential moving average may look like: copies itself."""

    def __init__(self, tensor, parameter, total=None):
        self.tensor = tensor
        self.parameter = parameter
        self.total = total

    def __deepcopy__(self, memo):
        tensor = copy.deepcopy(self.tensor, memo)
        parameter = copy.deepcopy(self.parameter, memo)
        return WithDeepcopy(tensor, parameter, (tensor.sum() + parameter.sum()).clone())


def test_containers_of_every_kind_keep_type_and_order(stage):
    shared = torch.randn(3)
    ordered = collections.OrderedDict(b=torch.randn(2), a=shared)
    ordered._metadata = {"": {"version": 1}}
    state = {
        "list": [1, [shared, {"x": 2}]],
        "tuple": (1, (shared, "x")),
        "named": Point(torch.randn(2), "p"),
        "ordered": ordered,
        "default": collections.defaultdict(list, {"k": [shared]}),
        "queue": collections.deque([shared, 1], maxlen=5),
        "set": {1, 2},
        "array": numpy.arange(6.0).reshape(2, 3),
        7: "a key that is no string",
    }
    staged = stage(state)
    assert [type(value) for value in staged.values()] == [type(v) for v in state.values()]
    assert list(staged) == list(state)
    assert staged["ordered"]._metadata == ordered._metadata
    assert list(staged["ordered"]) == ["b", "a"]
    assert staged["default"].default_factory is list
    assert staged["queue"].maxlen == 5
    assert staged["set"] == {1, 2}
    # One object in several places is one object again.
    copies = [
        staged["list"][1][0],
        staged["tuple"][1][0],
        staged["ordered"]["a"],
        staged["default"]["k"][0],
        staged["queue"][0],
    ]
    assert all(tensor is copies[0] for tensor in copies)
    assert torch.equal(copies[0], shared)
    assert torch.equal(staged["named"].x, state["named"].x)
    state["array"][:] = -1
    assert staged["array"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_cycles_are_kept(stage):
    state = {"w": torch.randn(3), "list": []}
    state["itself"] = state
    state["list"].append(state["list"])
    staged = stage(state)
    assert staged["itself"] is staged
    assert staged["list"][0] is staged["list"]
    assert torch.equal(staged["w"], state["w"])


def test_objects_that_copy_themselves_have_their_tensors_staged(stage):
    average = WithDeepcopy(torch.randn(5), torch.nn.Parameter(torch.randn(3)))
    state = {"average": average, "w": torch.randn(2), "again": average.tensor}
    kept, parameter = average.tensor.clone(), average.parameter.clone()
    staged = stage(state)
    average.tensor.zero_()
    average.parameter.data.zero_()
    result = staged["average"]
    assert torch.equal(result.tensor, kept)
    assert torch.equal(result.parameter, parameter)
    assert result.total == kept.sum() + parameter.sum()
    assert result.tensor is staged["again"]
    for name, tensor in vars(result).items():
        assert tensor.is_shared() == staged["w"].is_shared(), name


def test_modules_and_their_parameters_are_staged_as_what_they_are(stage):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    state = {"model": model, "parameter": model[0].weight, "state": model.state_dict()}
    staged = stage(state)
    assert type(staged["parameter"]) is torch.nn.Parameter
    assert staged["parameter"].requires_grad
    assert staged["model"][0].weight is staged["parameter"]
    assert not staged["model"][0].bias.requires_grad
    assert_same(model.state_dict(), staged["model"].state_dict())
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.any(staged["model"][0].weight != 0)
    staged["model"].eval()(torch.ones(1, 3)).sum().backward()
    assert model[0].weight.grad is None


class Labelled(torch.Tensor):
    """A subclass of a user's: class and attributes are kept."""


class Slots(torch.Tensor):
    __slots__ = ("label",)


def test_subclasses_keep_class_and_attributes(stage):
    labelled = torch.randn(3).as_subclass(Labelled)
    labelled.label = "l"
    slots = torch.randn(3).as_subclass(Slots)
    slots.label = "s"
    state = {"labelled": labelled, "slots": slots}
    staged = stage(state)
    assert (type(staged["labelled"]), type(staged["slots"])) == (Labelled, Slots)
    assert (staged["labelled"].label, staged["slots"].label) == ("l", "s")
    assert_same(state, staged)


class Pair(torch.Tensor):
    """A tensor that consists of others, and does not tell them whether it needs a gradient."""

    @staticmethod
    def __new__(cls, a, b):
        return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)

    def __init__(self, a, b):
        self.a, self.b = a, b

    def __tensor_flatten__(self):
        return ["a", "b"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return Pair(parts["a"], parts["b"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default, function
        return Pair(args[0].a, args[0].b)


def test_parameters_that_consist_of_other_tensors_stay_parameters(stage):
    a, b = torch.randn(3), torch.randn(3)
    state = {
        "trained": torch.nn.Parameter(Pair(a, b)),
        "frozen": torch.nn.Parameter(Pair(a, b), requires_grad=False),
        "a": a,
    }
    staged = stage(state)
    for name in ("trained", "frozen"):
        assert type(staged[name]) is Pair
        assert isinstance(staged[name], torch.nn.Parameter)
        assert staged[name].requires_grad == (name == "trained")
        assert torch.equal(staged[name].b, b)
        assert storage_of(staged[name].a) == storage_of(staged["a"])
    b.zero_()
    assert torch.any(staged["trained"].b != 0)


# ---- Distributed tensors ----


@pytest.fixture(scope="module")
def process_group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_distributed_tensor_keeps_its_placement_and_values(process_group, stage):
    from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard

    mesh = DeviceMesh("cpu", [0])
    local = torch.randn(3, 3)
    state = {
        "sharded": (DTensor.from_local(local.clone(), mesh, [Shard(0)]) + 1) * 2,
        "replicated": DTensor.from_local(torch.randn(2), mesh, [Replicate()]),
    }
    expected = {name: tensor.to_local().clone() for name, tensor in state.items()}
    staged = stage(state)
    for name, tensor in state.items():
        result = staged[name]
        assert type(result) is DTensor
        assert result._spec == tensor._spec
        assert result.size() == tensor.size()
        assert result.device_mesh == mesh
        tensor.to_local().zero_()
        assert torch.equal(result.to_local(), expected[name]), name
    assert torch.equal(expected["sharded"], (local + 1) * 2)


def test_a_sharded_tensor_keeps_its_shards(process_group, stage):
    from torch.distributed._shard import sharded_tensor

    local = torch.arange(32.0).reshape(4, 8)
    metadata = sharded_tensor.ShardMetadata(
        shard_offsets=[0, 0], shard_sizes=[4, 8], placement="rank:0/cpu"
    )
    shard = sharded_tensor.Shard(tensor=local, metadata=metadata)
    sharded = sharded_tensor.init_from_local_shards([shard], 4, 8)
    expected = local.clone()
    staged = stage({"sharded": sharded})["sharded"]
    local.zero_()
    assert type(staged) is sharded_tensor.ShardedTensor
    assert staged.metadata() == sharded.metadata()
    (result,) = staged.local_shards()
    assert torch.equal(result.tensor, expected)
    assert result.metadata == metadata
