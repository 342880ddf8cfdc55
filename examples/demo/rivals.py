"""Measures what a save costs: Strandline, torch.save and PyTorch's experimental stager.

All three save the same job, in turns: a training step, then one of them saves it, and the next
training step begins when that checkpoint is durable. So all meet the same machine, the same disk
and the same state, and none disturbs another's save. The order rotates from round to round.

Two times are taken for each save, both from the call on:
  blocked   until the trainer may change the state again,
  durable   until a power cut would no longer lose the checkpoint: files and directory are synced.

Strandline's times include its digest of every byte, reading the new checkpoint's headers back, and
removing the oldest; the rivals do none of that.

The rivals run at the best settings that they offer on a CPU: a few rounds before the measurement
try them all, and the quickest is kept. PyTorch's stager has an asynchronous mode, in which the call
returns at once and a Future resolves when the copy is done. Until then the state must not change,
so the blocked time runs until the Future resolves.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint._experimental.staging import (
    CheckpointStagerConfig,
    DefaultStager,
)
from training import FULL, QUICK, Job, build_job, train_step, training_text

import strandline

DURABLE_DEADLINE_S = 60.0


def milliseconds_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def collect(job: Job) -> dict[str, Any]:
    """The state dict of the whole job, which torch.save and the stager want to be given."""
    return {name: part.state_dict() for name, part in job.items()}


def sync(path: Path) -> None:
    """fsync of a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(state: Any, path: Path) -> None:
    """torch.save as it must be done to survive a power cut: never a half-written file in place."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    sync(unfinished)
    unfinished.rename(path)
    sync(path.parent)


class Contender(Protocol):
    """Something that saves a job and says (milliseconds blocked, milliseconds until durable)."""

    name: str
    settings: str

    def save(self, step: int, job: Job) -> tuple[float, float]: ...

    def close(self) -> None: ...


class Strandline:
    name = "Strandline"
    settings = "defaults, keep=2"

    def __init__(self, directory: Path) -> None:
        self._checkpointer = strandline.Checkpointer(directory / "strandline", keep=2)

    def save(self, step: int, job: Job) -> tuple[float, float]:
        start = time.perf_counter()
        save = self._checkpointer.save(step, job)
        blocked = milliseconds_since(start)
        save.wait_durable(DURABLE_DEADLINE_S)
        return blocked, milliseconds_since(start)

    def close(self) -> None:
        self._checkpointer.close()


class TorchSave:
    name = "torch.save + fsync"

    def __init__(self, directory: Path, *, crc32: bool) -> None:
        self.settings = f"crc32={crc32}"
        self._crc32 = crc32
        self._directory = directory / f"torch-save-{crc32}"
        self._directory.mkdir(parents=True)

    def save(self, step: int, job: Job) -> tuple[float, float]:
        torch.serialization.set_crc32_options(self._crc32)
        start = time.perf_counter()
        write_durably(collect(job), self._directory / f"{step}.pt")
        durable = milliseconds_since(start)
        keep_only(self._directory, step)
        return durable, durable  # it is synchronous: the trainer waits for all of it

    def close(self) -> None:
        torch.serialization.set_crc32_options(True)


class PyTorchStager:
    name = "PyTorch stager + torch.save + fsync"

    def __init__(self, directory: Path, *, shared: bool, asynchronous: bool, crc32: bool) -> None:
        self.settings = f"use_shared_memory={shared}, use_async_staging={asynchronous}"
        self._crc32 = crc32
        self._directory = directory / f"stager-{shared}-{asynchronous}"
        self._directory.mkdir(parents=True)
        # Pinned memory and non-blocking copies need an accelerator.
        self._stager = DefaultStager(
            CheckpointStagerConfig(
                use_pinned_memory=False,
                use_shared_memory=shared,
                use_async_staging=asynchronous,
                use_non_blocking_copy=False,
            )
        )
        self._asynchronous = asynchronous

    def save(self, step: int, job: Job) -> tuple[float, float]:
        torch.serialization.set_crc32_options(self._crc32)
        start = time.perf_counter()
        staged: Any = self._stager.stage(collect(job))
        if self._asynchronous:
            staged = staged.result()
        blocked = milliseconds_since(start)
        # In a training job this part would run in a thread; here nothing competes with it.
        write_durably(staged, self._directory / f"{step}.pt")
        durable = milliseconds_since(start)
        keep_only(self._directory, step)
        return blocked, durable

    def close(self) -> None:
        self._stager.close()
        torch.serialization.set_crc32_options(True)


def keep_only(directory: Path, step: int) -> None:
    """Removes older files, outside of the measured time (Strandline does it inside)."""
    for path in directory.glob("*.pt"):
        if path.stem != str(step):
            path.unlink()


@dataclass
class Measured:
    """The times of one contender. Its first save also sets up its buffers, and is kept apart."""

    contender: Contender
    first_ms: tuple[float, float] = (0.0, 0.0)
    blocked_ms: list[float] = field(default_factory=list)
    durable_ms: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        return {
            "name": self.contender.name,
            "settings": self.contender.settings,
            "first_ms": self.first_ms,
            "blocked_ms": self.blocked_ms,
            "durable_ms": self.durable_ms,
        }


def measure(
    contenders: list[Contender], rounds: int, train: Callable[[], int], job: Job
) -> list[Measured]:
    """Lets the contenders save in turns, each once more than the rounds: the first is a warm-up."""
    results = [Measured(contender) for contender in contenders]
    for number in range(rounds + 1):
        turn = number % len(results)
        for result in results[turn:] + results[:turn]:
            blocked, durable = result.contender.save(train(), job)
            if number == 0:
                result.first_ms = (blocked, durable)
            else:
                result.blocked_ms.append(blocked)
                result.durable_ms.append(durable)
    return results


def quickest(tried: list[Measured], key: str) -> int:
    """The index of the one with the smallest median."""
    medians = [statistics.median(getattr(result, key)) for result in tried]
    return medians.index(min(medians))


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures what a save costs.")
    parser.add_argument("--checkpoints", type=Path, required=True, help="where the job comes from")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()

    settings = QUICK if arguments.quick else FULL
    rounds, trial_rounds = (3, 1) if arguments.quick else (9, 3)
    text = training_text()
    job = build_job(settings)
    with strandline.Checkpointer(arguments.checkpoints) as ckpt:
        step = ckpt.restore(job)

    def train() -> int:
        """The job goes on training, so that every save meets a new state."""
        nonlocal step
        train_step(job, text, settings)
        step += 1
        return step

    scratch = arguments.scratch
    crc_settings = [{"crc32": crc32} for crc32 in (True, False)]
    trials: list[Contender] = [TorchSave(scratch / "trial", **each) for each in crc_settings]
    tried = measure(trials, trial_rounds, train, job)
    crc32 = crc_settings[quickest(tried, "durable_ms")]

    stager_settings = [
        {"shared": shared, "asynchronous": asynchronous, **crc32}
        for shared in (False, True)
        for asynchronous in (False, True)
    ]
    stagers: list[Contender] = [
        PyTorchStager(scratch / "trial", **each) for each in stager_settings
    ]
    tried_stagers = measure(stagers, trial_rounds, train, job)
    stager = stager_settings[quickest(tried_stagers, "blocked_ms")]
    for contender in trials + stagers:
        contender.close()
    print(f"    tried {len(tried + tried_stagers)} settings of the rivals; the quickest go on")

    contenders: list[Contender] = [
        Strandline(scratch),
        TorchSave(scratch, **crc32),
        PyTorchStager(scratch, **stager),
    ]
    measured = measure(contenders, rounds, train, job)
    for contender in contenders:
        contender.close()
    shutil.rmtree(scratch)
    arguments.result.write_text(
        json.dumps(
            {
                "rows": [result.row() for result in measured],
                "tried": [result.row() for result in tried + tried_stagers],
            },
            indent=2,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
