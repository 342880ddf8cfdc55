"""PyTorch's own checkpointers, with our stagers in place of theirs."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import caller_processes
import pytest
import torch
from each_stager import DEADLINE_S, config, finish
from helpers import assert_same, run_python
from torch.distributed.checkpoint._experimental import (
    AsyncCheckpointer,
    CheckpointerConfig,
    CheckpointReader,
    CheckpointWriter,
    CheckpointWriterConfig,
    RankInfo,
    SyncCheckpointer,
    builder,
)
from torch.distributed.checkpoint._experimental.checkpoint_process import (
    CheckpointProcess,
    CheckpointProcessConfig,
    RequestType,
    WorkerRequest,
    WorkerResponse,
)

from strandline.torch import CheckpointStager, DefaultStager

RANK = RankInfo(global_world_size=1, global_rank=0)


def a_state(epoch=5):
    torch.manual_seed(epoch)
    return {
        "model": torch.nn.Linear(10, 5).state_dict(),
        "optimizer": {"param_groups": [{"lr": 0.01}]},
        "epoch": epoch,
        "step": 1000,
    }


def nested_state():
    return {
        "model": {
            "layer1": {"weight": torch.randn(5, 10), "bias": torch.randn(5)},
            "layer2": {"weight": torch.randn(2, 5), "bias": torch.randn(2)},
        },
        "metadata": {"epoch": 10, "step": 2000},
    }


def overwrite(state):
    """What training does right after a call has returned."""
    for tensor in state["model"].values():
        tensor.fill_(-1)
    state["epoch"] = -1


def staged(state):
    with DefaultStager(config()) as stager:
        return finish(stager.stage(state))


def start_process(init=caller_processes.expect_parent, **options):
    return CheckpointProcess(
        rank_info=RANK,
        config=CheckpointProcessConfig(**options),
        subprocess_init_fn=init,
        subprocess_init_args=("writer", os.getpid()),
        checkpoint_writer_init_fn=caller_processes.make_writer,
        checkpoint_writer_init_args={},
    )


def put_away(process):
    """Ends a process whatever a test has left it like."""
    process.process_creation_future.exception(DEADLINE_S)
    (child,) = process.process.processes
    child.kill()
    child.join()
    process._executor.shutdown()


@pytest.fixture(scope="module")
def started(request):
    """As many writing processes as there are tests that want one: starting takes them seconds."""
    tests = [item for item in request.session.items if item.path == request.node.path]
    own = sum("own_process" in item.fixturenames for item in tests)
    shared = any("process" in item.fixturenames for item in tests)
    processes = [start_process() for _ in range(own + shared)]
    yield iter(processes)
    for process in processes:
        put_away(process)


@pytest.fixture(scope="module")
def process(started):
    """One writing process for all tests that leave it alive."""
    process = next(started)
    process.process_creation_future.result(DEADLINE_S)
    yield process
    process.close()


@pytest.fixture
def own_process(started):
    """A writing process for one test, which may end it."""
    process = next(started)
    process.process_creation_future.result(DEADLINE_S)
    return process


@pytest.fixture(params=[True, False], ids=["async", "sync"])
def stager(request):
    with DefaultStager(config(use_async_staging=request.param)) as stager:
        yield stager


class BesideOthers(AsyncCheckpointer):
    """PyTorch's, over a process that others use too: so it does not close that."""

    def close(self):
        self._checkpoint_stager.close()


@pytest.fixture
def checkpointer(process, stager):
    return BesideOthers(stager, process, CheckpointReader(rank_info=RANK))


class StagedFirst(SyncCheckpointer):
    """PyTorch's, which stages nothing, given what was staged."""

    def save(self, path, state_dict, **kwargs):
        return super().save(path, staged(state_dict), **kwargs)


@pytest.fixture(params=["synchronous", "asynchronous"])
def either(request, process):
    """Both of PyTorch's checkpointers in turn."""
    if request.param == "synchronous":
        writer = CheckpointWriter(config=CheckpointWriterConfig(), rank_info=RANK)
        made = StagedFirst(writer, CheckpointReader(rank_info=RANK))
    else:
        made = BesideOthers(DefaultStager(config()), process, CheckpointReader(rank_info=RANK))
    yield made
    made.close()


def save(checkpointer, path, state, **kwargs):
    """Saves, and waits."""
    for future in checkpointer.save(str(path), state, **kwargs) or ():
        assert future.result(DEADLINE_S) is None


def written(path):
    return torch.load(Path(path) / "checkpoint_0.pt")


# ---- SyncCheckpointer and AsyncCheckpointer ----


def test_a_staged_state_is_saved_and_loaded(either, tmp_path):
    state = a_state()
    save(either, tmp_path, state)
    assert_same(state, either.load(str(tmp_path)))
    assert_same(state, either.load(str(tmp_path), default_map_location="cpu"))


def test_a_part_of_a_staged_state_is_loaded_in_place(either, tmp_path):
    save(either, tmp_path, a_state())
    part = {"model": torch.nn.Linear(10, 5).state_dict(), "epoch": None}
    loaded = either.load(str(tmp_path), state_dict=part)
    assert loaded is part
    assert sorted(loaded) == ["epoch", "model"]
    assert loaded["epoch"] == 5
    assert_same(a_state()["model"], loaded["model"])


def test_a_nested_part_of_a_staged_state_is_loaded(either, tmp_path):
    state = nested_state()
    save(either, tmp_path, state)
    part = {"model": {"layer1": {"weight": None}}, "metadata": {"epoch": None}}
    loaded = either.load(str(tmp_path), state_dict=part)
    weight = state["model"]["layer1"]["weight"]
    assert_same({"model": {"layer1": {"weight": weight}}, "metadata": {"epoch": 10}}, loaded)


def test_keys_missing_from_a_checkpoint_are_an_error_only_when_strict(either, tmp_path):
    save(either, tmp_path, {"model": a_state()["model"]})
    wanted = {"model": torch.nn.Linear(10, 5).state_dict(), "missing_key": None}
    with pytest.raises(RuntimeError, match="missing keys"):
        either.load(str(tmp_path), state_dict=wanted, strict=True)
    assert_same(a_state()["model"], either.load(str(tmp_path), state_dict=wanted)["model"])


def test_the_writers_arguments_do_not_trouble_the_stager(either, tmp_path):
    save(either, tmp_path, a_state(), custom_arg="test_value", another_arg=42)
    assert_same(a_state(), written(tmp_path))


def test_an_asynchronous_save_returns_futures_of_nothing(checkpointer, tmp_path):
    stage_future, write_future = checkpointer.save(str(tmp_path), a_state())
    assert isinstance(stage_future, Future)
    assert isinstance(write_future, Future)
    assert stage_future.result(DEADLINE_S) is None
    assert write_future.result(DEADLINE_S) is None


def test_saves_in_a_row_each_hold_the_state_at_their_call(checkpointer, tmp_path):
    futures = []
    for epoch in range(4):
        state = a_state(epoch)
        futures += checkpointer.save(str(tmp_path / str(epoch)), state)
        overwrite(state)
    for future in futures:
        future.result(DEADLINE_S)
    for epoch in range(4):
        assert_same(a_state(epoch), written(tmp_path / str(epoch)))


def test_a_state_that_cannot_be_staged_fails_both_futures(process, tmp_path):
    with DefaultStager(config()) as stager:
        checkpointer = BesideOthers(stager, process, CheckpointReader(rank_info=RANK))
        uncopyable = {"file": (tmp_path / "file").open("w")}
        stage_future, write_future = checkpointer.save(str(tmp_path / "one"), uncopyable)
        assert isinstance(stage_future.exception(DEADLINE_S), TypeError)
        assert isinstance(write_future.exception(DEADLINE_S), TypeError)
        # PyTorch's checkpointer repeats the failure for ever; stager and process go on.
        another = BesideOthers(stager, process, CheckpointReader(rank_info=RANK))
        save(another, tmp_path / "two", a_state())
        assert_same(a_state(), written(tmp_path / "two"))


def test_a_checkpointer_built_by_pytorch_takes_our_stager(monkeypatch, tmp_path):
    monkeypatch.setattr(builder, "DefaultStager", DefaultStager)
    built_with = CheckpointerConfig()  # PyTorch's own configuration of a stager, too.
    built_with.staging_config.use_non_blocking_copy = False
    made = builder.make_async_checkpointer(config=built_with, rank_info=RANK)
    try:
        assert isinstance(made._checkpoint_stager, CheckpointStager)
        state = a_state()
        futures = made.save(str(tmp_path), state)
        overwrite(state)
        for future in futures:
            future.result(DEADLINE_S)
    finally:
        made.close()
    assert_same(a_state(), builder.make_sync_checkpointer(rank_info=RANK).load(str(tmp_path)))


# ---- CheckpointProcess ----


def test_a_process_writes_what_was_staged(process, tmp_path):
    future = process.write(staged(a_state()), str(tmp_path))
    assert isinstance(future, Future)
    assert future.result(DEADLINE_S) is None
    assert_same(a_state(), written(tmp_path))


def test_a_process_writes_what_a_future_of_a_stager_gives(process, tmp_path):
    state = a_state()
    with DefaultStager(config()) as stager:
        future = stager.stage(state)
        overwrite(state)
        assert process.write(future, str(tmp_path)).result(DEADLINE_S) is None
    assert_same(a_state(), written(tmp_path))


def test_a_process_takes_more_arguments_with_a_staged_state(process, tmp_path):
    future = process.write(staged(a_state()), str(tmp_path), custom_arg="value", another_arg=42)
    future.result(DEADLINE_S)
    assert_same(a_state(), written(tmp_path))


def test_a_process_sees_the_memory_that_was_staged_and_writes_to_it(process, tmp_path):
    state = staged({"shared": torch.arange(10.0).repeat(10, 1), "other": torch.ones(3)})
    address = state["shared"].data_ptr()
    process.write(state, str(tmp_path), mark=True).result(DEADLINE_S)
    assert state["shared"].is_shared()
    assert state["shared"].data_ptr() == address
    assert torch.all(state["shared"][1] == 42.0)
    assert torch.equal(state["shared"][2], torch.arange(10.0))
    assert_same(state, written(tmp_path))


# 80 MiB through a process that may open 64 files, with a /dev/shm of 64 MiB where one can be had.
LIMITED = """
if unshare --mount true 2>/dev/null; then
  exec unshare --mount bash -c 'mount -t tmpfs -o size=64m tmpfs /dev/shm && ulimit -n 64 &&
    exec "$@"' limited "$@"
fi
ulimit -n 64 && exec "$@"
"""


def test_ten_thousand_tensors_reach_a_process_that_may_open_64_files(tmp_path):
    code = """
import sys, torch
from test_pytorch_callers import DEADLINE_S, DefaultStager, config, finish, start_process
if __name__ == "__main__":
    with DefaultStager(config()) as stager:
        state = {f"t{i}": torch.full((2048,), float(i)) for i in range(10_000)}
        process = start_process()
        staged = finish(stager.stage(state))
        process.write(staged, sys.argv[1], count_descriptors=True).result(DEADLINE_S)
        process.close()
"""
    prefix = ("bash", "-c", LIMITED, "limited")
    done = run_python(code, tmp_path, prefix=prefix, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    seen = written(tmp_path)
    assert seen["n"] == 10_000
    assert seen["descriptors"] < 32


def test_a_process_starts_and_ends_when_it_is_told(own_process, tmp_path):
    (child,) = own_process.process.processes
    assert child.is_alive()
    own_process.write(staged(a_state()), str(tmp_path)).result(DEADLINE_S)
    own_process.close()
    assert not child.is_alive()
    assert child.exitcode == 0


def test_a_process_that_does_not_start_in_time_is_an_error():
    process = start_process(init=caller_processes.never_end, subprocess_init_timeout_secs=0)
    with pytest.raises(TimeoutError, match="Timed out"):
        process.process_creation_future.result(DEADLINE_S)
    with pytest.raises(TimeoutError, match="Timed out"):
        process.write(staged(a_state()), "nowhere")
    put_away(process)


def test_a_process_that_cannot_start_is_an_error_at_each_write():
    process = start_process(init=caller_processes.refuse)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="this initialisation always fails"):
            process.write(staged(a_state()), "nowhere")
    process.close()


def hand_over_to_a_writer_that_hangs(process, state, path, fifo):
    """Has the process take a state and never answer. The id of the process, and the Future."""
    os.mkfifo(fifo)
    future = process.write(state, str(path), hang=str(fifo))
    with open(fifo) as announced:
        return int(announced.read()), future


def test_memory_of_a_killed_process_is_staged_into_again(own_process, tmp_path):
    state = {"model": {"w": torch.randn(1 << 16)}, "epoch": 1}
    two_generations = 2 * (1 << 18) + (1 << 17)
    with DefaultStager(config(host_bytes_max=two_generations)) as stager:
        result = finish(stager.stage(state))
        first = result["model"]["w"].data_ptr()
        child, future = hand_over_to_a_writer_that_hangs(
            own_process, result, tmp_path / "one", tmp_path / "fifo"
        )
        del result
        between = finish(stager.stage(state))
        assert between["model"]["w"].data_ptr() != first, "the writer still holds the first"
        os.kill(child, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="terminated unexpectedly"):
            future.result(DEADLINE_S)
        own_process.process.processes[0].join()
        del future  # Its exception has seen the state.
        again = finish(stager.stage(state))
        assert again["model"]["w"].data_ptr() == first
        assert_same(state, again)
        assert_same(state, between)


def test_a_process_that_does_not_end_is_killed(own_process):
    own_process.process.join = lambda timeout=None: False  # As if it had not ended in time.
    own_process.close()
    (child,) = own_process.process.processes
    child.join(DEADLINE_S)
    assert not child.is_alive()


def test_a_process_that_cannot_be_reached_is_an_error(own_process, tmp_path):
    own_process._parent_end.close()
    state = staged(a_state())
    with pytest.raises(RuntimeError, match="Child process terminated unexpectedly"):
        own_process.write(state, str(tmp_path)).result(DEADLINE_S)
    assert_same(a_state(), state)


def test_requests_and_answers_carry_staged_states():
    assert [request.value for request in RequestType] == ["ping", "write_checkpoint", "exit"]
    payload = {"state_dict": staged(a_state())}
    request = WorkerRequest(request_type=RequestType.WRITE_CHECKPOINT, payload=payload)
    received = ForkingPickler.loads(ForkingPickler.dumps(request))
    assert received.request_type is RequestType.WRITE_CHECKPOINT
    assert_same(a_state(), received.payload["state_dict"])
    response = WorkerResponse(RequestType.PING, success=True, payload=payload)
    assert (response.error_msg, response.payload) == (None, payload)


def test_time_limits_of_a_process_are_pytorchs():
    defaults = CheckpointProcessConfig()
    assert defaults.subprocess_init_timeout_secs == 30
    assert defaults.subprocess_shutdown_timeout_secs == 60
    chosen = CheckpointProcessConfig(10, subprocess_shutdown_timeout_secs=30)
    assert chosen.subprocess_init_timeout_secs == 10
    assert chosen.subprocess_shutdown_timeout_secs == 30
