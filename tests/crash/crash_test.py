#!/usr/bin/env python3
"""Kills a save at its system calls, one after the other, and looks at what is left.

    crash_test.py SAVER

strace records the system calls of one save. Then the save is run again for each of them (or for
as many as POINTS_MAX, spread evenly) and killed by SIGKILL at the moment of that call, so that it
never happens. Afterwards another process must find the step before or the new one, whole, be able
to save on, and leave nothing over. The saver runs on one thread, so each run makes the same calls;
the calls that matter most are killed in a run with threads as well. Last, single calls fail with
EIO or ENOSPC: the save must report just that, and lose nothing.

Exits with 77 (skipped) where the system does not permit to trace.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable

SKIPPED = 77
# Enough to meet every kind of call from every side; a bound, so that the test ends.
POINTS_MAX = 90
# What the first scenario must have been killed at; the promise of docs/guarantees.md.
POINTS_MIN = 50
# A run takes a fraction of a second; one that hangs is a failure.
TIMEOUT_S = 120

BEGIN, END = "getpgid(2147480001)", "getpgid(2147480002)"
CALL = re.compile(r"^(?:\d+ +)?(\w+)\(")
# These change what is on the disk; none of them is left out.
CHANGING = {
    "mkdirat", "mkdir", "openat", "pwrite64", "write", "fallocate", "ftruncate", "fsync",
    "fdatasync", "renameat2", "renameat", "unlinkat", "flock", "close",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scenario:
    name: str
    before: list[str]  # Saved by a process of its own; nothing if empty.
    options: list[str]
    saves: list[str]  # The last one is the one that is killed.
    old: str  # What is restored if the killed save had no effect,
    new: str  # and if it had.
    points_min: int


SCENARIOS = [
    Scenario("the second save of a run", [], [], ["1=11", "2=12"], "1 11", "2 12", POINTS_MIN),
    Scenario(
        "the first save of a run, one kept", ["1=11"], ["--keep=1"], ["2=12"], "1 11", "2 12", 40
    ),
    Scenario("an overwrite", ["1=11"], ["--overwrite"], ["1=12"], "1 11", "1 12", 40),
]


@dataclasses.dataclass(frozen=True)
class Point:
    """The `nth` call (from 1) of a system call in the whole run."""

    call: str
    nth: int


class CheckError(Exception):
    pass


def strace(
    log: pathlib.Path, arguments: Iterable[str], command: list[str]
) -> subprocess.CompletedProcess[str]:
    """Runs a command traced; its exit status is negative for a signal."""
    return subprocess.run(
        ["strace", "-f", "-o", str(log), *arguments, *command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        # The leak checker of sanitized builds cannot work in a traced process.
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
    )


class Driver:
    def __init__(self, saver: str, root: pathlib.Path) -> None:
        self.saver = saver
        self.root = root
        self.runs = 0

    def fresh(self, scenario: Scenario) -> pathlib.Path:
        self.runs += 1
        directory = self.root / f"run-{self.runs}"
        if scenario.before:
            template = self.root / f"template of {scenario.name}"
            if not template.exists():
                self.must([self.saver, "save", str(template), *scenario.before])
            shutil.copytree(template, directory)
        return directory

    def must(self, command: list[str]) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            raise CheckError(
                f"{' '.join(command)} gave {done.returncode}: {done.stdout}{done.stderr}"
            )
        return done.stdout

    def command(
        self, scenario: Scenario, directory: pathlib.Path, *, threads: bool = False
    ) -> list[str]:
        more = ["--threads"] if threads else []
        return [self.saver, "save", *more, *scenario.options, str(directory), *scenario.saves]

    def record(self, scenario: Scenario) -> list[Point]:
        """The calls of the last save, in order."""
        directory = self.fresh(scenario)
        log = self.root / "log"
        done = strace(log, [], self.command(scenario, directory))
        if done.returncode != 0:
            raise CheckError(f"the recorded run gave {done.returncode}: {done.stdout}{done.stderr}")
        counts: Counter[str] = Counter()
        points = []
        inside = False
        for line in log.read_text(errors="replace").splitlines():
            match = CALL.match(line)
            if match is None:
                continue
            counts[match[1]] += 1
            if END in line:
                break
            if inside:
                points.append(Point(match[1], counts[match[1]]))
            inside = inside or BEGIN in line
        shutil.rmtree(directory)
        return points

    def check_left(self, directory: pathlib.Path, accepted: list[str], what: str) -> str:
        """Another process finds one of the accepted states, saves on, and nothing is left over."""
        said = self.must([self.saver, "resume", str(directory), "3=13"]).splitlines()
        states = {f"restored {state} warnings 0": state for state in accepted}
        if said[0] not in states or said[-1] != "committed 3":
            raise CheckError(f"{what}: {said}, expected one of {accepted}")
        left = [
            entry.name
            for entry in directory.iterdir()
            if entry.name.startswith(".") and entry.name != ".lock"
        ]
        if left:
            raise CheckError(f"{what}: left over: {left}")
        shutil.rmtree(directory)
        return states[said[0]]

    def kill_at(self, scenario: Scenario, point: Point, *, threads: bool) -> str | None:
        """What was left, or None if the run ended before it came to the point."""
        directory = self.fresh(scenario)
        log = self.root / "log"
        inject = f"inject={point.call}:signal=SIGKILL:when={point.nth}"
        command = self.command(scenario, directory, threads=threads)
        status = strace(log, ["-e", f"trace={point.call}", "-e", inject], command).returncode
        what = f"{scenario.name}, killed at {point.call} number {point.nth}"
        if status == 0:
            shutil.rmtree(directory)
            return None
        if status != -signal.SIGKILL:
            raise CheckError(f"{what}: the run gave {status}")
        return self.check_left(directory, [scenario.old, scenario.new], what)

    def sweep(self, scenario: Scenario) -> None:
        points = spread(self.record(scenario))
        left = [self.kill_at(scenario, point, threads=False) for point in points]
        counts = Counter(left)
        killed = len(points) - counts[None]
        print(f"{scenario.name}: killed at {killed} calls, {dict(counts)}", flush=True)
        if killed < scenario.points_min:
            raise CheckError(f"{scenario.name}: killed at only {killed} of {len(points)} points")
        if not counts[scenario.old] or not counts[scenario.new]:
            raise CheckError(f"{scenario.name}: every kill left the same: {dict(counts)}")
        # Once the new step is there, it stays.
        known = [state for state in left if state is not None]
        if known != sorted(known, key=[scenario.old, scenario.new].index):
            raise CheckError(f"{scenario.name}: the new step came and went: {known}")

    def sweep_with_threads(self, scenario: Scenario) -> None:
        """strace counts calls by thread, so these numbers are those of the writing thread."""
        killed = 0
        for call in ("renameat2", "fsync", "pwrite64"):
            for nth in range(1, 4):
                killed += self.kill_at(scenario, Point(call, nth), threads=True) is not None
        print(f"{scenario.name}: with threads, killed at {killed} calls", flush=True)
        if killed < 5:
            raise CheckError(f"{scenario.name}: with threads killed at only {killed} points")

    def fail_calls(self, scenario: Scenario) -> None:
        """Single calls fail: the save says so with the errno, and loses nothing."""
        points = self.record(scenario)
        failed = 0
        for call, error, number in (
            ("pwrite64", "ENOSPC", 28),
            ("fallocate", "ENOSPC", 28),
            ("fsync", "EIO", 5),
            ("renameat2", "EIO", 5),
            ("mkdirat", "ENOSPC", 28),
        ):
            for nth in [point.nth for point in points if point.call == call]:
                directory = self.fresh(scenario)
                inject = f"inject={call}:error={error}:when={nth}"
                command = self.command(scenario, directory)
                trace = ["-e", f"trace={call}", "-e", inject]
                done = strace(self.root / "log", trace, command)
                said = done.stdout.splitlines()[-1] if done.stdout else ""
                what = f"{scenario.name}, {error} from {call} number {nth}"
                if done.returncode == 0:
                    # Optional calls may fail without failing the save.
                    self.check_left(directory, [scenario.new], what)
                    continue
                if done.returncode != 2 or not said.startswith(f"error {number} "):
                    raise CheckError(f"{what}: gave {done.returncode}, said: {said}")
                failed += 1
                self.check_left(directory, [scenario.old, scenario.new], what)
        print(f"{scenario.name}: {failed} failing calls failed the save", flush=True)
        if failed < 10:
            raise CheckError(f"{scenario.name}: only {failed} failing calls failed the save")


def spread(points: list[Point]) -> list[Point]:
    """At most POINTS_MAX, evenly, those that change the disk first."""
    if len(points) <= POINTS_MAX:
        return points
    chosen = {i for i, point in enumerate(points) if point.call in CHANGING}
    if len(chosen) > POINTS_MAX:
        return [points[i * len(points) // POINTS_MAX] for i in range(POINTS_MAX)]
    others = [i for i in range(len(points)) if i not in chosen]
    room = POINTS_MAX - len(chosen)
    chosen |= {others[i * len(others) // room] for i in range(room)}
    return [points[i] for i in sorted(chosen)]


def tracing_is_permitted(root: pathlib.Path) -> bool:
    if shutil.which("strace") is None:
        print("skipped: strace is not installed")
        return False
    trial = strace(root / "log", ["-e", "inject=fsync:signal=SIGKILL:when=1"], ["true"])
    if trial.returncode != 0:
        print("skipped: the system does not permit to trace processes")
        return False
    return True


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="strandline-crash-") as name:
        root = pathlib.Path(name)
        if not tracing_is_permitted(root):
            return SKIPPED
        driver = Driver(sys.argv[1], root)
        try:
            for scenario in SCENARIOS:
                driver.sweep(scenario)
            driver.sweep_with_threads(SCENARIOS[1])
            driver.fail_calls(SCENARIOS[1])
        except CheckError as failure:
            print(f"failed: {failure}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
