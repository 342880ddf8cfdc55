"""What happens around the package: exit, fork, Ctrl-C, other threads, subinterpreters."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import operator
import os
import signal
import threading
import time

import pytest
import torch
from helpers import run_python, writing_stopped

import strandline


def test_a_save_in_flight_arrives_when_the_interpreter_exits(tmp_path):
    code = """
import sys, torch, strandline
checkpointer = strandline.Checkpointer(sys.argv[1])
save = checkpointer.save(3, {"w": torch.ones(4_000_000)})
"""
    done = run_python(code, tmp_path / "steps")
    assert done.returncode == 0
    assert done.stderr == ""
    assert torch.all(strandline.load(tmp_path / "steps")["w"] == 1)


def test_a_failure_at_exit_is_a_warning_and_not_lost(tmp_path):
    # No file may grow beyond 1 MiB, which is noticed by writing: in the background, after save().
    code = """
import resource, sys, torch, strandline
checkpointer = strandline.Checkpointer(sys.argv[1])
checkpointer.save(1, {"n": 1}).wait_durable(60)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
checkpointer.save(2, {"w": torch.ones(1_000_000)})
print("returned")
"""
    done = run_python(code, tmp_path / "steps")
    assert (done.stdout, done.returncode) == ("returned\n", 0), done.stderr
    (warning,) = (line for line in done.stderr.splitlines() if "StrandlineWarning" in line)
    opened = f"<strandline.Checkpointer {str(tmp_path / 'steps')!r}>"
    assert f"{opened} was closed at exit: " in warning
    assert "step 2" in warning
    assert os.strerror(errno.EFBIG) in warning
    assert "Traceback" not in done.stderr
    assert strandline.load(tmp_path / "steps") == {"n": 1}


def test_an_exception_in_a_module_body_still_lets_the_save_arrive(tmp_path):
    code = """
import sys, torch, strandline
checkpointer = strandline.Checkpointer(sys.argv[1])
checkpointer.save(3, {"w": torch.ones(1000)})
raise RuntimeError("the body's own")
"""
    done = run_python(code, tmp_path / "steps")
    assert done.returncode == 1
    assert "the body's own" in done.stderr
    assert strandline.Checkpointer(tmp_path / "steps").latest_step() == 3


def test_a_forked_childs_copy_is_dead_and_its_own_works(tmp_path):
    code = """
import os, sys, strandline
checkpointer = strandline.Checkpointer(sys.argv[1] + "/parent")
checkpointer.save(1, {"n": 1}).wait_durable(60)
child = os.fork()
if child == 0:
    for call in (
        lambda: checkpointer.save(2, {"n": 2}),
        lambda: checkpointer.restore({"n": 0}),
        lambda: checkpointer.wait_until_finished(1),
        lambda: checkpointer.close(),
    ):
        try:
            call()
        except strandline.UnavailableError as error:
            assert "fork" in str(error), str(error)
        else:
            raise AssertionError("the copy went on")
    with strandline.Checkpointer(sys.argv[1] + "/child") as own:
        own.save(1, {"n": 1})
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
checkpointer.save(2, {"n": 2})
checkpointer.close()
assert checkpointer.steps() == [1, 2]
print("parent done")
"""
    done = run_python(code, tmp_path)
    assert (done.stdout, done.stderr) == ("parent done\n", "")
    assert strandline.load(tmp_path / "child") == {"n": 1}


def test_a_child_that_dies_of_an_exception_closes_nothing_of_its_parents(tmp_path):
    code = """
import os, sys, torch, strandline
checkpointer = strandline.Checkpointer(sys.argv[1])
save = checkpointer.save(1, {"w": torch.ones(1_000_000)})
child = os.fork()
if child == 0:
    sys.exit(7)  # Runs atexit in the child.
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7
save.wait_durable(60)
print(save.outcome)
"""
    done = run_python(code, tmp_path / "steps")
    assert done.stdout == "committed\n"
    assert done.stderr == ""


def press_soon(key=signal.SIGINT):
    """Sends a signal once, from another thread, as soon as the main thread is blocked."""
    main = threading.main_thread().ident

    def press():
        signal.pthread_kill(main, key)

    return threading.Timer(0.05, press)


def assert_interrupted(call, inside="save"):
    """Presses Ctrl-C while `call`, of a method of this name, is blocked for good: it ends soon."""
    timer = press_soon()
    began = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt) as caught:
        call()
    timer.join()
    assert inside in [entry.name for entry in caught.traceback]
    assert time.monotonic() - began < 10  # 0.1 s, on a machine that has nothing else to do.


def test_ctrl_c_ends_a_wait_and_the_save_goes_on(tmp_path):
    with strandline.Checkpointer(tmp_path) as checkpointer:
        with writing_stopped():
            save = checkpointer.save(1, {"w": torch.ones(1000)})
            assert_interrupted(lambda: save.wait_durable(60), "wait_durable")
            assert_interrupted(lambda: checkpointer.wait_until_finished(60), "wait_until_finished")
            assert_interrupted(lambda: checkpointer.restore({"w": torch.ones(1000)}), "restore")
            assert_interrupted(lambda: checkpointer.close(), "close")
        assert save.wait_durable(60) == "committed"


def press_and_call(call):
    """Presses Ctrl-C and calls, which must not return: a list of what it returned.

    Python looks for signals whenever it runs a line of its own, so after a call too that took no
    notice. Here there is none from before the key is pressed until after the call has returned.
    """
    call()  # The first call of a process imports modules, and so runs lines of Python.
    press = functools.partial(ctypes.PyDLL(None)["raise"], signal.SIGINT)
    returned: list[object] = []
    with pytest.raises(KeyboardInterrupt):
        returned.extend(map(operator.call, [press, call]))
    assert returned.pop(0) == 0
    return returned


def test_ctrl_c_ends_a_load(tmp_path):
    strandline.save(tmp_path / "one", {"w": torch.ones(1000)})
    arguments = {"keys": None, "step": None, "allow_pickle": False, "progress": None}
    load = functools.partial(strandline._core.load, str(tmp_path / "one"), **arguments)
    assert press_and_call(load) == []
    assert torch.equal(strandline.load(tmp_path / "one")["w"], torch.ones(1000))


def test_ctrl_c_ends_a_restore(tmp_path):
    job = {"w": torch.ones(1000), "n": 1}
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, job).wait_durable(60)
        arguments = {"step": None, "strict": True, "verify_first": False, "allow_pickle": False}
        restore = functools.partial(checkpointer._core.restore, job, **arguments, progress=None)
        assert press_and_call(restore) == []
        job["w"].zero_()
        assert checkpointer.restore(job) == 1
        assert torch.equal(job["w"], torch.ones(1000))


def test_ctrl_c_ends_a_save_that_waits_for_memory(tmp_path):
    state = {"w": torch.ones(1_000_000)}  # 4 MB, of which the ceiling holds one.
    with strandline.Checkpointer(tmp_path, host_bytes_max=6 << 20) as checkpointer:
        with writing_stopped():
            first = checkpointer.save(1, state)
            assert_interrupted(lambda: checkpointer.save(2, state))
            assert_interrupted(lambda: checkpointer.save(2, state))
        assert first.wait_durable(60) == "committed"
        assert checkpointer.steps() == [1]
        assert checkpointer.save(2, state).wait_durable(60) == "committed"
        assert checkpointer.failures == []
    assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000001", "step-00000002"]


def test_ctrl_c_ends_a_save_that_waits_for_earlier_ones(tmp_path):
    with strandline.Checkpointer(tmp_path, host_bytes_max=64 << 20) as checkpointer:
        with writing_stopped():
            for step in range(4):
                checkpointer.save(step, {"w": torch.ones(1000)})
            assert_interrupted(lambda: checkpointer.save(4, {"w": torch.ones(1000)}))
        checkpointer.wait_until_finished(60)
        assert checkpointer.steps() == [0, 1, 2, 3]
        assert checkpointer.save(4, {"w": torch.ones(1000)}).wait_durable(60) == "committed"


def test_ctrl_c_ends_a_save_in_waves_of_which_nothing_remains(tmp_path):
    state = {"w": torch.ones(1_000_000)}
    with strandline.Checkpointer(tmp_path, host_bytes_max=2 << 20) as checkpointer:
        with writing_stopped():
            assert_interrupted(lambda: checkpointer.save(1, state))
        with pytest.warns(strandline.StrandlineWarning, match="waves"):
            # It may follow at once: the first is out of the way even if it is not cleared yet.
            assert checkpointer.save(1, state).wait_durable(60) == "committed"
        assert checkpointer.failures == []
    assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000001"]
    assert torch.equal(strandline.load(tmp_path)["w"], state["w"])


def test_ctrl_c_ends_the_one_call_save_and_the_old_checkpoint_stays(tmp_path):
    strandline.save(tmp_path / "one", {"n": 1})
    timer = press_soon()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        # Writing it takes far longer than until the key is noticed.
        strandline.save(tmp_path / "one", {"w": torch.ones(150_000_000)})
    timer.join()
    assert os.listdir(tmp_path) == ["one"]
    assert strandline.load(tmp_path / "one") == {"n": 1}
    strandline.save(tmp_path / "one", {"n": 2})
    assert strandline.load(tmp_path / "one") == {"n": 2}


@pytest.fixture
def on_signal():
    """Installs a handler of SIGUSR1."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda handler: signal.signal(signal.SIGUSR1, handler)
    signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_returns_lets_the_save_go_on(tmp_path, on_signal):
    state = {"w": torch.ones(1_000_000)}
    with strandline.Checkpointer(tmp_path, host_bytes_max=6 << 20) as checkpointer:
        with contextlib.ExitStack() as stopped:
            stopped.enter_context(writing_stopped())
            on_signal(lambda *_: stopped.close())  # Runs inside of the save, or it would hang.
            checkpointer.save(1, state)
            timer = press_soon(signal.SIGUSR1)
            timer.start()
            checkpointer.save(2, state)
            timer.join()
        checkpointer.wait_until_finished(60)
        assert checkpointer.steps() == [1, 2]


def test_a_handler_that_saves_inside_of_a_save_is_told_to_wait(tmp_path, on_signal):
    state = {"w": torch.ones(1_000_000)}
    with strandline.Checkpointer(tmp_path, host_bytes_max=6 << 20) as checkpointer:
        for call in (
            lambda: checkpointer.save(9, {"n": 9}),
            lambda: checkpointer.restore({"n": 9}),
            lambda: checkpointer.wait_until_finished(60),
            lambda: checkpointer.close(),
        ):
            on_signal(lambda *_, call=call: call())
            with writing_stopped():
                first = checkpointer.save(1, state, overwrite=True)
                timer = press_soon(signal.SIGUSR1)
                timer.start()
                with pytest.raises(strandline.UnavailableError, match="set a flag"):
                    checkpointer.save(2, state)
                timer.join()
            assert first.wait_durable(60) == "committed"
            checkpointer.wait_until_finished(60)
        assert checkpointer.save(2, state).wait_durable(60) == "committed"
        assert checkpointer.steps()[-1] == 2


def test_python_runs_on_while_the_engine_copies_and_writes(tmp_path):
    """The largest gap between two beats of another thread is far below the time of the copy."""
    state = {"w": torch.ones(100_000_000)}  # 400 MB.
    beats: list[float] = []
    stop = threading.Event()

    def beat():
        while not stop.is_set():
            beats.append(time.perf_counter())

    with strandline.Checkpointer(tmp_path, copy_threads=1) as checkpointer:
        thread = threading.Thread(target=beat)
        thread.start()
        began = time.perf_counter()
        save = checkpointer.save(1, state)
        copied = time.perf_counter()
        save.wait_durable(120)
        durable = time.perf_counter()
        stop.set()
        thread.join()
    during_copy = [beat for beat in beats if began <= beat <= copied]
    during_write = [beat for beat in beats if copied <= beat <= durable]
    # Held for the copy, the GIL would let no beat through at all.
    assert len(during_copy) > 100
    assert len(during_write) > 100
    gaps = [b - a for a, b in itertools.pairwise(during_copy)]
    assert max(gaps) < max(0.5 * (copied - began), 0.05)


def test_threads_may_share_a_checkpointer(tmp_path):
    errors: list[BaseException] = []

    with strandline.Checkpointer(tmp_path) as checkpointer:

        def work(first):
            try:
                for step in range(first, first + 5):
                    checkpointer.save(step, {"w": torch.full((1000,), float(step))})
                    checkpointer.latest_step()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        checkpointer.wait_until_finished(60)
        assert errors == []
        assert sorted(checkpointer.steps()) == [*range(5), *range(100, 105), *range(200, 205)]


def test_a_subinterpreter_is_refused():
    code = """
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
try:
    made = interpreters.create("legacy")
except Exception:
    made = interpreters.create(isolated=False)
try:
    failed = interpreters.run_string(made, "import strandline")
    assert failed is not None
    print("refused")
except Exception as error:
    assert "main interpreter" in str(error), str(error)
    print("refused")
"""
    done = run_python(code)
    assert done.stdout == "refused\n", done.stderr


def test_a_dropped_checkpointer_finishes_its_save(tmp_path):
    checkpointer = strandline.Checkpointer(tmp_path)
    checkpointer.save(1, {"w": torch.ones(1_000_000)})
    del checkpointer
    assert strandline.Checkpointer(tmp_path).latest_step() == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_nothing_leaks_over_many_saves_and_loads(tmp_path):
    import gc
    import sys

    tensor = torch.ones(1000)
    state = {"w": tensor, "m": torch.nn.Linear(3, 3), "n": [1, "x", (2.5, None)]}

    def work():
        with strandline.Checkpointer(tmp_path, keep=1) as checkpointer:
            checkpointer.save(1, state, overwrite=True)
            checkpointer.restore(state)
        strandline.load(tmp_path)
        with pytest.raises(strandline.UnsupportedError):
            strandline.save(tmp_path / "one", {"w": tensor, "bad": object()})

    def count():
        gc.collect()
        return (
            sys.getrefcount(tensor),
            sys.getrefcount(state),
            len(os.listdir("/proc/self/fd")),
            sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        )

    work()
    before = count()
    blocks = sys.getallocatedblocks()
    for _ in range(20):
        work()
    assert count() == before
    assert sys.getallocatedblocks() - blocks < 20 * 10
