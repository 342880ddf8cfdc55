"""Strandline's demo: train, kill in the middle of a save, resume, compare.

It trains a small transformer on real text in three processes of its own:
  A  trains without interruption, and without Strandline;
  B  trains the same, saves every few steps, and dies by SIGKILL in the middle of a save;
  C  resumes from the newest complete checkpoint and finishes.
The losses of B and C must equal those of A to the last bit. Then it measures what a save costs,
beside torch.save and PyTorch's experimental stager, opens the checkpoint with safetensors and
transformers, and draws a picture. All that it prints was measured in the same run.

Usage: demo.py [--quick] [--output DIR]     (about two minutes on two cores)

The exit status is 0 if everything held, 1 if something did not, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]

# Every child must have ended by then, each many times what it takes on two cores.
TRAINING_DEADLINE_S = 600.0
RIVALS_DEADLINE_S = 600.0
READERS_DEADLINE_S = 180.0
# How long a child may take to end when it is asked to.
TERMINATE_DEADLINE_S = 10.0

# What the children's libraries are told before they are imported.
ENVIRONMENT = {
    # No network is needed, and none is tried.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Torch's threads wait for each other asleep, not spinning: where the cores are shared with
    # other work, spinning makes a step take ten times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
}

Event = dict[str, Any]


class DemoError(Exception):
    """Something that the demo shows did not hold; the message says what."""


class Demo:
    """The parts of the demo in their order; each keeps what it found for the summary."""

    def __init__(self, output: Path, quick: bool) -> None:
        self.output = output
        self.quick = quick
        self.checkpoints = output / "checkpoints"
        self.began = time.monotonic()
        self.summary: dict[str, Any] = {}

    # ---- Helpers ----

    def heading(self, text: str) -> None:
        print(f"\n[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    def child(self, script: str, *arguments: str | Path, deadline_s: float) -> int:
        """Runs one of the other scripts here as a process of its own; returns its exit status."""
        command = [sys.executable, "-u", str(HERE / script), *map(str, arguments)]
        if self.quick:
            command.append("--quick")
        # In a session of its own, so that Ctrl-C reaches this process alone, which then ends it.
        process = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, start_new_session=True
        )
        try:
            return process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            raise DemoError(f"{script} did not end within {deadline_s:.0f} s") from None
        finally:  # also after Ctrl-C: no process is left behind
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=TERMINATE_DEADLINE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def must_succeed(self, status: int, what: str) -> None:
        if status != 0:
            raise DemoError(f"{what} ended with status {status}; its messages are above")

    def log(self, name: str) -> list[Event]:
        return read_log(self.output / f"{name}.jsonl")

    # ---- The parts ----

    def train_uninterrupted(self) -> None:
        self.heading("A: training without interruption, and without Strandline")
        log = self.output / "uninterrupted.jsonl"
        status = self.child("training.py", "--log", log, deadline_s=TRAINING_DEADLINE_S)
        self.must_succeed(status, "the uninterrupted run")

    def train_until_killed(self) -> None:
        self.heading("B: the same again, saving; SIGKILL in the middle of a save")
        steps = of(self.log("uninterrupted"), "end")[0]["step"]
        status = self.child(
            "training.py",
            *("--log", self.output / "killed.jsonl"),
            *("--checkpoints", self.checkpoints),
            *("--kill-from", str(steps * 11 // 20)),
            deadline_s=TRAINING_DEADLINE_S,
        )
        if status != -signal.SIGKILL:
            raise DemoError(f"run B should have been killed in a save, but ended with {status}")
        kill = of(self.log("killed"), "kill")[0]
        complete = sorted(path.name for path in self.checkpoints.glob("step-*"))
        partial = sorted(self.checkpoints.glob(f".step-{kill['step']:08d}.partial-*"))
        if not partial or f"step-{kill['step']:08d}" in complete:
            raise DemoError("run B was not killed in the middle of a save: nothing was left over")
        self.summary["kill"] = {
            "step": kill["step"],
            "bytes_written": kill["bytes_written"],
            "bytes_total": kill["bytes_total"],
            "left_behind": partial[0].name,
            "files": {file.name: file.stat().st_size for file in sorted(partial[0].iterdir())},
            "complete": complete,
        }
        print(
            f"    killed in the save of step {kill['step']},"
            f" with {megabytes(kill['bytes_written'])} of {megabytes(kill['bytes_total'])} written;"
            " it left this behind:"
        )
        print(f"      {partial[0].name}/")
        for name, size in self.summary["kill"]["files"].items():
            print(f"        {name}  {megabytes(size)}")
        print(f"    complete: {', '.join(complete)}", flush=True)

    def resume(self) -> None:
        self.heading("C: resuming in a new process, from the newest complete checkpoint")
        log = self.output / "resumed.jsonl"
        status = self.child(
            *("training.py", "--log", log, "--checkpoints", self.checkpoints),
            deadline_s=TRAINING_DEADLINE_S,
        )
        self.must_succeed(status, "the resumed run")

    def compare(self) -> None:
        reference = self.log("uninterrupted")
        killed, resumed = self.log("killed"), self.log("resumed")
        compared, differences = compare_losses(reference, [killed, resumed])
        ends = [of(log, "end")[0] for log in (reference, resumed)]
        saved = of(killed, "saved") + of(resumed, "saved")
        self.summary["training"] = {
            **{key: of(reference, "start")[0][key] for key in ("parameters", "text", "text_bytes")},
            "steps": ends[0]["step"],
            "resumed_from": of(resumed, "start")[0]["step"],
            "losses_compared": compared,
            "differences": differences,
            "fingerprints_equal": ends[0]["fingerprint"] == ends[1]["fingerprint"],
            "saves": len(saved),
            "blocked_ms": [event["blocked_ms"] for event in saved],
            "durable_ms": [e["durable_ms"] for e in of(killed, "durable") + of(resumed, "durable")],
            "seconds_saving": sum(event["blocked_ms"] for event in saved) / 1e3,
            "seconds_training": duration(killed) + duration(resumed),
        }
        if differences:
            raise DemoError(f"{len(differences)} of {compared} losses differ: {differences[0]} …")
        if not self.summary["training"]["fingerprints_equal"]:
            raise DemoError("the losses are equal, but the final states of A and C differ")
        print(f"    {compared} losses compared with A's, each equal to the last bit")

    def measure_rivals(self) -> None:
        self.heading("What a save costs: Strandline, torch.save and PyTorch's stager, in turns")
        result = self.output / "rivals.json"
        status = self.child(
            "rivals.py",
            *("--checkpoints", self.checkpoints),
            *("--scratch", self.output / "rivals"),
            *("--result", result),
            deadline_s=RIVALS_DEADLINE_S,
        )
        self.must_succeed(status, "the measurement")
        self.summary["costs"] = json.loads(result.read_text())

    def open_elsewhere(self) -> None:
        self.heading("Opening the checkpoint with safetensors and transformers")
        result = self.output / "readers.json"
        status = self.child(
            *("other_readers.py", "--checkpoints", self.checkpoints, "--result", result),
            deadline_s=READERS_DEADLINE_S,
        )
        self.must_succeed(status, "reading with other tools")
        found = self.summary["readers"] = json.loads(result.read_text())
        model = next(shard for shard in found["safetensors"] if shard["file"].startswith("model-"))
        loaded = found["transformers"]
        if model["equal_to_the_model"] != model["tensors"]:
            raise DemoError("safetensors read other weights than the model's")
        if loaded["missing_keys"] or loaded["unexpected_keys"] or loaded["mismatched_keys"]:
            raise DemoError(f"from_pretrained did not find what it expected: {loaded}")
        if not loaded["logits_equal"]:
            raise DemoError("the model that from_pretrained loaded gives other logits")
        if found["fingerprint"] != of(self.log("uninterrupted"), "end")[0]["fingerprint"]:
            raise DemoError("the last checkpoint is not the state at the end of training")

    def draw(self) -> None:
        self.heading("Drawing the picture")
        from picture import draw  # matplotlib takes a while: imported only when it is needed

        draw(
            self.output / "timeline.png",
            self.log("uninterrupted"),
            self.log("killed"),
            self.log("resumed"),
            self.summary["costs"]["rows"],
            self.summary["training"]["losses_compared"],
        )

    def run(self) -> None:
        self.train_uninterrupted()
        self.train_until_killed()
        self.resume()
        self.compare()
        self.measure_rivals()
        self.open_elsewhere()
        self.draw()
        self.summary["seconds"] = time.monotonic() - self.began
        (self.output / "summary.json").write_text(json.dumps(self.summary, indent=2) + "\n")
        self.heading("Summary")
        print_summary(self.summary, self.output)


# ---- What the parts are made of ----


def of(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def read_log(path: Path) -> list[Event]:
    """The events of one run. A last line that a SIGKILL cut short does not count."""
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def duration(events: list[Event]) -> float:
    """Seconds from the start of training to the end of a run, or to its death."""
    return float(events[-1]["time"] - of(events, "start")[0]["time"])


def compare_losses(reference: list[Event], runs: list[list[Event]]) -> tuple[int, list[str]]:
    """Compares every loss of the runs with the reference's, to the last bit.

    Returns how many were compared, and one line for each that differs. A step that no run made
    counts as a difference: nothing may be missing from the interrupted curve.
    """
    expected = {event["step"]: event["loss"] for event in of(reference, "step")}
    losses = [(event["step"], event["loss"]) for run in runs for event in of(run, "step")]
    differences = [
        f"step {step}: {loss} instead of {expected.get(step)}"
        for step, loss in losses
        if loss != expected.get(step)
    ]
    missing = expected.keys() - {step for step, _ in losses}
    differences += [f"step {step}: not made" for step in sorted(missing)]
    return len(losses), differences


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.1f}  ({min(values):.1f} - {max(values):.1f})"


def print_costs(costs: dict[str, Any]) -> None:
    """The table of what a save costs, and how the rivals compare with Strandline."""
    rows = costs["rows"]
    ours = {key: statistics.median(rows[0][key]) for key in ("blocked_ms", "durable_ms")}
    print(
        f"  {len(rows[0]['blocked_ms'])} saves of the same job each, in turns; milliseconds:"
        " median (least - most), ratio of medians to Strandline's"
    )
    print(f"    {'':36}{'blocked':>28}{'':7}{'until durable':>28}")
    for row in rows:
        cells = ""
        for key in ("blocked_ms", "durable_ms"):
            ratio = statistics.median(row[key]) / ours[key]
            cells += f"{spread(row[key]):>28}" + (
                f" {ratio:4.1f}x " if row is not rows[0] else 7 * " "
            )
        print(f"    {row['name']:36}{cells}".rstrip())
    print("    Strandline: with the digest of every byte, and removing the oldest checkpoint")
    for row in rows[1:]:
        print(f"    {row['name'].split(' + ')[0]}: the quickest settings, {row['settings']}")


def print_summary(summary: dict[str, Any], output: Path) -> None:
    training, kill, readers = summary["training"], summary["kill"], summary["readers"]
    print(
        f"  Job: GPT-2 with {training['parameters'] / 1e6:.1f} million parameters, AdamW, warm-up"
        f" and cosine, dropout; checkpoints of {megabytes(kill['bytes_total'])}"
    )
    print(f"  Text: {training['text']}, {training['text_bytes'] / 1e3:.0f} kB")
    print(
        f"  Killed in the save of step {kill['step']}, with {megabytes(kill['bytes_written'])}"
        f" written; resumed at step {training['resumed_from']}"
    )
    print(
        f"  Losses: {training['losses_compared']} of the killed and the resumed run compared with"
        f" the uninterrupted one: {len(training['differences'])} differ"
    )
    print("  State at the end (weights, optimizer, schedule, generators): equal, by SHA-256")
    share = 100 * training["seconds_saving"] / training["seconds_training"]
    print(
        f"  Saving while training: {training['saves']} saves, each blocked"
        f" {statistics.median(training['blocked_ms']):.1f} ms (median; the first"
        f" {training['blocked_ms'][0]:.1f}), {share:.2f} % of the time"
    )
    print_costs(summary["costs"])
    print("  Opened by safetensors:")
    for shard in readers["safetensors"]:
        equal = shard["equal_to_the_model"]
        told = f", {equal} equal to the model's" if equal is not None else ""
        print(f"    {shard['file']}: {shard['tensors']} tensors{told}; {shard['first']}")
    loaded = readers["transformers"]
    print(
        f"  Opened by transformers' from_pretrained({readers['step_directory']}):"
        f" {len(loaded['missing_keys'])} keys missing, {len(loaded['unexpected_keys'])}"
        f" unexpected; {loaded['logits']} logits equal"
    )
    print(f"  Picture: {output / 'timeline.png'}\n  Numbers: {output / 'summary.json'}")
    print(f"  All of it took {summary['seconds']:.0f} s")


# What the demo leaves in its output directory, and removes at the next start.
LEFTOVERS = (
    "checkpoints",
    "rivals",
    "uninterrupted.jsonl",
    "killed.jsonl",
    "resumed.jsonl",
    "rivals.json",
    "readers.json",
    "summary.json",
    "timeline.png",
)


def prepare(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for name in LEFTOVERS:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "demo")
    arguments = parser.parse_args()

    for package in ("strandline", "torch", "transformers", "safetensors", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed for this Python; `make demo` installs it")
    output = arguments.output.resolve()
    for ending in (signal.SIGTERM, signal.SIGHUP):  # They end the children like Ctrl-C does.
        signal.signal(ending, interrupt)
    prepare(output)
    try:
        Demo(output, arguments.quick).run()
    except DemoError as failure:
        print(f"\nThe demo FAILED: {failure}\nWhat it left is in {output}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted. What it left is in {output}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
