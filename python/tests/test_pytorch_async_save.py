"""PyTorch's dcp.async_save and its replicas, with our stagers in place of theirs."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from caller_processes import REPLICAS, exchange_replicas
from each_stager import DEADLINE_S, config
from helpers import assert_same, run_python
from torch.distributed.checkpoint import _async_process_executor as process_executor
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
)

from strandline.torch import DefaultStager


@pytest.fixture(scope="module")
def process_group():
    """A group of this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")  # Where the executor's process meets itself.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        process_executor._CHECKPOINT_PROCESS = None  # Ends the process, if one was started.
        dist.destroy_process_group()


@pytest.fixture(params=[True, False], ids=["async", "sync"])
def stager(request):
    with DefaultStager(config(use_async_staging=request.param)) as stager:
        yield stager


def a_state(step):
    torch.manual_seed(step)
    whole = torch.randn(64, 32)
    return {"whole": whole, "view": whole[3:5], "tied": whole, "nested": {"b": torch.randn(7)}}


def overwrite(state):
    state["whole"].fill_(-1)
    state["nested"]["b"].fill_(-1)


def upload_of(saved):
    return saved.upload_completion if isinstance(saved, AsyncSaveResponse) else saved


def loaded(path):
    state = {
        "whole": torch.zeros(64, 32),
        "view": torch.zeros(2, 32),
        "tied": torch.zeros(64, 32),
        "nested": {"b": torch.zeros(7)},
    }
    dcp.load(state, checkpoint_id=str(path))
    return state


@pytest.mark.parametrize("executor", list(AsyncCheckpointerType), ids=lambda e: e.value)
def test_the_first_second_and_third_save_each_hold_the_state_at_their_call(
    process_group, stager, executor, tmp_path
):
    uploads = []
    for step in range(3):
        state = a_state(step)
        saved = dcp.async_save(
            state,
            checkpoint_id=str(tmp_path / str(step)),
            async_checkpointer_type=executor,
            async_stager=stager,
        )
        overwrite(state)
        if executor is AsyncCheckpointerType.PROCESS:
            upload_of(saved).result(DEADLINE_S)  # PyTorch's process takes one at a time.
        uploads.append(upload_of(saved))
    for step, upload in enumerate(uploads):
        upload.result(DEADLINE_S)
        assert_same(a_state(step), loaded(tmp_path / str(step)))


def test_async_save_is_told_when_staging_is_done(stager, tmp_path):
    saved = dcp.async_save(
        a_state(1), checkpoint_id=str(tmp_path), async_stager=stager, no_dist=True
    )
    if isinstance(saved, AsyncSaveResponse):
        assert saved.staging_completion.result(DEADLINE_S) is None
    upload_of(saved).result(DEADLINE_S)
    assert isinstance(stager, AsyncStager)
    assert isinstance(stager.should_synchronize_after_execute, bool)
    assert stager.synchronize_staging() is None
    assert_same(a_state(1), loaded(tmp_path))


def test_what_cannot_be_staged_is_never_taken_for_saved(tmp_path):
    state = {"w": torch.ones(3), "file": (tmp_path / "file").open("w")}
    with DefaultStager(config()) as stager:
        saved = dcp.async_save(
            state, checkpoint_id=str(tmp_path / "one"), async_stager=stager, no_dist=True
        )
        assert isinstance(upload_of(saved).exception(DEADLINE_S), TypeError)
        good = dcp.async_save(
            a_state(2), checkpoint_id=str(tmp_path / "two"), async_stager=stager, no_dist=True
        )
        upload_of(good).result(DEADLINE_S)
    assert not (tmp_path / "one" / ".metadata").exists()
    assert_same(a_state(2), loaded(tmp_path / "two"))


def test_saving_again_and_again_does_not_take_more_memory(tmp_path):
    """PyTorch's own test, with a stager that is kept: see also test_stager_memory.py."""
    code = """
import sys, torch, torch.distributed.checkpoint as dcp
from each_stager import DefaultStager, config

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def save(stager, step):
    saved = dcp.async_save(
        {"weights": weights}, checkpoint_id=f"{sys.argv[1]}/{step}", async_stager=stager,
        no_dist=True,
    )
    getattr(saved, "upload_completion", saved).result(60)

weights = torch.randn(4 << 20)  # 16 MiB
with DefaultStager(config(use_async_staging=False)) as stager:
    save(stager, "first")
    before = resident()
    for step in range(10):
        save(stager, step)
    print(resident() - before)
"""
    done = run_python(code, tmp_path, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.2 * (16 << 20)


# ---- Replicas ----


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """Two ranks exchange what they have staged, once for all tests."""
    directory = tmp_path_factory.mktemp("replicas")
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=exchange_replicas, args=(rank, str(directory))) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(2 * DEADLINE_S)
        if rank.is_alive():
            rank.kill()
    return directory


@pytest.mark.parametrize("check", REPLICAS)
def test_staged_states_are_replicated_by_pytorch(replicas, check):
    for rank in range(2):
        assert (replicas / f"{check}-{rank}").read_text() == "passed"
