"""The demo, in its quick form: a smaller model, fewer steps, all of its parts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DEMO_DIRECTORY = Path(__file__).resolve().parents[2] / "examples" / "demo"

# Many times what the quick form takes on two cores.
DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished demo's output directory, and what it printed; started from somewhere else."""
    output = tmp_path_factory.mktemp("demo")
    (output / "checkpoints").mkdir()
    (output / "checkpoints" / "left by an earlier demo").touch()
    done = subprocess.run(
        [sys.executable, DEMO_DIRECTORY / "demo.py", "--quick", "--output", output],
        cwd=output,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


@pytest.fixture(scope="module")
def summary(finished: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((finished[0] / "summary.json").read_text())


def test_the_resumed_curve_equals_the_uninterrupted_one(summary: dict[str, Any]) -> None:
    training = summary["training"]
    again = summary["kill"]["step"] - training["resumed_from"]
    assert again > 0
    assert training["losses_compared"] == training["steps"] + again
    assert training["differences"] == []
    assert training["fingerprints_equal"]


def test_the_run_is_killed_in_the_middle_of_a_save(summary: dict[str, Any]) -> None:
    kill = summary["kill"]
    assert 0 < kill["bytes_written"] < kill["bytes_total"]
    assert kill["left_behind"].startswith(f".step-{kill['step']:08d}.partial-")
    assert "manifest.json" not in kill["files"]
    assert f"step-{kill['step']:08d}" not in kill["complete"]
    assert f"step-{summary['training']['resumed_from']:08d}" in kill["complete"]


def test_what_the_killed_run_left_behind_is_swept(finished: tuple[Path, str]) -> None:
    assert list((finished[0] / "checkpoints").glob(".step-*")) == []
    assert not (finished[0] / "checkpoints" / "left by an earlier demo").exists()


def test_the_table_holds_measured_times_of_all_three(summary: dict[str, Any]) -> None:
    rows = summary["costs"]["rows"]
    assert [row["name"] for row in rows] == [
        "Strandline",
        "torch.save + fsync",
        "PyTorch stager + torch.save + fsync",
    ]
    for row in rows:
        assert len(row["blocked_ms"]) == len(row["durable_ms"]) >= 3
        for blocked, durable in zip(row["blocked_ms"], row["durable_ms"], strict=True):
            assert 0 < blocked <= durable


def test_safetensors_and_transformers_open_the_checkpoint(summary: dict[str, Any]) -> None:
    readers = summary["readers"]
    assert {shard["file"].split("-")[0] for shard in readers["safetensors"]} >= {
        "model",
        "optimizer",
    }
    loaded = readers["transformers"]
    assert loaded["missing_keys"] == loaded["unexpected_keys"] == loaded["mismatched_keys"] == []
    assert loaded["logits_equal"]


def test_the_picture_is_drawn(finished: tuple[Path, str]) -> None:
    picture = (finished[0] / "timeline.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) > 20_000


def test_the_summary_says_where_things_are(finished: tuple[Path, str]) -> None:
    output, printed = finished
    assert str(output / "timeline.png") in printed
    assert "ratio of medians" in printed


@pytest.fixture
def demo_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DEMO_DIRECTORY))
    import demo

    return demo


def step(number: int, loss: float) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": loss.hex()}


def test_a_loss_that_differs_in_its_last_bit_is_found(demo_module: Any) -> None:
    reference = [step(1, 2.5), step(2, 2.25)]
    compared, differences = demo_module.compare_losses(
        reference, [[step(1, 2.5)], [step(2, 2.2500000000000004)]]
    )
    assert compared == 2
    assert len(differences) == 1
    assert differences[0].startswith("step 2:")


def test_a_step_that_no_run_made_is_found(demo_module: Any) -> None:
    reference = [step(1, 2.5), step(2, 2.25)]
    assert demo_module.compare_losses(reference, [[step(1, 2.5)]])[1] == ["step 2: not made"]
    assert demo_module.compare_losses(reference, [[step(1, 2.5), step(2, 2.25)]]) == (2, [])


def test_ctrl_c_ends_the_demo_and_its_children(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", DEMO_DIRECTORY / "demo.py", "--output", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "starting at step" in line:  # The training process is at work.
            break
    process.send_signal(signal.SIGINT)
    # Ends when no process holds the pipe any more, so a child that outlived the demo is noticed:
    # it would keep the pipe open until it has trained to the end.
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted" in rest
    assert "Traceback" not in rest
    assert "step 240 of" not in rest
