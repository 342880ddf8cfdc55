"""The example of README.md, run as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import strandline

README = Path(__file__).parents[2] / "README.md"
STEPS = 450


class KilledError(Exception):
    """What ends the first run in the middle."""


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)


def example() -> str:
    return examples()[0]


class Job:
    """Stand-ins for what the example takes for granted: small, and random from step to step."""

    def __init__(self, seed, killed_at=None):
        torch.manual_seed(seed)  # A new process starts differently; restoring must make up for it.
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(), torch.nn.ReLU())
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 20, 0.9)
        self.killed_at = killed_at
        self.trained: list[int] = []

    def train(self, done):
        if done == self.killed_at:
            raise KilledError
        self.trained.append(done)
        self.optimizer.zero_grad()
        self.model(torch.randn(5, 3)).square().sum().backward()
        self.optimizer.step()
        self.schedule.step()

    def run(self):
        names = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "train": self.train,
            "steps": STEPS,
        }
        exec(compile(example(), str(README), "exec"), names)
        return names


@pytest.fixture
def in_directory(tmp_path, monkeypatch):
    def change(name):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)

    return change


def test_the_example_resumes_where_it_was_killed_and_ends_like_a_run_that_was_not(in_directory):
    in_directory("in_one_go")
    whole = Job(seed=1)
    whole.run()
    assert whole.trained == list(range(STEPS))

    in_directory("killed")
    with pytest.raises(KilledError):
        Job(seed=1, killed_at=250).run()
    assert strandline.Checkpointer("checkpoints").latest_step() == 200
    resumed = Job(seed=2)
    names = resumed.run()
    assert resumed.trained == list(range(200, STEPS))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name

    assert sorted(strandline.Checkpointer("checkpoints").steps()) == [200, 300, 400]
    # `weights` are those of the last save, as plain tensors that any model can load.
    fresh = Job(seed=3).model
    fresh.load_state_dict(names["weights"])
    assert Path("model.ckpt", "manifest.json").exists()
    saved = strandline.load("model.ckpt")["model"]
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_running_the_example_again_when_all_steps_are_done_trains_nothing(in_directory):
    in_directory("again")
    Job(seed=1).run()
    after_all = Job(seed=2)
    after_all.run()
    assert after_all.trained == list(range(400, STEPS))  # Since the last save.


def test_the_line_that_changes_for_a_stager_runs():
    names: dict[str, object] = {}
    _, stagers = examples()
    exec(compile(stagers, str(README), "exec"), names)
    assert names["DefaultStager"] is strandline.torch.DefaultStager
