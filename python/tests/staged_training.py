"""A training job that saves through other people's checkpointers, staging with ours.

    staged_training.py CALLER DIRECTORY [FIFO]

Goes on from the newest whole checkpoint in the directory. With a FIFO the second save stops in the
middle of its write, says so there, and waits to be killed.
"""

from __future__ import annotations

import functools
import io
import sys
import threading
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._experimental import (
    AsyncCheckpointer,
    CheckpointReader,
    CheckpointWriter,
    CheckpointWriterConfig,
    RankInfo,
)
from torch.distributed.checkpoint._experimental.checkpoint_process import (
    CheckpointProcess,
    CheckpointProcessConfig,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from strandline.torch import CheckpointStagerConfig, DefaultStager

STEPS = 12
SAVE_EVERY = 3
STOPPED_SAVE = 6


class Job:
    """Small, and the same in every process: what differs at the end was lost on the way."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)
        self.train(0)  # The optimizer has its state from the beginning on.

    def train(self, step: int) -> None:
        batch = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        self.optimizer.zero_grad()
        self.model(batch).square().mean().backward()
        self.optimizer.step()

    def state(self, done: int) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": done,
        }

    def load(self, state: dict) -> int:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["done"]


def run(job: Job, caller=None) -> dict:
    """Trains to the end and returns the state there."""
    done = caller.resume(job) if caller is not None else 0
    if caller is not None:
        print("resumed at", done, flush=True)
    while done < STEPS:
        done += 1
        job.train(done)
        if caller is not None and done % SAVE_EVERY == 0:
            caller.save(done, job.state(done))
    if caller is not None:
        caller.close()
    return job.state(done)


def stop_here(fifo: str) -> None:
    with open(fifo, "w") as announced:
        announced.write("in the middle of a write")
    threading.Event().wait()


def make_stager() -> DefaultStager:
    return DefaultStager(CheckpointStagerConfig(use_non_blocking_copy=False))


class Caller:
    """Saves and finds checkpoints; each class is one of the callers."""

    def __init__(self, directory: str, fifo: str | None) -> None:
        self.directory = Path(directory)
        self.fifo = fifo
        self.stager = make_stager()

    def path(self, done: int) -> Path:
        return self.directory / f"step-{done:02}"

    def resume(self, job: Job) -> int:
        for path in sorted(self.directory.glob("step-*"), reverse=True):
            if self.is_whole(path):
                return job.load(self.read(path, job))
        return 0

    def is_whole(self, path: Path) -> bool:
        raise NotImplementedError

    def read(self, path: Path, job: Job) -> dict:
        raise NotImplementedError

    def save(self, done: int, state: dict) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.stager.close()


# ---- torch.distributed.checkpoint._experimental ----


class TornWriter(CheckpointWriter):
    def __init__(self, fifo: str | None, **arguments: object) -> None:
        super().__init__(**arguments)
        self.fifo = fifo

    def write(self, path, state_dict, **kwargs):
        if self.fifo is None or state_dict["done"] != STOPPED_SAVE:
            return super().write(path, state_dict, **kwargs)
        whole = io.BytesIO()
        torch.save(state_dict, whole)
        Path(path).mkdir()
        Path(path, "checkpoint_0.pt").write_bytes(whole.getvalue()[: whole.tell() // 2])
        return stop_here(self.fifo)


def nothing(*arguments: object) -> None:
    pass


class Experimental(Caller):
    def __init__(self, directory: str, fifo: str | None) -> None:
        super().__init__(directory, fifo)
        rank = RankInfo(global_world_size=1, global_rank=0)
        self.checkpointer = AsyncCheckpointer(
            checkpoint_stager=self.stager,
            checkpoint_process=CheckpointProcess(
                rank_info=rank,
                config=CheckpointProcessConfig(),
                subprocess_init_fn=nothing,
                subprocess_init_args=(),
                checkpoint_writer_init_fn=TornWriter,
                checkpoint_writer_init_args={"fifo": fifo, "config": CheckpointWriterConfig()},
            ),
            reader=CheckpointReader(rank_info=rank),
        )
        self.pending = None

    def is_whole(self, path):
        try:
            torch.load(path / "checkpoint_0.pt")
        except Exception:  # Whatever a half of a file is taken for.
            return False
        return True

    def read(self, path, job):
        return self.checkpointer.load(str(path))

    def save(self, done, state):
        self.pending = self.checkpointer.save(str(self.path(done)), state)

    def close(self):
        for future in self.pending or ():
            future.result()
        self.checkpointer.close()


# ---- dcp.async_save ----


class TornStorage(dcp.FileSystemWriter):
    def __init__(self, path: Path, fifo: str | None) -> None:
        super().__init__(path)
        self.fifo = fifo

    def write_data(self, plan, planner):
        written = super().write_data(plan, planner)
        if self.fifo is not None and Path(self.path).name == f"step-{STOPPED_SAVE:02}":
            for file in Path(self.path).glob("*.distcp"):
                with open(file, "r+b") as data:
                    data.truncate(file.stat().st_size // 2)
            stop_here(self.fifo)
        return written


class AsyncSave(Caller):
    def __init__(self, directory: str, fifo: str | None, executor: AsyncCheckpointerType) -> None:
        super().__init__(directory, fifo)
        self.executor = executor
        self.uploaded = None
        if executor is AsyncCheckpointerType.PROCESS:
            torch.distributed.init_process_group(
                "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
            )

    def is_whole(self, path):
        return (path / ".metadata").exists()

    def read(self, path, job):
        state = job.state(0)
        dcp.load(state, checkpoint_id=str(path), no_dist=True)
        return state

    def save(self, done, state):
        self.wait()
        self.uploaded = dcp.async_save(
            state,
            storage_writer=TornStorage(self.path(done), self.fifo),
            async_checkpointer_type=self.executor,
            async_stager=self.stager,
            no_dist=self.executor is AsyncCheckpointerType.THREAD,
        ).upload_completion

    def wait(self):
        if self.uploaded is not None:
            self.uploaded.result()

    def close(self):
        self.wait()
        super().close()
        if self.executor is AsyncCheckpointerType.PROCESS:
            torch.distributed.destroy_process_group()


# ---- torch_checkpointing ----


def stop_torn(fifo: str, arguments) -> None:
    path = Path(arguments.path)
    if path.name != f"step-{STOPPED_SAVE:02}":
        return
    for file in path.glob("*.pt"):
        with open(file, "r+b") as data:
            data.truncate(file.stat().st_size // 2)
    stop_here(fifo)


def mark_whole(arguments) -> None:
    Path(arguments.path, "whole").touch()


class TorchCheckpointing(Caller):
    def __init__(self, directory: str, fifo: str | None) -> None:
        super().__init__(directory, fifo)
        import torch_checkpointing as package
        from torch_checkpointing.checkpoint_process import CheckpointProcess as Process
        from torch_checkpointing.checkpoint_process import CheckpointProcessConfig as Config
        from torch_checkpointing.checkpoint_writer import CheckpointWriterArgs
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        self.package = package
        rank = package.RankInfo(global_rank=0, global_world_size=1, role_rank=0, role_world_size=1)
        writer = CheckpointWriterArgs(
            config=package.CheckpointWriterConfig(barrier_config=None, write_to_temp_dir=False),
            rank_info=rank,
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
            pre_finalize_callback=functools.partial(stop_torn, fifo) if fifo else None,
            finalize_callback=mark_whole,
        )
        self.saver = package.AsyncCheckpointSaver(
            checkpoint_stager=self.stager,
            checkpoint_process=Process(
                rank_info=rank,
                config=Config(),
                subprocess_init_fn=nothing,
                subprocess_init_args=(),
                checkpoint_writer_args=writer,
            ),
        )
        self.pending = None

    def is_whole(self, path):
        return (path / "whole").exists()

    def read(self, path, job):
        return {name: torch.load(path / f"{name}_0.pt") for name in job.state(0)}

    def save(self, done, state):
        checkpoint = checkpoint_of(self.package, state)
        self.pending = self.saver.save(str(self.path(done)), checkpoint)

    def close(self):
        for future in self.pending or ():
            future.result()
        self.saver.close()


def checkpoint_of(package, state: dict):
    class Checkpoint(package.CheckpointBase):
        def get_items(self):
            # A number cannot change behind one's back: it is passed on as it is.
            return {
                name: package.CheckpointItem(value=value, requires_copy=name != "done")
                for name, value in state.items()
            }

        def load_state_dict(self, state_dict):
            state.update(state_dict)

    return Checkpoint()


CALLERS = {
    "experimental": Experimental,
    "async_save_thread": functools.partial(AsyncSave, executor=AsyncCheckpointerType.THREAD),
    "async_save_process": functools.partial(AsyncSave, executor=AsyncCheckpointerType.PROCESS),
    "torch_checkpointing": TorchCheckpointing,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, directory, *fifo = sys.argv[1:]
    run(Job(), CALLERS[name](directory, fifo[0] if fifo else None))
