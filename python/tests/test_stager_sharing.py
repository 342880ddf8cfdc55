"""Staged states that cross to another process: without copies, with one descriptor, for as long as
anybody holds them."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from helpers import package_environment, run_python
from torch.distributed.checkpoint._experimental.checkpoint_process import (
    CheckpointProcess,
    CheckpointProcessConfig,
)
from torch.distributed.checkpoint._experimental.checkpoint_writer import (
    CheckpointWriter,
    CheckpointWriterConfig,
)
from torch.distributed.checkpoint._experimental.types import RankInfo

from strandline.torch import StateDictStager

# How long another process may take for what it is asked; one that imports torch takes seconds.
WAIT_S = 120
TENSORS = 10_000
DESCRIPTORS = 64
MIB = 1 << 20


# ---- The other process ----


def serve(requests: Any, replies: Any, descriptors: int | None) -> None:
    """Holds what it is sent under names, and answers questions about it."""
    if descriptors is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    held: dict[str, Any] = {}
    while True:
        try:
            request = requests.recv()
            if request is None:
                return
            action, name, argument = request
            replies.send(globals()[f"do_{action}"](held, name, argument))
        except EOFError:
            return
        except BaseException as error:
            replies.send(f"{type(error).__name__}: {error}")


def do_hold(held: dict[str, Any], name: str, state: Any) -> Any:
    held[name] = state
    return len(state)


def do_sum(held: dict[str, Any], name: str, key: str) -> float:
    return float(held[name][key].double().sum())


def do_fill(held: dict[str, Any], name: str, what: tuple[str, float]) -> None:
    held[name][what[0]].fill_(what[1])


def do_facts(held: dict[str, Any], name: str, _: None) -> Any:
    state = held[name]
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": Path("/proc/self/maps").read_text().count("/memfd:"),
        "storages": len(storages),
        "shared": all(tensor.is_shared() for tensor in state.values()),
    }


def do_drop(held: dict[str, Any], name: str, _: None) -> None:
    del held[name]
    gc.collect()


def do_pass_back(held: dict[str, Any], name: str, _: None) -> Any:
    return held[name]


def do_restage(held: dict[str, Any], name: str, _: None) -> None:
    held[f"{name} again"] = StateDictStager(share_memory=True).stage(held[name])


class Other:
    """Another process, and the two pipes to it."""

    def __init__(self, descriptors: int | None = None) -> None:
        context = mp.get_context("spawn")
        child_end, self._requests = context.Pipe(duplex=False)
        self._replies, child_replies = context.Pipe(duplex=False)
        self.process = context.Process(
            target=serve, args=(child_end, child_replies, descriptors), daemon=True
        )
        self.process.start()
        child_end.close()
        child_replies.close()

    def ask(self, action: str, name: str = "", argument: Any = None) -> Any:
        self._requests.send((action, name, argument))
        assert self._replies.poll(WAIT_S), "the other process does not answer"
        reply = self._replies.recv()
        assert not (isinstance(reply, str) and "Error" in reply), reply
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.join(WAIT_S)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._requests.send(None)
        self.process.join(WAIT_S)
        assert not self.process.is_alive()


@pytest.fixture
def other() -> Iterator[Other]:
    process = Other()
    yield process
    process.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def shared_stager(**options: Any) -> StateDictStager:
    return StateDictStager(share_memory=True, **options)


# ---- Crossing ----


def test_a_state_crosses_without_a_copy_and_writes_are_seen_both_ways(other):
    staged = shared_stager().stage({"a": torch.arange(1000.0), "b": torch.zeros(3)})
    assert other.ask("hold", "s", staged) == 2
    assert other.ask("sum", "s", "a") == 499500
    other.ask("fill", "s", ("a", 42.0))
    assert (staged["a"] == 42).all()
    staged["b"].fill_(7)
    assert other.ask("sum", "s", "b") == 21


def test_views_and_aliases_stay_so_in_the_other_process(other):
    base = torch.arange(100.0)
    staged = shared_stager().stage({"base": base, "view": base[10:20], "same": base})
    other.ask("hold", "s", staged)
    facts = other.ask("facts", "s")
    assert facts["storages"] == 1
    assert facts["shared"]
    other.ask("fill", "s", ("view", 0.0))
    assert staged["base"].sum() == 4950 - sum(range(10, 20))


def test_one_tensor_alone_crosses_too(other):
    staged = shared_stager().stage({"a": torch.arange(10.0), "b": torch.ones(5)})
    other.ask("hold", "s", {"b": staged["b"]})
    other.ask("hold", "t", {"b": staged["b"][2:]})
    other.ask("fill", "t", ("b", 3.0))
    assert other.ask("sum", "s", "b") == 2 + 9
    assert staged["b"].tolist() == [1, 1, 3, 3, 3]


def test_parameters_and_empty_tensors_cross(other):
    state = {"p": torch.nn.Parameter(torch.ones(4)), "e": torch.empty(0, 3), "s": torch.tensor(5.0)}
    other.ask("hold", "s", shared_stager().stage(state))
    assert other.ask("sum", "s", "p") == 4
    assert other.ask("sum", "s", "e") == 0
    assert other.ask("sum", "s", "s") == 5
    assert other.ask("facts", "s")["shared"]


def test_what_crossed_can_be_sent_on_and_back(other):
    staged = shared_stager().stage({"a": torch.arange(10.0)})
    other.ask("hold", "s", staged)
    back = other.ask("pass_back", "s")
    assert back["a"].data_ptr() == staged["a"].data_ptr()
    third = Other()
    third.ask("hold", "s", back)
    third.ask("fill", "s", ("a", 1.0))
    assert other.ask("sum", "s", "a") == 10
    third.close()


def test_ten_thousand_tensors_cross_with_one_descriptor_each_side():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    process = Other(descriptors=DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(DESCRIPTORS, descriptors() + 8), hard))
    try:
        state = {f"layers.{i}.weight": torch.full((8,), float(i)) for i in range(TENSORS)}
        small = shared_stager().stage({"a": torch.ones(1)})
        process.ask("hold", "small", small)
        before = process.ask("facts", "small")
        own = descriptors()
        stager = shared_stager()
        staged = stager.stage(state)
        assert descriptors() == own + 1
        assert process.ask("hold", "s", staged) == TENSORS
        facts = process.ask("facts", "s")
        assert facts["storages"] == TENSORS
        assert facts["descriptors"] == before["descriptors"] + 1
        assert facts["mappings"] <= before["mappings"] + 2
        assert process.ask("sum", "s", f"layers.{TENSORS - 1}.weight") == 8 * (TENSORS - 1)
        process.ask("fill", "s", ("layers.7.weight", 42.0))
        assert staged["layers.7.weight"].tolist() == [42] * 8
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    process.close()


def test_shared_memory_does_not_come_out_of_dev_shm(other):
    def used() -> int:
        status = os.statvfs("/dev/shm")
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    before = used()
    staged = shared_stager().stage({"a": torch.ones(128 * MIB, dtype=torch.uint8)})
    other.ask("hold", "s", staged)
    assert other.ask("sum", "s", "a") == 128 * MIB
    assert used() - before < 64 * MIB


# ---- Life ----


def test_memory_is_not_used_again_while_the_other_process_holds_it(other):
    stager = shared_stager()
    source = torch.zeros(MIB)
    source.fill_(1)
    staged = stager.stage({"a": source})
    address = staged["a"].data_ptr()
    other.ask("hold", "s", staged)
    del staged
    for i in range(3):
        source.fill_(10 + i)
        assert stager.stage({"a": source})["a"].data_ptr() != address
        assert other.ask("sum", "s", "a") == MIB
    other.ask("drop", "s")
    addresses = {stager.stage({"a": source})["a"].data_ptr() for _ in range(4)}
    assert address in addresses or len(addresses) == 1
    staged = stager.stage({"a": source})
    del staged
    assert stager.stage({"a": torch.zeros(1)})["a"].sum() == 0
    gc.collect()
    assert stager.host_bytes_in_use == 0


def test_what_is_on_its_way_is_kept_although_the_sender_dropped_it():
    stager = shared_stager()
    reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)
    writer.send(stager.stage({"a": torch.full((1000,), 5.0)}))
    gc.collect()
    for i in range(3):
        stager.stage({"a": torch.full((1000,), float(i))})
    received = reader.recv()
    assert received["a"].sum() == 5000


def test_closing_the_stager_or_dropping_it_leaves_what_others_hold(other):
    stager = shared_stager()
    other.ask("hold", "s", stager.stage({"a": torch.ones(1000)}))
    stager.close()
    del stager
    gc.collect()
    shared_stager().stage({"a": torch.zeros(1000)})
    assert other.ask("sum", "s", "a") == 1000


def test_a_killed_child_leaks_nothing():
    stager = shared_stager(host_bytes_max=5 * MIB)
    source = torch.ones(2 * MIB, dtype=torch.uint8)
    process = Other()
    process.ask("hold", "s", stager.stage({"a": source}))
    held = stager.stage({"a": source})
    with pytest.raises(MemoryError):
        stager.stage({"a": source})
    process.kill()
    assert stager.stage({"a": source})["a"].sum() == 2 * MIB
    del held
    before = descriptors()
    for _ in range(3):
        stager.stage({"a": source})
    assert descriptors() == before


PARENT = """
import os, sys
import torch, torch.multiprocessing as mp
from strandline.torch import StateDictStager
sys.path.insert(0, sys.argv[1])
from test_stager_sharing import survive

if __name__ == "__main__":
    staged = StateDictStager(share_memory=True).stage({"a": torch.arange(1000.)})
    context = mp.get_context("spawn")
    attached = context.Event()
    process = context.Process(target=survive, args=(staged, os.getpid(), attached, sys.argv[2]))
    process.start()
    assert attached.wait(120)
    os.kill(os.getpid(), 9)
"""


def survive(state: Any, parent: int, attached: Any, result: str) -> None:
    """Uses a state after its parent was killed, and tells what it found."""
    descriptor = os.pidfd_open(parent)  # Readable once that process has ended.
    attached.set()
    assert select.select([descriptor], [], [], WAIT_S)[0]
    os.close(descriptor)
    total = float(state["a"].sum())
    state["a"].zero_()
    temporary = Path(result + ".tmp")
    temporary.write_text(f"{total} {float(state['a'].sum())}")
    temporary.rename(result)


def test_a_killed_parent_harms_no_child_that_has_attached(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    result = tmp_path / "result"
    done = subprocess.run(
        [sys.executable, script, Path(__file__).parent, result],
        env=package_environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_for_file(result)
    assert result.read_text() == "499500.0 0.0"


def wait_for_file(path: Path) -> None:
    """Until a process that nobody can wait for has written its result."""
    ended = multiprocessing.get_context("spawn").Event()
    for _ in range(WAIT_S * 10):
        if path.exists():
            return
        ended.wait(0.1)
    raise AssertionError(f"{path} did not appear")


def test_the_memory_of_an_ended_process_is_an_error_not_a_crash():
    done = run_python(
        """
import pickle, sys, torch
from multiprocessing.reduction import ForkingPickler
from strandline.torch import StateDictStager
staged = StateDictStager(share_memory=True).stage({"a": torch.ones(3)})
sys.stdout.write(bytes(ForkingPickler.dumps(staged["a"].untyped_storage())).hex())
"""
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(FileNotFoundError):
        pickle.loads(bytes.fromhex(done.stdout))


# ---- PyTorch's own checkpoint process ----


class FillingWriter(CheckpointWriter):
    """Writes into what it was given, which the trainer must see."""

    def write(self, path: str, state_dict: Any, **kwargs: Any) -> None:
        super().write(path, state_dict, **kwargs)
        Path(path, "descriptors").write_text(str(descriptors()))
        state_dict["w"].fill_(42)


def make_writer(rank_info: RankInfo) -> CheckpointWriter:
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    return FillingWriter(CheckpointWriterConfig(), rank_info)


def no_init() -> None:
    pass


def test_pytorchs_checkpoint_process_takes_staged_states(tmp_path):
    process = CheckpointProcess(
        rank_info=RankInfo(global_world_size=1, global_rank=0),
        config=CheckpointProcessConfig(subprocess_init_timeout_secs=WAIT_S),
        subprocess_init_fn=no_init,
        subprocess_init_args=(),
        checkpoint_writer_init_fn=make_writer,
        checkpoint_writer_init_args={},
    )
    state = {"w": torch.arange(10.0), **{f"t{i}": torch.full((4,), i) for i in range(1000)}}
    staged = shared_stager().stage(state)
    process.write(staged, str(tmp_path)).result(WAIT_S)
    assert staged["w"].tolist() == [42] * 10
    process.close()
    loaded = torch.load(tmp_path / "checkpoint_0.pt")
    assert torch.equal(loaded["w"], torch.arange(10.0))
    assert torch.equal(loaded["t999"], torch.full((4,), 999))
    assert int((tmp_path / "descriptors").read_text()) < DESCRIPTORS
