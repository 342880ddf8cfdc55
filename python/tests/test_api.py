"""The package's own surface: handles, keys, warnings, progress, options, types."""

from __future__ import annotations

import contextlib
import errno
import re
import resource
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
from helpers import writing_stopped

import strandline


def test_everything_public_is_exported_and_shown_under_the_packages_name():
    for name in strandline.__all__:
        thing = getattr(strandline, name)
        if isinstance(thing, type):
            assert thing.__module__ == "strandline", name
    assert re.fullmatch(r"\d+\.\d+\.\d+", strandline.__version__)
    with pytest.raises(AttributeError):
        _ = strandline.nothing


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("InvalidArgumentError", ValueError),
        ("UnsupportedError", TypeError),
        ("NotFoundError", FileNotFoundError),
        ("AlreadyExistsError", FileExistsError),
        ("MismatchError", RuntimeError),
        ("CorruptError", RuntimeError),
        ("IoError", OSError),
        ("MemoryLimitError", MemoryError),
        ("TimeoutError", TimeoutError),
        ("UnavailableError", RuntimeError),
    ],
)
def test_every_error_is_also_the_builtin_that_python_raises_there(name, builtin):
    error = getattr(strandline, name)("what and why", key_path="a.b", path="/p", errno=5)
    assert isinstance(error, strandline.Error)
    assert isinstance(error, builtin)
    assert str(error) == "what and why"
    assert (error.key_path, error.path, error.errno) == ("a.b", "/p", 5)
    assert getattr(strandline, name)("alone").errno is None


def test_a_save_tells_how_it_went(tmp_path):
    with strandline.Checkpointer(tmp_path) as checkpointer:
        save = checkpointer.save(7, {"w": torch.ones(1000), "n": 1}, metrics={"loss": 0.5})
        save.wait_staged(60)
        assert save.wait_durable(60) == "committed"
        assert save.step == 7
        assert save.outcome == "committed"
        assert save.outcome.cause is None
        assert save.progress.bytes_total == save.progress.bytes_written == 4000
        assert save.progress.bytes_staged == 4000
        assert save.progress.ended
        assert save.timings.blocked_ms > 0
        assert save.timings.durable_ms > 0
        assert save.timings.collect_ms > 0
        assert str(save).startswith("step 7: blocked ")
        assert "\n" not in str(save)
        assert "step 7" in repr(save)
        assert "bytes_total=4000" in repr(save.progress)
        assert "blocked_ms=" in repr(save.timings)
        assert save.warnings == []
        save.cancel()  # Too late: changes nothing.
        assert save.outcome == "committed"
        assert checkpointer.latest_step() == 7
        assert checkpointer.steps() == [7]
        assert checkpointer.failures == []
        assert Path(checkpointer.path) == tmp_path
        assert len(checkpointer.run) == 32
        assert str(tmp_path) in repr(checkpointer)
    checkpointer.close()  # Again does nothing.
    with pytest.raises(strandline.UnavailableError):
        checkpointer.save(8, {"n": 1})


def test_a_save_that_is_cancelled_is_skipped_with_a_cause(tmp_path):
    with strandline.Checkpointer(tmp_path) as checkpointer:
        first = checkpointer.save(1, {"w": torch.ones(30_000_000)})
        second = checkpointer.save(2, {"n": 1})  # Waits behind the first.
        second.cancel()
        outcome = second.wait_durable(60)
        assert first.wait_durable(60) == "committed"
        if outcome == "skipped":
            assert isinstance(outcome.cause, strandline.UnavailableError)
            assert checkpointer.steps() == [1]


def test_a_wait_that_reaches_its_deadline_raises_and_the_save_goes_on(tmp_path):
    with strandline.Checkpointer(tmp_path) as checkpointer:
        save = checkpointer.save(1, {"w": torch.ones(50_000_000)})
        with pytest.raises(TimeoutError, match="step 1"):
            save.wait_durable(0)
        with pytest.raises(strandline.TimeoutError, match="wait again"):
            checkpointer.wait_until_finished(0)
        assert save.wait_durable(60) == "committed"


def test_a_save_that_ends_just_after_a_slice_of_a_wait_is_no_timeout(tmp_path):
    def wait_in_many_slices(save):
        while not save._core.wait_durable(0):
            pass
        return True

    with strandline.Checkpointer(tmp_path, keep=1) as checkpointer:
        with ThreadPoolExecutor(16) as threads:
            for step in range(40):
                saves = [checkpointer.save(step, {"n": 1})] * 16
                assert all(threads.map(wait_in_many_slices, saves))


def test_a_close_that_gives_up_tells_after_how_long_and_waits_no_second_time(tmp_path):
    checkpointer = strandline.Checkpointer(tmp_path, finish_wait_s=0.5)
    checkpointer.save(1, {"n": 1}).wait_durable(60)
    with writing_stopped():
        checkpointer.save(2, {"n": 2})
        began = time.monotonic()
        with pytest.raises(strandline.TimeoutError, match="after close") as caught:
            checkpointer.close()
        waited_s = float(re.search(r"still ran ([0-9.]+) s", str(caught.value)).group(1))
        assert 0.5 <= waited_s <= time.monotonic() - began + 0.1
        assert checkpointer not in strandline.checkpointer._open  # Exit leaves it alone.
        checkpointer.close()  # Has nothing to say again.
    with pytest.raises(strandline.UnavailableError):
        checkpointer.save(3, {"n": 3})


def test_the_saves_that_may_still_warn_stay_one_list(tmp_path):
    # Another thread's save() appends at any moment; to a list put aside it would be lost.
    with strandline.Checkpointer(tmp_path) as checkpointer:
        saves = checkpointer._saves
        for step in (1, 2):
            checkpointer.save(step, {"n": 1}).wait_durable(60)
        checkpointer.wait_until_finished(60)
        assert checkpointer._saves is saves
        assert saves == []


class Model:
    """A model with the configuration of one of Hugging Face's."""

    def __init__(self, to_json_string):
        self.config = self
        self.to_json_string = to_json_string

    def state_dict(self):
        return {"w": torch.ones(2)}


def test_a_models_configuration_is_kept_however_many_keys_there_are(tmp_path):
    state = {f"key {i}": i for i in range(100)}
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {**state, "model": Model(lambda: '{"n": 1}')})
    assert (tmp_path / "step-00000001" / "config.json").read_text() == '{"n": 1}'


def _fails():
    raise LookupError("no configuration")


@pytest.mark.parametrize("to_json_string", [_fails, lambda: b"{}", lambda: "\ud800"])
def test_a_configuration_that_is_no_text_is_refused(tmp_path, to_json_string):
    with pytest.raises(strandline.Error, match="to_json_string") as caught:
        strandline.save(tmp_path / "one", {"model": Model(to_json_string)})
    assert caught.value.key_path == "model"
    assert isinstance(caught.value.__cause__, Exception)
    assert not (tmp_path / "one").exists()


def test_keys_choose_what_is_loaded(tmp_path):
    strandline.save(
        tmp_path / "one",
        {
            "model": {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
            "opt": {"state": {0: {"x": 1}}, 5: "five"},
            "n": 3,
            "list": [1, {"z": 2}],
        },
    )
    load = strandline.load
    one = tmp_path / "one"
    assert list(load(one)) == ["model", "opt", "n", "list"]
    assert load(one, keys="n") == 3
    assert load(one, keys="model.a.b").item() == 1  # An exact key wins.
    assert load(one, keys=("model", "a", "b")).item() == 0
    assert load(one, keys="opt.state.0.x") == 1
    assert load(one, keys=("opt", 5)) == "five"
    assert load(one, keys="list.1.z") == load(one, keys=("list", 1, "z")) == 2
    several = load(one, keys=["n", ("opt", 5), "opt.state"])
    assert several == {"n": 3, ("opt", 5): "five", "opt.state": {0: {"x": 1}}}
    with pytest.raises(strandline.NotFoundError, match=r"model\.c") as caught:
        load(one, keys="model.c")
    assert caught.value.key_path == "model.c"
    assert isinstance(caught.value, FileNotFoundError)
    for keys in (("opt", "5"), ["n", "no"]):
        with pytest.raises(strandline.NotFoundError):
            load(one, keys=keys)
    for keys in ([], 3, [3], (("a",),)):
        with pytest.raises(strandline.InvalidArgumentError):
            load(one, keys=keys)
    with pytest.raises(strandline.NotFoundError):
        load(tmp_path / "absent")


def test_a_directory_of_steps_gives_the_newest_or_the_one_asked_for(tmp_path):
    with strandline.Checkpointer(tmp_path) as checkpointer:
        for step in (5, 6, 7):
            checkpointer.save(step, {"n": step})
    assert strandline.load(tmp_path) == {"n": 7}
    assert strandline.load(tmp_path, step=5) == {"n": 5}
    assert strandline.load(tmp_path / "step-00000006") == {"n": 6}
    with pytest.raises(strandline.NotFoundError):
        strandline.load(tmp_path, step=8)


def test_saving_one_checkpoint_replaces_only_a_checkpoint(tmp_path):
    strandline.save(tmp_path / "one", {"n": 1})
    strandline.save(str(tmp_path / "one"), {"n": 2})
    assert strandline.load(tmp_path / "one") == {"n": 2}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("other", "file"):
        with pytest.raises(strandline.AlreadyExistsError) as caught:
            strandline.save(tmp_path / name, {"n": 1})
        assert isinstance(caught.value, FileExistsError)
        assert name in caught.value.path
    assert (tmp_path / "other" / "precious").read_text() == "x"


def test_a_step_is_replaced_only_when_asked(tmp_path):
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"n": 1}).wait_durable(60)
        with pytest.raises(strandline.AlreadyExistsError, match="overwrite"):
            checkpointer.save(1, {"n": 2}).wait_durable(60)
        checkpointer.save(1, {"n": 3}, overwrite=True)
    assert strandline.load(tmp_path) == {"n": 3}


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    with strandline.Checkpointer(tmp_path) as first:
        first.save(1, {"n": 1}).wait_durable(60)
        second = strandline.Checkpointer(tmp_path)
        with pytest.raises(strandline.UnavailableError) as caught:
            second.save(2, {"n": 2})
        assert Path(__file__).name in str(caught.value)
        assert second.restore({"n": 0}) == 1  # Reading needs no lock.


BIG = {"w": torch.ones(1_000_000)}


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 1 MiB: a save of BIG fails in the background, a small one works."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_in_background(checkpointer, step):
    with full_disk():
        save = checkpointer.save(step, BIG)
        checkpointer.wait_until_finished(60)
    assert save.outcome == "failed"
    return save


def test_leaving_the_block_raises_what_went_wrong_and_the_next_save_commits(tmp_path):
    def job():
        with strandline.Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(1, {"n": 1})
            fail_in_background(checkpointer, 2)
            assert [type(error) for error in checkpointer.failures] == [strandline.IoError]
            with pytest.warns(strandline.StrandlineWarning):
                checkpointer.save(3, {"n": 3}).wait_durable(60)
            assert checkpointer.steps() == [1, 3]

    with pytest.raises(strandline.IoError) as caught:
        job()
    assert "2" in str(caught.value)


def test_the_bodys_own_exception_is_never_masked(tmp_path):
    def job():
        with strandline.Checkpointer(tmp_path) as checkpointer:
            fail_in_background(checkpointer, 2)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        job()
    if sys.version_info >= (3, 11):
        assert any("closing the Checkpointer" in note for note in caught.value.__notes__)


def test_a_failed_save_is_warned_of_by_the_next_one_at_its_caller(tmp_path):
    checkpointer = strandline.Checkpointer(tmp_path)
    failed = fail_in_background(checkpointer, 2)
    cause = failed.outcome.cause
    assert isinstance(cause, OSError)
    assert cause.errno == errno.EFBIG
    assert cause.path.startswith(str(tmp_path))
    with pytest.warns(strandline.StrandlineWarning, match="step 2") as caught:
        checkpointer.save(3, {"n": 3})
    assert caught[0].filename == __file__
    with pytest.raises(strandline.IoError):
        failed.wait_durable(60)
    checkpointer.close()  # Raised already.


def test_errors_in_the_background_can_be_raised_at_once(tmp_path):
    checkpointer = strandline.Checkpointer(tmp_path, on_error="raise")
    fail_in_background(checkpointer, 2)
    with pytest.raises(strandline.IoError):
        checkpointer.save(3, {"n": 3})
    checkpointer.save(3, {"n": 3})
    checkpointer.close()
    assert strandline.load(tmp_path) == {"n": 3}


def test_a_state_above_the_ceiling_streams_and_says_so_at_the_caller(tmp_path):
    state = {"w": torch.rand(4_000_000)}
    with strandline.Checkpointer(tmp_path, host_bytes_max=4 << 20) as checkpointer:
        with pytest.warns(strandline.StrandlineWarning, match="host_bytes_max") as caught:
            save = checkpointer.save(1, state)
        assert caught[0].filename == __file__
        assert save.wait_durable(60) == "committed"
        assert save.warnings
        assert checkpointer.host_bytes_mapped <= 4 << 20
    assert torch.equal(strandline.load(tmp_path, keys="w"), state["w"])


def test_nothing_is_printed_unless_progress_is_asked_for(tmp_path, capfd):
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": torch.ones(1000)})
        checkpointer.restore({"w": torch.zeros(1000)})
    strandline.load(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_progress_shows_bytes_in_waits_and_reads(tmp_path, capfd):
    with strandline.Checkpointer(tmp_path, progress=True) as checkpointer:
        checkpointer.save(1, {"w": torch.ones(5_000_000)}).wait_durable(60)
        shown = capfd.readouterr().err
        assert "step 1" in shown
        assert "19.1M" in shown
        checkpointer.restore({"w": torch.zeros(5_000_000)})
        assert "restoring" in capfd.readouterr().err
    strandline.load(tmp_path, progress=True)
    assert "loading" in capfd.readouterr().err


def test_progress_may_be_a_function_whose_exception_stops_the_read(tmp_path):
    seen: list[tuple[int, int]] = []
    with strandline.Checkpointer(
        tmp_path, progress=lambda done, total: seen.append((done, total))
    ) as checkpointer:
        checkpointer.save(1, {"w": torch.ones(5_000_000)}).wait_durable(60)
        assert seen[-1] == (20_000_000, 20_000_000)

    def stop(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        strandline.load(tmp_path, progress=stop)
    assert strandline.load(tmp_path)["w"].shape == (5_000_000,)


def test_progress_without_a_library_to_show_it_fails_before_the_work(tmp_path, monkeypatch):
    for name in ("tqdm", "tqdm.auto", "rich", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("strandline.progress._installed", lambda name: False)
    with pytest.raises(strandline.UnsupportedError, match="tqdm or rich"):
        strandline.Checkpointer(tmp_path, progress=True)


def test_progress_falls_back_to_rich(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    strandline.save(tmp_path / "one", {"w": torch.ones(1000)})
    strandline.load(tmp_path / "one", progress=True)
    captured = capfd.readouterr()
    assert "loading" in captured.out + captured.err


SECONDS = "a number of seconds, 0 or more"
FLAG = "True or False"
COUNT = "a whole number of at least 1"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        *(("keep", value, COUNT) for value in (0, 1.5, -1, 2**40, True, "3")),
        ("host_bytes_max", 0, COUNT),
        ("copy_threads", -2, COUNT),
        ("on_error", "ignore", "one of warn, raise"),
        ("when_memory_is_full", "panic", "one of wait, skip"),
        ("verify", "no", "one of headers, read_back"),
        ("verify", ["headers"], "one of headers, read_back"),
        ("finish_wait_s", float("nan"), SECONDS),
        ("finish_wait_s", 10**400, SECONDS),
        *(("memory_wait_s", value, SECONDS) for value in (-1, "x", "60", None, True)),
        *(("allow_pickle", value, FLAG) for value in ("no", 1, None)),
        *(("progress", value, "True, False, or a function") for value in ("yes", 3, 0, None)),
    ],
)
def test_a_wrong_option_is_named_with_what_is_expected(tmp_path, option, value, expected):
    with pytest.raises(strandline.InvalidArgumentError) as caught:
        strandline.Checkpointer(tmp_path, **{option: value})
    message = str(caught.value)
    assert message.startswith(f"{option} must be {expected}")
    assert message.endswith(f"not {value!r}")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, _: c.save(2, {"n": 2}, overwrite="no"), f"overwrite must be {FLAG}, not 'no'"),
        (lambda c, _: c.restore({"n": 0}, strict="no"), f"strict must be {FLAG}, not 'no'"),
        (lambda c, _: c.restore({"n": 0}, verify_first=1), f"verify_first must be {FLAG}, not 1"),
        (lambda c, _: c.wait_until_finished("x"), f"deadline_s must be {SECONDS}, not 'x'"),
        (lambda _, save: save.wait_staged(-1), f"deadline_s must be {SECONDS}, not -1"),
        (lambda _, save: save.wait_durable("x"), f"deadline_s must be {SECONDS}, not 'x'"),
        (lambda _, save: save.wait_durable(float("nan")), f"deadline_s must be {SECONDS}, not nan"),
        (
            lambda c, _: strandline.save(c.path + "/one", {"n": 1}, allow_pickle="no"),
            f"allow_pickle must be {FLAG}, not 'no'",
        ),
        (
            lambda c, _: strandline.load(c.path, allow_pickle="no"),
            f"allow_pickle must be {FLAG}, not 'no'",
        ),
        (
            lambda c, _: strandline.load(c.path, progress="yes"),
            "progress must be True, False, or a function of bytes done and bytes total, not 'yes'",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_expected(tmp_path, call, message):
    with strandline.Checkpointer(tmp_path) as checkpointer:
        save = checkpointer.save(1, {"n": 1})
        save.wait_durable(60)
        with pytest.raises(strandline.InvalidArgumentError) as caught:
            call(checkpointer, save)
        assert str(caught.value) == message
        assert checkpointer.steps() == [1]
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-00000001"]


def test_seconds_may_be_any_number(tmp_path):
    with strandline.Checkpointer(
        tmp_path, memory_wait_s=float("inf"), finish_wait_s=numpy.float32(60)
    ) as checkpointer:
        save = checkpointer.save(1, {"n": 1})
        for deadline_s in (numpy.int64(60), Fraction(60), float("inf")):
            assert save.wait_durable(deadline_s) == "committed"


@pytest.mark.parametrize("step", [-1, 1.5, "3", None, True, 2**63])
def test_a_wrong_step_is_refused(tmp_path, step):
    with strandline.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(strandline.InvalidArgumentError, match="step"):
            checkpointer.save(step, {"n": 1})
        checkpointer.save(numpy.int64(4), {"n": 1})
        checkpointer.wait_until_finished(60)
        assert checkpointer.steps() == [4]


def test_reading_back_everything_is_an_option(tmp_path):
    with strandline.Checkpointer(tmp_path, verify="read_back", keep=1) as checkpointer:
        for step in range(3):
            checkpointer.save(step, {"w": torch.ones(1000)})
    with strandline.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [2]


def test_paths_may_be_anything_that_names_one(tmp_path):
    strandline.save(bytes(tmp_path / "bytes"), {"n": 1})
    assert strandline.load(str(tmp_path / "bytes")) == {"n": 1}
    odd = tmp_path / "na\udcefme"
    strandline.save(odd, {"n": 1})
    assert strandline.load(odd) == {"n": 1}
    with strandline.Checkpointer(odd / "steps") as checkpointer:
        assert checkpointer.path == str(odd / "steps")
    for wrong in (3, None, "nul\0"):
        with pytest.raises((TypeError, ValueError)):
            strandline.save(wrong, {"n": 1})


def test_warnings_are_not_errors_of_the_save(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with strandline.Checkpointer(tmp_path, host_bytes_max=4 << 20) as checkpointer:
            with pytest.raises(strandline.StrandlineWarning):
                checkpointer.save(1, {"w": torch.rand(4_000_000)})
            checkpointer.wait_until_finished(60)
            assert checkpointer.steps() == [1]


def test_the_package_is_typed(tmp_path):
    package = Path(strandline.__file__).parent
    assert (package / "py.typed").exists()
    assert (package / "_core.pyi").exists()
    sample = tmp_path / "sample.py"
    sample.write_text(
        textwrap.dedent(
            """
            from typing import assert_type
            import strandline

            def train(job: dict[str, object]) -> None:
                with strandline.Checkpointer("c", keep=3, on_error="raise") as checkpointer:
                    assert_type(checkpointer.restore(job), int | None)
                    assert_type(checkpointer.restore(job, default=0), int)
                    save = checkpointer.save(1, job, metrics={"loss": 0.5})
                    assert_type(save, strandline.Save)
                    assert_type(save.wait_durable(30), strandline.Outcome)
                    assert_type(save.timings.blocked_ms, float)
                    assert_type(save.progress.bytes_total, int)
                try:
                    strandline.save("m", job)
                except strandline.CorruptError as error:
                    assert_type(error.key_path, str | None)
                strandline.load("m", keys=["a", ("b", 1)], step=3)
                strandline.torch.RngState()
                checkpointer.save("1", job)  # type: ignore[arg-type]
                strandline.Checkpointer("c", on_error="maybe")  # type: ignore[arg-type]
            """
        ).replace("from typing import", "from typing_extensions import")
    )
    # mypy finds what the interpreter finds by itself, such as an installed package, and refuses a
    # MYPYPATH that says so again. A package that PYTHONPATH names it finds through MYPYPATH only.
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", "import strandline; print(strandline.__file__)"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    if found.stdout.strip() != strandline.__file__:
        environment["MYPYPATH"] = str(package.parent)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"),
            *("--python-executable", sys.executable, str(sample)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
