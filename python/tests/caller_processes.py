"""What runs in the other processes of the tests of PyTorch's checkpointers."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._experimental.checkpoint_writer import (
    CheckpointWriter,
    CheckpointWriterConfig,
)

from strandline.torch import StateDictStager


def expect_parent(name: str, parent: int) -> None:
    """An initialisation that succeeds in a child of `parent` only."""
    if name != "writer" or os.getppid() != parent or os.getpid() == parent:
        raise AssertionError(f"{name}: {os.getpid()} is no child of {parent}")


def refuse(*arguments: object) -> None:
    raise RuntimeError("this initialisation always fails")


def never_end(*arguments: object) -> None:
    threading.Event().wait()


class Writer(CheckpointWriter):
    """PyTorch's writer; what a test asks it by keyword it does first."""

    def write(self, path, state_dict, **kwargs):
        if kwargs.get("mark"):
            tensor = state_dict["shared"]
            assert tensor.is_shared(), "copied on its way"
            assert torch.equal(tensor[0], torch.arange(10.0)), tensor
            tensor[1] = 42.0
        if kwargs.get("count_descriptors"):
            state_dict = {"descriptors": len(os.listdir("/proc/self/fd")), "n": len(state_dict)}
        if announce := kwargs.get("hang"):
            # It holds the state, and will never answer.
            with open(announce, "w") as fifo:
                fifo.write(str(os.getpid()))
            signal.pause()
        return super().write(path, state_dict, **kwargs)


def make_writer(rank_info, **arguments: object) -> Writer:
    return Writer(config=CheckpointWriterConfig(), rank_info=rank_info)


# ---- Replicas: PyTorch exchanges what was staged between two ranks. ----


def simple_state(rank: int) -> dict:
    generator = torch.Generator().manual_seed(42 + rank)
    return {
        "weight": torch.randn(64, 128, generator=generator),
        "bias": torch.randn(64, generator=generator),
        "nested": {"buffer": torch.randn(8, generator=generator)},
        "scalar": torch.tensor(float(rank)),
    }


def assert_simple_state_of(rank: int, state: dict) -> None:
    expected = simple_state(rank)
    assert list(state) == list(expected)
    assert torch.equal(state["weight"], expected["weight"])
    assert torch.equal(state["bias"], expected["bias"])
    assert torch.equal(state["nested"]["buffer"], expected["nested"]["buffer"])
    assert state["scalar"].item() == rank


def replicate(state: dict, directory: str | None = None):
    """What the other rank has sent, and PyTorch's stager that received it."""
    from torch.distributed.checkpoint.staging import _ReplicationStager

    replicas = _ReplicationStager(
        pg=dist.group.WORLD, timeout=timedelta(seconds=60), storage_dir=directory
    )
    stager = StateDictStager(share_memory=True)
    staged = stager.stage(state)
    stager.close()
    received = replicas.stage(staged)
    replicas.close()
    return received, replicas


def replicas_of_plain_states(rank: int, directory: str) -> None:
    received, _ = replicate(simple_state(rank), directory)
    assert_simple_state_of(1 - rank, received)


def replicas_of_distributed_tensors(rank: int, directory: str) -> None:
    from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", [0, 1])
    whole = torch.arange(128.0).reshape(16, 8)
    state = {
        "sharded": distribute_tensor(whole, mesh, [Shard(0)]),
        "replicated": distribute_tensor(torch.full((8, 8), 12.0), mesh, [Replicate()]),
        "scalar": torch.tensor(float(rank)),
    }
    received, _ = replicate(state, directory)
    assert isinstance(received["sharded"], DTensor)
    half = whole.chunk(2)[1 - rank]
    assert torch.equal(received["sharded"].to_local(), half)
    assert received["sharded"].placements == (Shard(0),)
    assert torch.equal(received["replicated"].to_local(), torch.full((8, 8), 12.0))
    assert received["replicated"].placements == (Replicate(),)
    assert received["scalar"].item() == 1 - rank


def replicas_of_sharded_tensors(rank: int, directory: str) -> None:
    from torch.distributed._shard import sharded_tensor

    def shard_of(owner: int) -> torch.Tensor:
        return torch.arange(owner * 32.0, owner * 32.0 + 32).reshape(4, 8)

    metadata = sharded_tensor.ShardMetadata(
        shard_offsets=[4 * rank, 0], shard_sizes=[4, 8], placement=f"rank:{rank}/cpu"
    )
    shard = sharded_tensor.Shard(tensor=shard_of(rank), metadata=metadata)
    state = {"sharded": sharded_tensor.init_from_local_shards([shard], 8, 8)}
    received, _ = replicate(state, directory)
    (other,) = received["sharded"].local_shards()
    assert torch.equal(other.tensor, shard_of(1 - rank))
    assert other.metadata.shard_offsets == [4 * (1 - rank), 0]
    assert other.metadata.shard_sizes == [4, 8]


def replicas_on_disk(rank: int, directory: str) -> None:
    for chosen in (None, str(Path(directory) / "chosen")):
        _, replicas = replicate(simple_state(rank), chosen)
        if chosen is not None:
            assert replicas._storage_dir == chosen
        path = Path(replicas._storage_dir) / f"rank_{rank}_replica_partner_{1 - rank}.pt"
        assert_simple_state_of(1 - rank, torch.load(path))
        assert not Path(f"{path}.tmp").exists()


REPLICAS = {
    check.__name__: check
    for check in (
        replicas_of_plain_states,
        replicas_of_distributed_tensors,
        replicas_of_sharded_tensors,
        replicas_on_disk,
    )
}


def exchange_replicas(rank: int, directory: str) -> None:
    """Runs every check of replicas as one of two ranks; writes down how each ended."""
    os.environ["TMPDIR"] = directory  # For what has no directory of its own.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    for name, check in REPLICAS.items():
        try:
            check(rank, directory)
            outcome = "passed"
        except Exception:
            outcome = traceback.format_exc()
        Path(directory, f"{name}-{rank}").write_text(outcome)
    dist.destroy_process_group()
