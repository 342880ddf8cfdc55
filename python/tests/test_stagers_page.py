"""docs/stagers.md and tests/conformance/pytorch.md: what they show runs, what they name exists."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from helpers import assert_same, run_python

from strandline.torch import CheckpointStagerConfig, StateDictStager

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/stagers.md").read_text("utf-8")
CONFORMANCE = (ROOT / "tests/conformance/pytorch.md").read_text("utf-8")

# How many tests PyTorch has in each file.
PYTORCHS_TESTS = {
    "_experimental/test_staging.py": 7,
    "_experimental/test_checkpointer.py": 11,
    "_experimental/test_checkpoint_process.py": 15,
    "test_state_dict_stager.py": 15,
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def run(code):
    """Runs an example as a script of its own would be, and gives its names."""
    names = {"__name__": "example"}
    exec(compile(code, "docs/stagers.md", "exec"), names)
    return names


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = blocks("python")
    of_processes = [code for code in examples if "__main__" in code]
    assert len(of_processes) == 1
    run("".join(code for code in examples if code not in of_processes))
    assert (tmp_path / "dcp-7" / ".metadata").exists()
    script = tmp_path / "example.py"
    script.write_text(of_processes[0])
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = run_python(code, script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "step-7" / "checkpoint_0.pt") == {"step": 7}


def test_the_migration_runs_before_and_after():
    (diff,) = blocks("diff")
    results = []
    for dropped in "+-":
        lines = [line[1:] for line in diff.splitlines() if not line.startswith(dropped)]
        torch.manual_seed(3)
        results.append(run("\n".join(lines))["staged"])
    assert len({line for line in diff.splitlines() if line.startswith("+")}) == 1
    assert_same(*results)


def test_every_option_has_its_line():
    lines = re.findall(r"^\| `(\w+)`(?: \(`(\w+)`\))? \|", PAGE, re.M)
    named = {name for line in lines for name in line if name}
    assert named >= set(inspect.signature(CheckpointStagerConfig).parameters)
    for option in inspect.signature(StateDictStager.__init__).parameters:
        assert option == "self" or f"`{option}`" in PAGE, option


@pytest.fixture(scope="module")
def tests():
    """The names of all tests there are, and what the tests of replicas are parametrized with."""
    names = set()
    for path in (ROOT / "python/tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
    for path in (ROOT / "src").rglob("*_test.cc"):
        found = re.findall(r"\bTEST(?:_F|_P)?\(\s*(\w+)\s*,\s*(\w+)\s*\)", path.read_text("utf-8"))
        names.update(".".join(name) for name in found)
    return names


def rows():
    """File of PyTorch's, its test, passed or changed, and what we name for it."""
    file = None
    for line in CONFORMANCE.splitlines():
        if line.startswith("## "):
            file = line.split("`")[1]
        elif line.startswith("| `test_"):
            theirs, verdict, ours = (cell.strip() for cell in line.strip("|").split(" | "))
            yield file, theirs.strip("`"), verdict, re.findall(r"`([\w.]+)`", ours)


def test_every_test_of_pytorchs_has_one_of_ours(tests):
    count = dict.fromkeys(PYTORCHS_TESTS, 0)
    seen = set()
    for file, theirs, verdict, ours in rows():
        assert (file, theirs) not in seen, theirs
        seen.add((file, theirs))
        count[file] += 1
        assert re.match(r"passed\b|changed(: |, likewise)", verdict), theirs
        assert ours, f"{theirs} has none of ours"
        for name in ours:
            assert name in tests, f"{name}, named for {theirs}, does not exist"
    assert count == PYTORCHS_TESTS


def test_every_test_that_the_page_names_exists(tests):
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert len(named) > 5
    assert not [name for name in named if name not in tests]
