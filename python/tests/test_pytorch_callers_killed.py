"""Training that saves through PyTorch's checkpointers with our stagers, killed and resumed."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from each_stager import DEADLINE_S
from helpers import assert_same, package_environment
from staged_training import CALLERS, SAVE_EVERY, STEPS, STOPPED_SAVE, Job, run

SCRIPT = Path(__file__).with_name("staged_training.py")


def start(*arguments):
    """A process that leads a group of its own, so that it is killed with its children."""
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env={**package_environment(), "MASTER_ADDR": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_in_the_middle_of_a_write(caller, directory):
    """Kills the job once the writer has written half of the second checkpoint."""
    fifo = directory / "fifo"
    os.mkfifo(fifo)
    announcement = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    job = start(caller, directory, fifo)
    ended = os.pidfd_open(job.pid)
    try:
        first, _, _ = select.select([announcement, ended], [], [], DEADLINE_S)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        os.close(announcement)
        os.close(ended)
    output, _ = job.communicate()  # Ends when the last process has: all hold the pipe.
    assert first == [announcement], output
    assert job.returncode == -signal.SIGKILL


def kill_and_resume(caller, directory):
    """What was on the disk when the job was killed, and what it said after it was resumed."""
    kill_in_the_middle_of_a_write(caller, directory)
    saved = sorted(path.name for path in directory.glob("step-*"))
    resumed = start(caller, directory)
    output, _ = resumed.communicate(timeout=DEADLINE_S)
    assert resumed.returncode == 0, output
    return saved, output


@pytest.fixture(scope="module")
def jobs(request, tmp_path_factory):
    """Each job that a test wants, two at a time: they spend most of their time on imports."""
    wanted = [
        item.callspec.params["caller"]
        for item in request.session.items
        if item.path == request.node.path
    ]
    if importlib.util.find_spec("torch_checkpointing") is None:
        wanted = [caller for caller in wanted if caller != "torch_checkpointing"]
    directories = {caller: tmp_path_factory.mktemp(caller) for caller in wanted}
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {
            caller: (directory, pool.submit(kill_and_resume, caller, directory))
            for caller, directory in directories.items()
        }


@pytest.mark.parametrize("caller", CALLERS)
def test_a_job_killed_in_the_middle_of_a_write_resumes_as_if_it_had_not_been(caller, jobs):
    if caller not in jobs:
        pytest.skip(f"{caller} is not installed")
    directory, job = jobs[caller]
    saved, output = job.result()
    assert saved == [f"step-{SAVE_EVERY:02}", f"step-{STOPPED_SAVE:02}"]
    assert f"resumed at {SAVE_EVERY}\n" in output
    # What the last save holds is what a job that ran through ends with.
    assert_same(run(Job()), last_checkpoint(caller, directory / f"step-{STEPS:02}"))


def last_checkpoint(caller, path):
    if caller == "experimental":
        return torch.load(path / "checkpoint_0.pt")
    job = Job()
    if caller == "torch_checkpointing":
        return {name: torch.load(path / f"{name}_0.pt") for name in job.state(0)}
    state = job.state(0)
    torch.distributed.checkpoint.load(state, checkpoint_id=str(path), no_dist=True)
    return state
