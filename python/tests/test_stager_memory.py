"""Memory of stagers: it does not grow, and what is held is never staged into."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import random
import uuid
from pathlib import Path

import numpy
import pytest
import torch
from each_stager import (
    STAGERS,
    bytes_reached_by,
    config,
    finish,
    tensors_in,
)
from helpers import assert_same, run_python

import strandline
from strandline.torch import DefaultStager, StateDictStager

STAGES = 500
# What a stage may leave behind: less than any tensor worth staging.
GROWTH_MAX_BYTES = 64 << 10


# ---- What stays the same over many stages ----

_MEASURE = """
import json, os, sys, torch
from each_stager import STAGERS, finish

torch.set_num_threads(1)  # More would wait for each other where cores are few.
EVERY = 20  # Reading the list of mappings takes longer than a stage.

def now():
    with open("/proc/self/statm") as statm, open("/proc/self/maps") as maps:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return resident, len(os.listdir("/proc/self/fd")), sum(1 for _ in maps)

def report_of(samples):
    # What the first hundred stages set up is no growth. The growth of a stage is the slope of a
    # line through the samples.
    resident, descriptors, mappings = zip(*samples[100 // EVERY :])
    n = len(resident)
    middle = (n - 1) / 2, sum(resident) / n
    rise = sum((i - middle[0]) * (y - middle[1]) for i, y in enumerate(resident))
    slope = rise / sum((i - middle[0]) ** 2 for i in range(n))
    return [slope / EVERY, sorted(set(descriptors)), sorted(set(mappings))]
"""

_STAGE_OFTEN = (
    _MEASURE
    + """
base = torch.randn(1 << 17)
state = {f"w{i}": torch.randn(1 + 370 * i) for i in range(30)}
state |= {"base": base, "views": [base[i : i + 50] for i in range(10)]}
report = {}
for name, make in STAGERS.items():
    stager = make()
    samples = []
    for i in range(int(sys.argv[1])):
        base.add_(1)
        result = finish(stager.stage(state))
        assert torch.equal(result["views"][7], base[7:57])
        if i % 3 == 0:
            del result  # Otherwise two generations are there at the next stage.
        if i % EVERY == 0:
            samples.append(now())
    report[name] = report_of(samples)
    stager.close()
print(json.dumps(report))
"""
)


def test_five_hundred_stages_leave_memory_descriptors_and_mappings_as_they_were():
    done = run_python(_STAGE_OFTEN, STAGES, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() == STAGERS.keys()
    for name, (growth, descriptors, mappings) in report.items():
        assert growth < GROWTH_MAX_BYTES, name
        assert len(descriptors) == 1, f"{name}: {descriptors} descriptors"
        assert mappings[-1] - mappings[0] <= 2, f"{name}: {mappings} mappings"


_SEND_OFTEN = (
    _MEASURE
    + """
import torch.multiprocessing as mp

def receive(requests, answers):
    i = 0
    while (state := requests.get()) is not None:
        total = float(state["w"].sum())
        del state
        answers.put((total, now() if i % EVERY == 0 else None))
        i += 1

if __name__ == "__main__":
    spawn = mp.get_context("spawn")
    requests, answers = spawn.SimpleQueue(), spawn.SimpleQueue()
    child = spawn.Process(target=receive, args=(requests, answers))
    child.start()
    stager = STAGERS["DefaultStager-shared"]()
    source = {"w": torch.zeros(1 << 14), "others": [torch.ones(5) for _ in range(20)]}
    here, there = [], []
    for i in range(int(sys.argv[1])):
        source["w"].fill_(i)
        result = stager.stage(source)
        requests.put(result)
        del result
        total, sample = answers.get()
        assert total == i * (1 << 14), (total, i)
        if sample is not None:
            here.append(now())
            there.append(sample)
    requests.put(None)
    child.join()
    print(json.dumps({"here": report_of(here), "there": report_of(there)}))
"""
)


def test_five_hundred_results_sent_to_a_process_leave_both_as_they_were(tmp_path):
    script = tmp_path / "send_often.py"  # A child must be able to import what it is to run.
    script.write_text(_SEND_OFTEN)
    code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = run_python(code, script, STAGES, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    for name, (growth, descriptors, mappings) in json.loads(done.stdout).items():
        assert growth < GROWTH_MAX_BYTES, name
        assert descriptors[-1] - descriptors[0] <= 1, f"{name}: {descriptors} descriptors"
        assert mappings[-1] - mappings[0] <= 2, f"{name}: {mappings} mappings"


# ---- Generations ----

# What may be all that is left of a result.
HOLDERS = {
    "the result": lambda result: result,
    "a tensor": lambda result: result["w"],
    "a view": lambda result: result["w"][10:20],
    "a detached tensor": lambda result: result["w"].detach(),
    "its data": lambda result: result["w"].data,
    "a parameter of it": lambda result: torch.nn.Parameter(result["w"]),
    "an expanded view": lambda result: result["w"][:1].expand(100),
    "another type of view": lambda result: result["w"].view(torch.int32),
    "the storage": lambda result: result["w"].untyped_storage(),
    "an array": lambda result: result["w"].numpy(),
    "a part of an array": lambda result: result["w"].numpy()[3:5],
    "a buffer of an array": lambda result: memoryview(result["w"].numpy()),
    "an array by DLPack": lambda result: numpy.from_dlpack(result["w"]),
    "a tensor by DLPack": lambda result: torch.from_dlpack(result["w"]),
    "what a graph saved": lambda result: torch.ones(1, requires_grad=True) * result["w"],
    "a tensor of a container": lambda result: result["more"][0],
}


def values_of(holder):
    """What a holder shows, of the tensors whose storage it holds."""
    if isinstance(holder, dict):
        return {path: tensor.tolist() for path, tensor in tensors_in(holder)}
    if isinstance(holder, torch.UntypedStorage):
        return bytes(holder)
    if isinstance(holder, torch.Tensor) and holder.grad_fn is not None:
        return holder.grad_fn._saved_other.tolist()
    return holder.tolist()


@pytest.mark.parametrize("name", STAGERS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_what_is_held_is_never_staged_into_and_what_is_not_is_used_again(name, holder):
    stager = STAGERS[name]()
    source = {"w": torch.arange(1000.0), "more": [torch.full((300,), 0.5)]}
    result = finish(stager.stage(source))
    addresses = {t.data_ptr() for _, t in tensors_in(result)}
    held = HOLDERS[holder](result)
    expected = values_of(held)
    del result
    gc.collect(0)
    for i in range(4):
        for _, tensor in tensors_in(source):
            tensor.fill_(-i)
        other = finish(stager.stage(source))
        assert addresses.isdisjoint(t.data_ptr() for _, t in tensors_in(other)), i
        del other
        assert values_of(held) == expected, i
    del held
    gc.collect(0)
    # Once for what was dropped last, once for what was dropped first.
    kept = [finish(stager.stage(source)) for _ in range(3)]
    assert addresses & {t.data_ptr() for result in kept for _, t in tensors_in(result)}
    stager.close()
    for result in kept:
        assert_same(source, result)


@pytest.mark.parametrize("name", STAGERS)
def test_results_held_at_once_lie_apart_and_outlive_the_stager(name):
    rng = random.Random(name)
    stager = STAGERS[name]()
    held = []
    for step in range(200):
        source = {i: torch.full((rng.randint(1, 3000),), step * 10.0 + i) for i in range(4)}
        held.append((source, finish(stager.stage(source))))
        while len(held) > rng.randint(1, 8):
            held.pop(rng.randrange(len(held)))
    reached = sorted(
        (bytes_reached_by(t).start, bytes_reached_by(t).stop)
        for _, result in held
        for _, t in tensors_in(result)
    )
    for (_, end), (begin, _) in itertools.pairwise(reached):
        assert end <= begin
    stager.close()
    del stager
    for source, result in held:
        assert_same(source, result)


# ---- The ceiling ----

MIB = 1 << 20


@pytest.mark.parametrize("shared", [False, True])
def test_a_state_that_does_not_fit_beside_what_is_held_names_all_three(shared):
    with DefaultStager(
        config(use_async_staging=False, use_shared_memory=shared, host_bytes_max=10 * MIB)
    ) as stager:
        with pytest.raises(MemoryError) as too_large:
            stager.stage({"w": torch.empty(12 * MIB, dtype=torch.uint8)})
        assert isinstance(too_large.value, strandline.MemoryLimitError)
        held = stager.stage({"w": torch.ones(6 * MIB, dtype=torch.uint8)})
        with pytest.raises(strandline.MemoryLimitError) as beside:
            stager.stage({"w": torch.empty(5 * MIB, dtype=torch.uint8)})
        for figure in ("5", "10", "6"):
            assert figure in str(beside.value), figure
        assert torch.all(held["w"] == 1)
        del held
        again = stager.stage({"w": torch.full((5 * MIB,), 2, dtype=torch.uint8)})
        assert torch.all(again["w"] == 2)


def test_a_state_that_does_not_fit_fails_the_future_and_the_next_works():
    with DefaultStager(config(host_bytes_max=1 * MIB)) as stager:
        failed = stager.stage({"w": torch.empty(2 * MIB, dtype=torch.uint8)})
        assert isinstance(failed.exception(60), strandline.MemoryLimitError)
        assert torch.all(finish(stager.stage({"w": torch.ones(1000)}))["w"] == 1)


_IN_A_CGROUP = """
import sys, torch, strandline
from each_stager import config, DefaultStager, StateDictStager
MIB = 1 << 20
shared = sys.argv[1] == "shared"
source = torch.ones(240 * MIB, dtype=torch.uint8)
stager = StateDictStager(share_memory=shared)
try:
    stager.stage({"w": source})
    print("staged")
except strandline.MemoryLimitError as error:
    print("refused", error)
print(int(stager.stage({"w": source[: 8 * MIB]})["w"].sum()))
"""


@contextlib.contextmanager
def memory_cgroup(bytes_max):
    """A group of processes that may take so much memory, as a folder; None where it cannot be."""
    root = Path("/sys/fs/cgroup")
    version_1 = root / "memory"
    group = (version_1 if version_1.is_dir() else root) / f"strandline-test-{uuid.uuid4()}"
    limit = "memory.limit_in_bytes" if version_1.is_dir() else "memory.max"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        try:
            (group / limit).write_text(str(bytes_max))
        except OSError:
            yield None
        else:
            yield group
    finally:
        group.rmdir()


@pytest.mark.parametrize("memory", ["private", "shared"])
def test_a_state_that_the_hosts_memory_group_does_not_hold_is_refused_in_time(memory):
    with memory_cgroup(768 * MIB) as group:
        if group is None:
            pytest.skip("may not make a memory cgroup here; the ceiling is tested above")
        join = ("bash", "-c", f'echo $$ >"{group}/cgroup.procs" && exec "$@"', "join")
        done = run_python(_IN_A_CGROUP, memory, prefix=join, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr  # Not killed for the memory it took.
    refused, small = done.stdout.splitlines()
    assert refused.startswith("refused")
    assert int(small) == 8 * MIB


def test_nothing_stays_in_shared_memory_files():
    before = set(os.listdir("/dev/shm"))
    stager = StateDictStager(share_memory=True)
    result = stager.stage({f"t{i}": torch.ones(1000) for i in range(100)})
    assert result["t3"].is_shared()
    assert set(os.listdir("/dev/shm")) <= before
