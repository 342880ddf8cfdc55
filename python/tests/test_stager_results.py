"""The stagers: how long results live, and how and when they are handed over."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import dataclasses
import functools
import gc
import io
import os
import pickle
import queue
import signal
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same, run_python
from staging_helpers import assert_staged, plain_config, stage, storage_of
from torch.distributed.checkpoint._experimental import staging as original
from torch.distributed.checkpoint.staging import AsyncStager

import strandline
import strandline.torch
from strandline import _core
from strandline.torch import (
    CheckpointStager,
    CheckpointStagerConfig,
    DefaultStager,
    StateDictStager,
    futures,
)

MIB = 1 << 20


# ---- Generations ----


def test_a_result_is_never_overwritten_while_it_or_a_tensor_of_it_is_held():
    stager = StateDictStager()
    source = torch.zeros(1000)
    held = []
    for i in range(5):
        source.fill_(i)
        held.append(stager.stage({"a": source, "b": source[:10]})["b"])
    for i, tensor in enumerate(held):
        assert tensor.tolist() == [i] * 10
    assert len({storage_of(tensor) for tensor in held}) == 5


def test_memory_is_used_again_once_a_result_is_gone():
    stager = StateDictStager()
    source = torch.zeros(MIB)
    addresses = set()
    for i in range(20):
        source.fill_(i)
        staged = stager.stage({"a": source})
        addresses.add(storage_of(staged["a"]))
        assert staged["a"][0] == i
        del staged
    assert len(addresses) == 1
    assert stager.host_bytes_in_use == 0


# What keeps a tensor's memory, and whether its value is still there.
REFERENCES: dict[str, tuple[Any, Any]] = {
    "view": (lambda tensor: tensor[5:].t(), lambda kept: kept[0] == 5),
    "array": (lambda tensor: tensor.numpy()[5:], lambda kept: kept[0] == 5),
    "storage": (
        lambda tensor: tensor.untyped_storage(),
        lambda kept: torch.empty(0).set_(kept)[5] == 5,
    ),
    "iterator": (iter, lambda kept: next(kept) == 0),
    "closure": (lambda tensor: functools.partial(tensor.add, 1), lambda kept: kept()[5] == 6),
}


@pytest.mark.parametrize("last", REFERENCES)
def test_whatever_refers_to_a_tensor_keeps_its_memory(last):
    stager = StateDictStager()
    source = torch.arange(1000.0)
    keep = REFERENCES[last][0](stager.stage({"a": source})["a"])
    gc.collect()
    source.fill_(-1)
    for _ in range(3):
        stager.stage({"a": source})
    assert stager.host_bytes_in_use > 0
    assert REFERENCES[last][1](keep)
    del keep
    gc.collect()
    assert stager.host_bytes_in_use == 0


@pytest.mark.parametrize("how", ["close", "del", "exit"])
def test_results_outlive_their_stager(how):
    stager = StateDictStager()
    staged = stager.stage({"a": torch.arange(5.0)})
    default = DefaultStager(plain_config(use_async_staging=False, use_shared_memory=False))
    other = default.stage({"a": torch.arange(5.0)})
    if how == "close":
        stager.close()
        default.close()
    elif how == "exit":
        with default:
            pass
    del stager, default
    gc.collect()
    for result in (staged, other):
        assert result["a"].tolist() == [0, 1, 2, 3, 4]
        result["a"].add_(1)
        assert result["a"].sum() == 15


@pytest.mark.parametrize("shared", [False, True])
def test_results_pass_through_what_tensors_pass_through(shared):
    source = torch.arange(6.0).reshape(2, 3)
    staged = stage({"a": source, "view": source[1]}, share_memory=shared)
    file = io.BytesIO()
    torch.save(staged, file)
    file.seek(0)
    storage = staged["a"].untyped_storage()
    for other in (
        torch.load(file),
        copy.deepcopy(staged),
        stage(staged),
    ):
        assert_staged(other["a"], source)
        assert storage_of(other["a"]) == storage_of(other["view"]) != storage_of(staged["a"])
        assert not other["a"].is_shared()
    assert_staged(pickle.loads(pickle.dumps(staged))["a"], source)
    copies = [storage.clone(), copy.deepcopy(storage)]
    if shared:  # PyTorch cannot unpickle its own.
        copies.append(pickle.loads(pickle.dumps(storage)))
    for copied in copies:
        assert copied.tolist() == storage.tolist()
        assert type(copied) is torch.UntypedStorage
        assert not copied.is_shared()
    assert_staged(staged["a"].clone(), source)
    assert staged["a"].numpy().tolist() == source.tolist()
    assert staged["a"].is_shared() == shared
    assert storage.is_shared() == shared
    assert staged["a"].share_memory_().is_shared()
    assert_staged(staged["a"], source)


def test_results_may_be_alive_when_the_interpreter_exits():
    done = run_python(
        """
import atexit, torch
from strandline.torch import CheckpointStagerConfig, DefaultStager, StateDictStager
config = CheckpointStagerConfig(False, True, True, False)
default = DefaultStager(config)
kept = StateDictStager(share_memory=True).stage({"a": torch.arange(1000.)})
future = default.stage({"a": torch.arange(1000.)})
def late():
    print(kept["a"].sum().item(), future.result()["a"].sum().item())
    print(DefaultStager(config).stage({"a": torch.ones(3)}).result()["a"].sum().item())
atexit.register(late)
"""
    )
    assert (done.stdout, done.stderr, done.returncode) == ("499500.0 499500.0\n3.0\n", "", 0)


def test_a_state_that_does_not_fit_fails_at_once_and_tells_what_is_held():
    stager = StateDictStager(host_bytes_max=3 * MIB)
    source = torch.zeros(2 * MIB, dtype=torch.uint8)
    held = stager.stage({"w": source})
    with pytest.raises(strandline.MemoryLimitError) as caught:
        stager.stage({"w": source})
    assert str(3 * MIB) in str(caught.value)
    assert str(2 * MIB) in str(caught.value)
    assert isinstance(caught.value, MemoryError)
    del held
    assert stager.stage({"w": source})["w"].sum() == 0


# ---- DefaultStager ----


def test_the_names_arguments_and_defaults_are_pytorchs():
    config, theirs = CheckpointStagerConfig(), original.CheckpointStagerConfig()
    for field in dataclasses.fields(theirs):
        assert getattr(config, field.name) == getattr(theirs, field.name)
    assert CheckpointStagerConfig(True, False, True, False).use_async_staging
    assert issubclass(CheckpointStager, original.CheckpointStager)
    assert issubclass(DefaultStager, CheckpointStager)
    stager = DefaultStager(plain_config())
    assert isinstance(stager, (original.CheckpointStager, CheckpointStager))
    assert isinstance(stager, AsyncStager)
    with pytest.raises(TypeError, match="abstract"):
        CheckpointStager()
    assert StateDictStager(False, True, 5).share_memory
    assert pickle.loads(pickle.dumps(config)) == config
    assert strandline.torch.DefaultStager.__module__ == "strandline.torch"
    assert "DefaultStager" in dir(strandline.torch)
    with pytest.raises(AttributeError):
        strandline.torch.nothing  # noqa: B018


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without accelerator")
def test_without_an_accelerator_non_blocking_copies_are_an_assertion_error():
    with pytest.raises(AssertionError, match="use_non_blocking_copy=False"):
        DefaultStager()
    with pytest.raises(AssertionError):
        DefaultStager(original.CheckpointStagerConfig())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_pinning_without_cuda_warns_and_goes_on():
    with pytest.warns(strandline.StrandlineWarning, match="not pinned") as caught:
        stager = StateDictStager(pin_memory=True)
    assert caught[0].filename == __file__
    assert not stager.pin_memory
    assert not stager.stage({"a": torch.ones(2)})["a"].is_pinned()


def test_synchronous_staging_gives_the_state_and_asynchronous_a_future():
    state = {"w": torch.arange(4.0), "step": 7, "nested": {"lr": 0.5}}
    with DefaultStager(plain_config(use_async_staging=False)) as stager:
        staged = stager.stage(state)
        assert type(staged) is dict
        assert_same(staged, state)
    with DefaultStager(original.CheckpointStagerConfig(False, False, True, False)) as stager:
        future = stager.stage(state_dict=state, writer_argument=1, barrier=None)
        assert isinstance(future, concurrent.futures.Future)
        state["w"].zero_()
        assert future.result(60)["w"].tolist() == [0, 1, 2, 3]
        assert future.result()["nested"] == {"lr": 0.5}


def test_the_options_decide_whether_memory_is_shared():
    for shared in (True, False):
        with DefaultStager(plain_config(use_shared_memory=shared)) as stager:
            staged = stager.stage({"w": torch.ones(3)}).result(60)
            assert staged["w"].is_shared() == shared
            assert not staged["w"].is_pinned()


def test_futures_work_with_callbacks_asyncio_and_wait():
    with DefaultStager(plain_config()) as stager:
        called = threading.Event()
        future = stager.stage({"w": torch.ones(3)})
        future.add_done_callback(lambda done: done.result() and called.set())
        assert called.wait(60)
        assert not future.cancel()

        async def staged() -> Any:
            return await asyncio.wrap_future(stager.stage({"w": torch.ones(3)}))

        assert asyncio.run(staged())["w"].sum() == 3
        several = [stager.stage({"w": torch.full((3,), float(i))}) for i in range(5)]
        done, not_done = concurrent.futures.wait(several, timeout=60)
        assert len(done) == 5
        assert not not_done
        assert [future.result()["w"][0].item() for future in several] == [0, 1, 2, 3, 4]


def test_callbacks_never_run_inside_stage():
    # In a callback, or anywhere else, a lock that is held around stage() must not be needed.
    with DefaultStager(plain_config()) as stager:
        inside = threading.Lock()
        ran = []

        def callback(future: Any) -> None:
            with inside:
                ran.append(threading.current_thread())

        with inside:
            future = stager.stage({"w": torch.ones(3)})
        future.add_done_callback(callback)
        future.result(60)
        stager.close()
        assert len(ran) == 1


def test_a_failed_staging_fails_its_future_and_the_next_one_works():
    with DefaultStager(plain_config()) as stager:
        future = stager.stage({"bad": torch.empty(2, device="meta")})
        with pytest.raises(strandline.UnsupportedError):
            future.result(60)
        assert isinstance(future.exception(), TypeError)
        assert stager.get_staged_state_dict() is None
        assert stager.stage({"good": torch.ones(2)}).result(60)["good"].sum() == 2
    with DefaultStager(plain_config(use_async_staging=False)) as stager:
        with pytest.raises(strandline.UnsupportedError):
            stager.stage({"bad": torch.empty(2, device="meta")})
        assert stager.stage({"good": torch.ones(2)})["good"].sum() == 2


@pytest.mark.parametrize("asynchronous", [True, False])
def test_closing_is_idempotent_and_ends_the_stager(asynchronous):
    stager = DefaultStager(plain_config(use_async_staging=asynchronous))
    staged = stager.stage({"w": torch.ones(2)})
    stager.close()
    stager.close()
    with pytest.raises(strandline.UnavailableError, match="closed"):
        stager.stage({"w": torch.ones(2)})
    staged = staged.result(0) if asynchronous else staged
    assert staged["w"].sum() == 2
    plain = StateDictStager()
    plain.close()
    plain.close()
    with pytest.raises(strandline.UnavailableError, match="closed"):
        plain.stage({"w": torch.ones(2)})


def test_a_stager_may_be_closed_from_a_callback():
    stager = DefaultStager(plain_config())
    closed = threading.Event()

    def close(future: Any) -> None:
        stager.close()
        closed.set()

    stager.stage({"w": torch.ones(2)}).add_done_callback(close)
    assert closed.wait(60)


def test_what_distributed_checkpoint_asks_for_is_there():
    with DefaultStager(plain_config()) as stager:
        assert stager.should_synchronize_after_execute is True
        stager.synchronize_staging()
        future = stager.stage({"w": torch.ones(2)})
        stager.synchronize_staging()
        assert future.done()
        stager.stage({"w": torch.ones(2, device="meta")})
        with pytest.raises(strandline.UnsupportedError):
            stager.synchronize_staging()


def test_the_interface_of_torch_checkpointing():
    staging = pytest.importorskip("torch_checkpointing.staging")
    config = staging.CheckpointStagerConfig(use_shared_memory=False)
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        stager = DefaultStager(config, staging_executor=executor)
        assert isinstance(stager, staging.CheckpointStager)
        assert stager.get_staged_state_dict() is None
        state = {"w": torch.ones(2), "live": torch.zeros(2), "step": 3}
        staged = stager.stage(state, ["live", "absent"]).result(60)
        assert staged["live"] is state["live"]
        assert staged["w"] is not state["w"]
        assert sorted(staged) == ["live", "step", "w"]
        assert stager.get_staged_state_dict() is staged
        assert list(state) == ["w", "live", "step"]
        for payload in ([torch.ones(1), 2], torch.ones(3), types.SimpleNamespace(w=torch.ones(1))):
            assert type(stager.stage(payload).result(60)) is type(payload)
        assert stager.pinned_num_bytes() == 0
        stager.close()
        assert stager.get_staged_state_dict() is None
        assert executor.submit(int, "3").result() == 3  # It is the caller's, and still open.
        with pytest.raises(ValueError, match="staging_executor"):
            DefaultStager(plain_config(use_async_staging=False), staging_executor=executor)


def test_what_was_staged_last_frees_its_memory_for_the_next_staging():
    stager = DefaultStager(plain_config(host_bytes_max=3 * MIB, use_shared_memory=False))
    source = torch.zeros(2 * MIB, dtype=torch.uint8)
    for i in range(3):
        source.fill_(i)
        assert stager.stage({"w": source}).result(60)["w"][-1] == i
    stager.close()


# ---- Stagings that go on when stage() has returned, as devices make them ----


class LateQueue:
    """Where the stagings below tell that they have ended."""

    def __init__(self) -> None:
        self._numbers: queue.SimpleQueue[int] = queue.SimpleQueue()

    def push(self, number: int) -> None:
        self._numbers.put(number)

    def wait(self, deadline_s: float) -> list[int]:
        try:
            return [self._numbers.get(timeout=deadline_s)]
        except queue.Empty:
            return []


class LateStaging:
    """A staging that ends when the test says so."""

    def __init__(self, staging: _core.Staging) -> None:
        self._staging = staging
        self._ended = threading.Event()
        self._told: tuple[LateQueue, int] | None = None

    def wait(self, deadline_s: float) -> bool:
        return self._ended.wait(deadline_s)

    def notify(self, told: LateQueue, number: int) -> None:
        self._told = (told, number)

    def result(self) -> _core.Staged:
        return self._staging.result()

    def end(self) -> None:
        self._ended.set()
        if self._told is not None:
            self._told[0].push(self._told[1])


class LateCore:
    """The engine's stager, whose stagings are late."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.stagings: list[LateStaging] = []

    def stage(self, tensors: Any, paths: Any) -> LateStaging:
        self.stagings.append(LateStaging(self._core.stage(tensors, paths)))
        return self.stagings[-1]

    def close(self) -> None:
        self._core.close()


@pytest.fixture
def late(monkeypatch) -> Iterator[tuple[DefaultStager, LateCore]]:
    waiter = futures._Waiter()
    waiter._queue = LateQueue()
    monkeypatch.setattr(futures, "_waiter", waiter)
    stager = DefaultStager(plain_config())
    stager._core = LateCore(stager._core)
    yield stager, stager._core
    stager.close()


def test_a_future_ends_with_its_staging_and_shows_the_state_at_the_call(late):
    stager, core = late
    source = torch.arange(6.0).reshape(2, 3)
    future = stager.stage({"w": source, "t": source.t()})
    later = stager.stage({"w": torch.ones(2)})
    callers = []
    future.add_done_callback(lambda _: callers.append(threading.current_thread().name))
    assert not future.done()
    assert stager.get_staged_state_dict() is None
    source.t_()
    source.set_(torch.zeros(1))
    core.stagings[1].end()
    assert later.result(60)["w"].sum() == 2
    assert not future.done()
    core.stagings[0].end()
    staged = future.result(60)
    assert staged["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert staged["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert storage_of(staged["t"]) == storage_of(staged["w"])
    assert callers == ["strandline-waiter"]


def test_closing_waits_for_what_still_runs(late):
    stager, core = late
    future = stager.stage({"w": torch.ones(2)})
    closer = threading.Thread(target=stager.close)
    closer.start()
    core.stagings[0].end()
    closer.join(60)
    assert not closer.is_alive()
    assert future.done()
    assert future.result()["w"].sum() == 2


def test_a_future_that_nobody_holds_is_resolved_all_the_same(late):
    stager, core = late
    resolved = threading.Event()
    stager.stage({"w": torch.ones(2)}).add_done_callback(lambda _: resolved.set())
    gc.collect()
    core.stagings[0].end()
    assert resolved.wait(60)


# ---- The waiter thread ----


def begun(value: float) -> _core.Staging:
    core = _core.DefaultStager(
        pin_memory=False, share_memory=False, host_bytes_max=None, copy_threads=None
    )
    return core.stage([torch.full((4,), value)], ["w"])


def test_the_waiter_thread_resolves_futures_and_ends():
    release = threading.Event()
    threads = []

    def finish(staging: _core.Staging) -> Any:
        threads.append(threading.current_thread())
        assert futures.on_waiter_thread()
        assert release.wait(60)
        return len(staging.result().memory)

    future = futures.future_of(begun(1), finish)
    later = futures.future_of(begun(2), finish)
    assert not future.done()
    assert not future.cancel()
    release.set()
    assert future.result(60) == later.result(60) == 1
    assert threads[0] is threads[1] is not threading.current_thread()
    assert not threads[0].daemon
    threads[0].join(60)
    assert not threads[0].is_alive()
    assert futures.future_of(begun(3), lambda staging: "again").result(60) == "again"


def test_the_waiter_thread_survives_what_goes_wrong_and_drops_what_it_resolved():
    def fails(staging: _core.Staging) -> Any:
        raise ZeroDivisionError

    class Result:
        pass

    future = futures.future_of(begun(1), fails)
    with pytest.raises(ZeroDivisionError):
        future.result(60)
    result = Result()
    gone = weakref.ref(result)
    seen = futures.future_of(begun(1), lambda staging, made=[result]: made.pop())
    del result
    assert isinstance(seen.result(60), Result)
    del seen
    futures.future_of(begun(2), lambda staging: None).result(60)
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_stagers_of_its_own():
    stager = DefaultStager(plain_config(use_shared_memory=False))
    staged = stager.stage({"w": torch.arange(4.0)}).result(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            assert staged["w"].tolist() == [0, 1, 2, 3]
            try:
                stager.stage({"w": torch.ones(1)}).result(60)
            except strandline.UnavailableError:
                other = DefaultStager(plain_config())
                assert other.stage({"w": torch.ones(3)}).result(60)["w"].sum() == 3
                code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert stager.stage({"w": torch.ones(1)}).result(60)["w"].sum() == 1
    stager.close()


def test_a_forked_child_can_close_a_stager_whose_futures_were_outstanding():
    stager = DefaultStager(plain_config())
    with futures._waiter._lock:  # The waiter thread cannot resolve it.
        future = stager.stage({"w": torch.ones(2)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            signal.alarm(30)
            try:
                stager.close()
            finally:
                os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert future.result(60)["w"].sum() == 2
    stager.close()


def test_other_memory_given_to_a_source_meanwhile_changes_nothing():
    x = torch.full((1000, 1000), 7.0)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            x.data = torch.full((1000, 1000), 7.0)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        with DefaultStager(plain_config()) as stager:
            for _ in range(100):
                assert torch.all(stager.stage({"x": x}).result(60)["x"] == 7)
    finally:
        stop.set()
        swapper.join()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, ValueError])
def test_a_callback_that_raises_ends_neither_the_waiter_nor_later_futures(error):
    def callback(future: Any) -> None:
        raise error("its own")

    with DefaultStager(plain_config()) as stager:
        with futures._waiter._lock:  # So that the callback is there before the future is resolved.
            future = stager.stage({"x": torch.ones(3)})
            future.add_done_callback(callback)
        assert torch.all(future.result(60)["x"] == 1)
        assert torch.all(stager.stage({"x": torch.ones(3)}).result(60)["x"] == 1)


def test_a_callback_may_stage_and_wait_for_what_it_staged():
    seen: queue.Queue[Any] = queue.Queue()

    with DefaultStager(plain_config()) as stager:

        def callback(future: Any) -> None:
            seen.put(futures.on_waiter_thread())
            seen.put(stager.stage({"x": torch.full((3,), 5.0)}).result(30)["x"].tolist())

        with futures._waiter._lock:
            stager.stage({"x": torch.ones(3)}).add_done_callback(callback)
        assert seen.get(timeout=60)
        assert seen.get(timeout=60) == [5, 5, 5]


def test_dropped_results_in_cycles_make_room_when_memory_is_full():
    state: dict[str, Any] = {"x": torch.ones(1 << 18)}
    state["self"] = state
    gc.collect()
    gc.disable()
    try:
        stager = StateDictStager(host_bytes_max=4 << 20)
        for _ in range(20):
            stager.stage(state)
    finally:
        gc.enable()
    stager.close()


def test_private_slots_of_a_subclass_are_copied():
    class Slotted(torch.Tensor):
        __slots__ = ("__secret", "public")

        def keep(self, value: Any) -> None:
            self.__secret = value
            self.public = value

        def kept(self) -> Any:
            return self.__secret, self.public

    x = torch.ones(3).as_subclass(Slotted)
    x.keep([1, 2])
    assert StateDictStager().stage({"x": x})["x"].kept() == ([1, 2], [1, 2])


def test_more_held_results_than_shared_memory_has_places_are_told_as_such():
    stager = StateDictStager(share_memory=True)
    held = [stager.stage({"x": torch.ones(1)}) for _ in range(1023)]
    with pytest.raises(strandline.MemoryLimitError, match="no place left in shared staging memory"):
        stager.stage({"x": torch.ones(1)})
    held.clear()
    stager.stage({"x": torch.ones(1)})
    stager.close()
