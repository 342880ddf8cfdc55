"""Bad input: one clear error that names the culprit and the remedy; nothing lost, and on it goes.

The first half gives bad arguments or a hostile environment to save(), the second half bad files to
load() and restore(). Every test ends with `assert_unharmed`: what was committed before is intact,
and the next save commits.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from helpers import package_environment, run_python

import strandline

GOOD = {"model": {"w": torch.arange(1000.0), "b": torch.ones(3)}, "epoch": 7}


def assert_same_as_good(loaded):
    assert torch.equal(loaded["model"]["w"], GOOD["model"]["w"])
    assert torch.equal(loaded["model"]["b"], GOOD["model"]["b"])
    assert loaded["epoch"] == 7


def assert_unharmed(checkpointer, good_step=1, next_step=90):
    """What was committed before is intact, and the next save commits."""
    assert_same_as_good(strandline.load(checkpointer.path, step=good_step))
    assert checkpointer.save(next_step, GOOD).wait_durable(60) == "committed"
    assert_same_as_good(strandline.load(checkpointer.path, step=next_step))
    assert not [name for name in os.listdir(checkpointer.path) if "partial" in name]


@pytest.fixture
def steps(tmp_path):
    """A Checkpointer with a good step 1."""
    with strandline.Checkpointer(tmp_path / "steps", host_bytes_max=64 << 20) as checkpointer:
        checkpointer.save(1, GOOD).wait_durable(60)
        yield checkpointer


# ---- Saving ----


def freed_tensor():
    tensor = torch.zeros(100)
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk_tensor():
    tensor = torch.zeros(100)
    tensor.untyped_storage().resize_(40)
    return tensor


# Every kind that is refused, with its remedy, is in test_tensors.py and test_plain_values.py.
@pytest.mark.parametrize(
    ("make", "error", "remedy"),
    [
        (object, strandline.UnsupportedError, "allow_pickle"),
        (lambda: {1, 2}, strandline.UnsupportedError, "sorted(value)"),
        (lambda: torch.eye(3).to_sparse(), strandline.UnsupportedError, "to_dense"),
        (lambda: torch.zeros(2, device="meta"), strandline.UnsupportedError, "to_empty"),
        (lambda: numpy.array([object()]), strandline.UnsupportedError, "tolist()"),
        (lambda: numpy.zeros(2, dtype=">f4"), strandline.UnsupportedError, "newbyteorder"),
        (freed_tensor, strandline.InvalidArgumentError, "make it again"),
        (shrunk_tensor, strandline.InvalidArgumentError, "make it again"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_of_it_is_saved(steps, make, error, remedy):
    state = {"model": {"w": torch.zeros(2), "layers": [torch.zeros(2), make()]}}
    with pytest.raises(error) as caught:
        steps.save(2, state)
    assert caught.value.key_path == "model.layers.1"
    assert "model.layers.1" in str(caught.value)
    assert remedy in str(caught.value)
    assert steps.steps() == [1]
    assert steps.failures == []
    state["model"]["layers"].pop()
    steps.save(2, state).wait_durable(60)  # The step is not taken.
    assert_unharmed(steps)


def test_a_committed_step_is_refused_and_kept(steps):
    with pytest.raises(strandline.AlreadyExistsError) as caught:
        steps.save(1, {"epoch": 8})
    assert isinstance(caught.value, FileExistsError)
    assert caught.value.path == os.path.join(steps.path, "step-00000001")
    assert caught.value.path in str(caught.value)
    assert "step 1 is committed already" in str(caught.value)
    assert "overwrite" in str(caught.value)
    assert_unharmed(steps)


WRITER = """
import sys, torch, strandline
checkpointer = strandline.Checkpointer(sys.argv[1])
checkpointer.save(2, {"n": 2}).wait_durable(60)
print("writing", flush=True)
sys.stdin.read()
"""


def test_a_second_writer_is_told_who_the_first_is_and_writes_after_it(tmp_path):
    directory = tmp_path / "steps"
    with strandline.Checkpointer(directory) as checkpointer:
        checkpointer.save(1, GOOD)
    first = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory)],
        env=package_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline() == "writing\n"
        with strandline.Checkpointer(directory) as second:
            with pytest.raises(strandline.UnavailableError) as caught:
                second.save(3, GOOD)
            assert str(first.pid) in str(caught.value)
            assert os.uname().nodename in str(caught.value)
            assert "<string>:3" in str(caught.value)  # Where it was opened.
            assert caught.value.path.startswith(str(directory))
            assert second.steps() == [1, 2]
            first.send_signal(signal.SIGKILL)  # Its lock dies with it.
            first.wait(60)
            assert_unharmed(second)
    finally:
        first.kill()
        first.communicate()


UNPRIVILEGED = """
import os, sys, torch, strandline
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
closed, open_ = sys.argv[1:]
refused = 0
for call in (
    lambda: strandline.Checkpointer(closed).save(2, {"n": 2}),
    lambda: strandline.Checkpointer(closed + "/below").save(2, {"n": 2}),
    lambda: strandline.save(closed + "/one", {"n": 2}),
):
    try:
        call()
    except strandline.IoError as error:
        assert isinstance(error, OSError) and error.errno == 13, (error, error.errno)
        assert error.path.startswith(closed) and error.path in str(error), (error, error.path)
        assert "permission" in str(error).lower(), error
        refused += 1
assert strandline.load(closed)["epoch"] == 7  # Reading needs no right to write.
with strandline.Checkpointer(closed) as checkpointer:
    job = {"model": {"w": torch.zeros(1000), "b": torch.zeros(3)}, "epoch": 0}
    assert checkpointer.restore(job) == 1 and job["epoch"] == 7
with strandline.Checkpointer(open_) as checkpointer:
    assert checkpointer.save(2, {"n": 2}).wait_durable(60) == "committed"
print(refused)
"""


def test_a_directory_that_is_not_writable_is_named_and_can_be_read(tmp_path, steps):
    closed = Path(steps.path)
    open_ = tmp_path / "open"
    open_.mkdir()
    os.chmod(open_, 0o777)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        os.chmod(parent, 0o755)
    for file in closed.rglob("*"):
        os.chmod(file, 0o555 if file.is_dir() else 0o444)
    os.chmod(closed, 0o555)
    done = run_python(UNPRIVILEGED, closed, open_)
    assert (done.stdout, done.returncode) == ("3\n", 0), done.stderr
    os.chmod(closed, 0o755)
    assert_unharmed(steps)


FULL_DISK = """
import errno, os, subprocess, sys, warnings, torch, strandline
root = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "strandline-test", root], check=True)
good = {"w": torch.arange(500_000.0)}  # 2 MB of the 8.
bad = {"w": torch.zeros(3_000_000)}

def refused(call):
    try:
        call()
    except strandline.IoError as error:
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC, (error, error.errno)
        assert error.path.startswith(root) and error.path in str(error), (error, error.path)
        assert "space" in str(error), error
        return
    raise AssertionError("not refused")

strandline.save(root + "/one", good)
refused(lambda: strandline.save(root + "/one", bad))
assert os.listdir(root) == ["one"], os.listdir(root)
assert torch.equal(strandline.load(root + "/one")["w"], good["w"])

checkpointer = strandline.Checkpointer(root + "/steps", keep=1)
assert checkpointer.save(1, good).wait_durable(60) == "committed"
refused(lambda: checkpointer.save(2, bad).wait_durable())  # Whichever notices first.
assert checkpointer.steps() == [1]
assert torch.equal(strandline.load(root + "/steps")["w"], good["w"])
checkpointer.save(3, good)
checkpointer.close()  # What was raised is not raised again.
assert sorted(os.listdir(root + "/steps")) == [".lock", "step-00000003"]
print("survived")
"""


def test_a_full_disk_is_named_and_the_last_checkpoint_survives(tmp_path):
    namespace = ["unshare", "--mount", "--propagation", "private"]
    try:
        usable = subprocess.run(
            [*namespace, "mount", "-t", "tmpfs", "-o", "size=8m", "probe", str(tmp_path)],
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("needs the programs unshare and mount")
    if usable.returncode != 0:
        pytest.skip(f"may not mount a small disk: {usable.stderr.decode().strip()}")
    done = run_python(FULL_DISK, tmp_path, prefix=namespace)
    assert (done.stdout, done.stderr) == ("survived\n", "")


def test_a_state_above_the_ceiling_streams_in_waves_and_says_so(tmp_path):
    large = {"w": torch.rand(2_000_000)}  # 8 MB.
    with strandline.Checkpointer(tmp_path, host_bytes_max=2 << 20) as checkpointer:
        checkpointer.save(1, GOOD).wait_durable(60)
        with pytest.warns(strandline.StrandlineWarning) as caught:
            save = checkpointer.save(2, large)
        assert "host_bytes_max (2097152 bytes)" in str(caught[0].message)
        assert re.search(r"streamed in \d+ waves", str(caught[0].message))
        assert save.wait_durable(60) == "committed"
        assert checkpointer.host_bytes_mapped <= 2 << 20
        assert torch.equal(strandline.load(tmp_path, keys="w"), large["w"])
        assert_unharmed(checkpointer)


def test_a_ceiling_that_is_too_small_for_waves_is_named_with_what_would_do(tmp_path):
    with strandline.Checkpointer(tmp_path, host_bytes_max=64 << 10) as checkpointer:
        checkpointer.save(1, GOOD).wait_durable(60)
        with pytest.raises(strandline.MemoryLimitError) as caught:
            checkpointer.save(2, {"w": torch.zeros(100_000)})
        assert isinstance(caught.value, MemoryError)
        assert re.search(r"raise host_bytes_max to \d+ bytes, or save less", str(caught.value))
        assert_unharmed(checkpointer)


# ---- Loading ----


@pytest.fixture
def two_steps(steps):
    """A Checkpointer with the good step 1, and step 2, which each test damages."""
    steps.save(2, {"model": {"w": torch.zeros(1000), "b": torch.zeros(3)}, "epoch": 8})
    steps.wait_until_finished(60)
    return steps


TAKE_ANOTHER = (
    "; take another step, or bring back a copy of this one (`strandline verify` lists the damage)"
)


def assert_step_2_is_refused(checkpointer, error, named, text, *more_calls):
    """Whoever asks for it gets an error that says why and what to do, and nothing is changed."""
    directory = os.path.join(checkpointer.path, "step-00000002")
    job = {"model": {"w": torch.full((1000,), 5.0), "b": torch.full((3,), 5.0)}, "epoch": 5}
    for call in (
        lambda: strandline.load(directory),
        lambda: strandline.load(checkpointer.path, step=2),
        lambda: checkpointer.restore(job, step=2, verify_first=True),
        *more_calls,
    ):
        with pytest.raises(error) as caught:
            call()
        assert named in str(caught.value)
        assert re.search(text, str(caught.value)), str(caught.value)
        assert caught.value.path.startswith(directory)
        if error is strandline.CorruptError:
            assert TAKE_ANOTHER in str(caught.value)
    assert job["epoch"] == 5
    assert (job["model"]["w"] == 5).all()


def assert_passed_over(checkpointer, error, named, text):
    """Step 2 is refused, and who asks for the newest gets step 1 and a warning that says why."""
    assert_step_2_is_refused(checkpointer, error, named, text)
    job = {"model": {"w": torch.full((1000,), 5.0), "b": torch.full((3,), 5.0)}, "epoch": 5}
    for call in (
        lambda: assert_same_as_good(strandline.load(checkpointer.path)),
        lambda: checkpointer.restore(job),
    ):
        with pytest.warns(strandline.StrandlineWarning) as caught:
            call()
        (warning,) = (str(each.message) for each in caught)
        assert warning.startswith("step 2 was skipped: ")
        assert "step-00000002" in warning
        assert named in warning
        assert re.search(text, warning), warning
    assert_same_as_good(job)
    assert_unharmed(checkpointer)


SHARD = "model-00001-of-00001.safetensors"
FILES = [SHARD, "model.safetensors.index.json", "rank-00000.json", "manifest.json"]


def test_these_are_all_files_of_a_step(two_steps):
    assert sorted(os.listdir(os.path.join(two_steps.path, "step-00000002"))) == sorted(FILES)


def cut(content):
    return content[: len(content) // 2]


def empty(content):
    return b""


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, empty, flip])
@pytest.mark.parametrize("name", ["rank-00000.json", "manifest.json", SHARD])
def test_a_file_that_is_truncated_or_has_a_flipped_bit_is_named(two_steps, name, damage):
    file = Path(two_steps.path, "step-00000002", name)
    file.write_bytes(damage(file.read_bytes()))
    assert_passed_over(two_steps, strandline.CorruptError, name, "")


@pytest.mark.parametrize("name", ["rank-00000.json", SHARD])
def test_a_file_that_is_gone_is_named(two_steps, name):
    Path(two_steps.path, "step-00000002", name).unlink()
    assert_passed_over(two_steps, strandline.CorruptError, name, "")


def test_a_flipped_bit_in_a_tensor_is_told_by_the_tensors_name(two_steps):
    file = Path(two_steps.path, "step-00000002", SHARD)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(strandline.CorruptError) as caught:
        strandline.load(file.parent)
    assert caught.value.key_path in ("model.w", "model.b")
    named = f"cannot read tensor '{caught.value.key_path}'"
    assert_passed_over(two_steps, strandline.CorruptError, named, SHARD)


def test_a_step_without_its_manifest_is_refused(two_steps):
    directory = Path(two_steps.path, "step-00000002")
    (directory / "manifest.json").unlink()
    for call in (
        lambda: strandline.load(two_steps.path, step=2),
        lambda: two_steps.restore({"epoch": 5}, step=2),
    ):
        with pytest.raises(strandline.CorruptError) as caught:
            call()
        assert str(directory / "manifest.json") in str(caught.value)
        assert TAKE_ANOTHER in str(caught.value)
    # The directory alone could be anything.
    with pytest.raises(strandline.NotFoundError) as caught:
        strandline.load(directory)
    assert str(directory) in str(caught.value)
    assert "manifest.json; check the path, or bring back a copy" in str(caught.value)
    assert_unharmed(two_steps)


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("name", ["manifest.json", SHARD])
def test_where_no_step_is_usable_each_is_named_and_nothing_begins_anew(two_steps, name, damage):
    for step in (1, 2):
        file = Path(two_steps.path, f"step-{step:08}", name)
        file.write_bytes(damage(file.read_bytes()))
    job = {"model": {"w": torch.full((1000,), 5.0), "b": torch.full((3,), 5.0)}, "epoch": 5}
    for call in (
        lambda: strandline.load(two_steps.path),
        lambda: two_steps.restore(job, default=0),
        lambda: two_steps.restore(job, default=0, verify_first=True),
    ):
        with pytest.raises(strandline.CorruptError) as caught:
            call()
        message = str(caught.value)
        assert f"none of the 2 checkpoints in '{two_steps.path}' can be used" in message
        for step in (1, 2):
            assert f"step {step} was skipped: " in message
            assert f"step-{step:08}/{name}" in message
        assert "; bring back a copy of one, or begin in another directory" in message
        assert caught.value.path == two_steps.path
    assert job["epoch"] == 5


class Digest(ctypes.Structure):
    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


def digest_of(content):
    """XXH3-128, which finds damage and stops nobody who wants to deceive."""
    try:
        function = ctypes.CDLL("libxxhash.so.0").XXH3_128bits
    except OSError:
        pytest.skip("needs libxxhash to forge digests")
    function.restype = Digest
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    digest = function(content, len(content))
    return f"{digest.high:016x}{digest.low:016x}"


def forge_manifest(directory, change):
    """Replaces the text of a manifest; `change` gets and gives it without its last member."""
    file = directory / "manifest.json"
    content, _ = file.read_bytes().rsplit(b',"manifest_digest":"', 1)
    content = change(content)
    file.write_bytes(content + f',"manifest_digest":"{digest_of(content)}"}}\n'.encode())


def replacing(old, new):
    def change(content):
        assert old in content
        return content.replace(old, new)

    return change


def before_the_end(addition):
    """The tree is the last member of the manifest and its root a dict."""

    def change(content):
        assert content.endswith(b"]}")
        return content[:-2] + addition + content[-2:]

    return change


@pytest.mark.parametrize(
    "change",
    [
        replacing(b'"name":"rank-00000.json"', b'"name":"../../rank-00000.json"'),
        replacing(SHARD.encode(), b"/etc/passwd"),
        replacing(b'"step":2,', b'"step":-2,'),
        replacing(b'"step":2,', b'"step":99999999999999999999,'),
        replacing(b'"step":2,', b'"step":2,"step":3,'),
        replacing(b'"shape":[1000]', b'"shape":[-1000]'),
        replacing(b'"shape":[1000]', b'"shape":[4611686018427387904,4]'),
        replacing(b'"shape":[1000]', b'"shape":[1001]'),
        replacing(b'"name":"w"', b'"name":"b"'),
        replacing(b'["b",', b'["w",'),
        replacing(b'"epoch"', b'"\xff\xfe"'),
        replacing(b'"epoch"', b'"epo\x00ch"'),
        before_the_end(b',["deep",' + b'{"list":[' * 70 + b"]}" * 70 + b"]"),
        before_the_end(b',["deep",' + b"[" * 100_000 + b"]" * 100_000 + b"]"),
        lambda content: content[: len(content) // 2],
        lambda content: b"[]",
    ],
    ids=[
        *("traversal", "absolute", "negative_step", "huge_step", "duplicate_member"),
        *("negative_size", "overflowing_size", "another_size", "another_tensor", "duplicate_key"),
        *("not_utf8", "raw_nul", "deep_tree", "deep_json", "cut", "no_object"),
    ],
)
def test_a_hostile_manifest_with_a_valid_digest_is_refused(two_steps, change):
    forge_manifest(Path(two_steps.path, "step-00000002"), change)
    # The manifest itself, or the first file that it does not fit.
    named = r"step-00000002/(manifest\.json|model-00001-of-00001\.safetensors)"
    assert_passed_over(two_steps, strandline.CorruptError, "", named)


def forge_header(directory, change):
    """Replaces the header of the shard and makes the manifest fit."""
    shard = directory / SHARD
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    new = change(header)
    shard.write_bytes(new + data)

    def fit(manifest):
        for old, by in (
            (digest_of(content[: 8 + length]), digest_of(new)),
            (f'"bytes":{len(content)}', f'"bytes":{len(new + data)}'),
        ):
            assert old.encode() in manifest
            manifest = manifest.replace(old.encode(), by.encode())
        return manifest

    forge_manifest(directory, fit)


def with_length(header, length=None):
    return struct.pack("<Q", len(header) if length is None else length) + header


def entries(change):
    """A change of the entries of the header as Python sees them."""

    def change_header(header):
        table = json.loads(header)
        change(table)
        return with_length(json.dumps(table).encode())

    return change_header


def set_range(name, begin, end):
    return entries(lambda table: table[name].update(data_offsets=[begin, end]))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: with_length(header, 2**63 + 5),
        lambda header: with_length(header, 2**40),
        set_range("b", 0, 12),  # Inside of w.
        set_range("w", 0, 2**63),
        set_range("w", -4000, 0),
        entries(lambda table: table["w"].update(shape=[2**62, 4])),
        entries(lambda table: table["w"].update(dtype="F99")),
        entries(lambda table: table.pop("b")),
        lambda header: with_length(header.strip()[:-1] + b"," + header.strip()[1:]),
        lambda header: with_length(header.replace(b'"b"', b'"\xff"')),
        lambda header: with_length(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
        lambda header: with_length(b"null"),
    ],
    ids=[
        *("huge_length", "length_beyond_the_file", "overlap", "overflowing_range"),
        *("negative_range", "overflowing_shape", "unknown_dtype", "gap", "duplicate_name"),
        *("not_utf8", "deep_json", "no_object"),
    ],
)
def test_a_hostile_shard_with_valid_digests_is_refused(two_steps, change):
    forge_header(Path(two_steps.path, "step-00000002"), change)
    assert_passed_over(two_steps, strandline.CorruptError, SHARD, "")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (replacing(b'"major":1', b'"major":2'), "version 2.*a newer one"),
        (replacing(b'"requires":[]', b'"requires":["compression"]'), "'compression'.*a newer one"),
    ],
    ids=["major", "requires"],
)
def test_a_checkpoint_of_a_newer_version_is_told_from_a_damaged_one(two_steps, change, text):
    forge_manifest(Path(two_steps.path, "step-00000002"), change)
    # It is not damaged, so that an older step in its place would be the wrong one.
    assert_step_2_is_refused(
        two_steps,
        strandline.UnsupportedError,
        "step-00000002/manifest.json",
        text,
        lambda: strandline.load(two_steps.path),
        lambda: two_steps.restore({"epoch": 5}),
    )
    assert_unharmed(two_steps)


@pytest.mark.parametrize(
    ("destination", "text"),
    [
        (torch.zeros(999), r"model\.w: saved as F32 \[1000\].*\[999\]"),
        (torch.zeros(1000, dtype=torch.float64), r"model\.w: saved as F32 \[1000\].*F64"),
        (numpy.zeros((1000, 1), dtype="f4"), r"model\.w: saved as F32 \[1000\].*\[1000, 1\]"),
    ],
)
def test_another_shape_or_dtype_is_named_and_nothing_is_changed(steps, destination, text):
    job = {"model": {"w": destination, "b": torch.zeros(3)}, "epoch": 0}
    with pytest.raises(strandline.MismatchError) as caught:
        steps.restore(job)
    assert re.search(text, str(caught.value)), str(caught.value)
    assert (
        "; build the state with the saved shapes and types, or load() those tensors by key"
        in str(caught.value)
    )
    assert caught.value.path == os.path.join(steps.path, "step-00000001")
    assert job["epoch"] == 0
    assert not job["model"]["b"].any()
    assert not destination.any()
    assert_unharmed(steps)


def test_missing_and_unexpected_keys_are_all_listed_and_nothing_is_changed(steps):
    added = {f"new.{i}": torch.zeros(1) for i in range(50)}
    job = {"model": {"b": torch.zeros(3), **added}, "epoch": 0, "extra": 1}
    with pytest.raises(strandline.MismatchError) as caught:
        steps.restore(job)
    for name in ("model.w", "extra", *(f"new.{i}" for i in range(50))):
        assert name in str(caught.value)
    assert "; pass strict=False to leave such names alone" in str(caught.value)
    assert caught.value.path == os.path.join(steps.path, "step-00000001")
    assert job["epoch"] == 0
    assert not job["model"]["b"].any()
    with pytest.warns(strandline.StrandlineWarning):
        assert steps.restore(job, strict=False) == 1
    assert torch.equal(job["model"]["b"], GOOD["model"]["b"])
    assert job["extra"] == 1
    assert_unharmed(steps)


def test_a_key_that_is_not_there_is_named(steps):
    with pytest.raises(strandline.NotFoundError) as caught:
        strandline.load(steps.path, keys="model.weight")
    assert isinstance(caught.value, FileNotFoundError)
    assert "model.weight" in str(caught.value)
    assert caught.value.errno in (None, errno.ENOENT)
    assert_unharmed(steps)
