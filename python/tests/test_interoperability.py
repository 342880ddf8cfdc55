"""Checkpoints belong to everyone: safetensors, transformers, NumPy without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy
import pytest
import torch
from helpers import bits_of, run_python

import strandline

WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
blocked = set(sys.argv[2].split(","))
sys.meta_path.insert(0, Blocked())
import strandline
"""


def test_importing_the_package_imports_neither_torch_nor_numpy():
    code = """
import sys, strandline
assert "torch" not in sys.modules and "numpy" not in sys.modules
strandline.torch.RngState()
assert "torch" in sys.modules
assert "torch" in dir(strandline)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_tensors_load_as_arrays_where_torch_is_missing(tmp_path):
    strandline.save(
        tmp_path / "one",
        {
            "model": {
                "w": torch.arange(6.0).reshape(2, 3),
                "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
                "f8": torch.tensor([0.5], dtype=torch.float8_e4m3fn),
                "n": numpy.arange(3),
            },
            "size": torch.Size([2, 3]),
            "dtype": torch.bfloat16,
            "device": torch.device("cuda", 1),
            "scalar": numpy.float32(2.5),
            "layers": torch.nn.Linear(2, 2),
        },
    )
    code = (
        WITHOUT_TORCH
        + """
import numpy, ml_dtypes
state = strandline.load(sys.argv[1])
model = state["model"]
assert all(type(value) is numpy.ndarray for value in model.values())
assert model["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
assert model["half"].dtype == ml_dtypes.bfloat16 and model["half"].tolist() == [1.5, -2]
assert model["f8"].dtype == ml_dtypes.float8_e4m3fn
assert state["size"] == (2, 3) and type(state["size"]) is tuple
assert state["dtype"] == "torch.bfloat16" and state["device"] == "cuda:1"
assert type(state["scalar"]) is numpy.float32
assert state["layers"]._metadata == {"": {"version": 1}}
job = {"model": {name: numpy.zeros_like(value) for name, value in model.items()}}
with strandline.Checkpointer(sys.argv[1] + "-steps") as checkpointer:
    checkpointer.save(1, {"model": model}).wait_durable(60)
    checkpointer.restore(job)
assert job["model"]["half"].tolist() == [1.5, -2]
try:
    strandline.torch
except ImportError:
    print("done")
"""
    )
    done = run_python(code, tmp_path / "one", "torch")
    assert done.stdout == "done\n", done.stderr


def test_a_type_that_numpy_lacks_is_named_where_ml_dtypes_is_missing(tmp_path):
    strandline.save(
        tmp_path / "one", {"a": {"good": torch.ones(1), "half": torch.ones(1).bfloat16()}}
    )
    code = (
        WITHOUT_TORCH
        + """
try:
    strandline.load(sys.argv[1])
except strandline.UnsupportedError as error:
    assert error.key_path == "a.half", error.key_path
    assert "ml_dtypes" in str(error) and "BF16" in str(error), str(error)
assert strandline.load(sys.argv[1], keys="a.good").tolist() == [1]
print("done")
"""
    )
    done = run_python(code, tmp_path / "one", "ml_dtypes")
    assert done.stdout == "done\n", done.stderr


def test_safetensors_opens_every_shard(tmp_path):
    from safetensors.torch import load_file

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    strandline.save(tmp_path / "one", {"model": model, "optimizer": optimizer, "x": torch.ones(2)})
    shards = sorted(tmp_path.glob("one/*.safetensors"))
    assert [shard.name for shard in shards] == [
        "model-00001-of-00001.safetensors",
        "optimizer-00001-of-00001.safetensors",
        "state-00001-of-00001.safetensors",
    ]
    opened = [load_file(shard) for shard in shards]
    assert set(opened[0]) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert bits_of(opened[0][name]) == bits_of(tensor)
    assert "state.0.exp_avg" in opened[1]
    assert torch.equal(opened[2]["x"], torch.ones(2))


def test_transformers_opens_a_steps_directory(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=True
    )
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters())
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": optimizer})
    step = tmp_path / "step-00000001"
    assert (step / "config.json").is_file()
    opened, information = transformers.GPT2LMHeadModel.from_pretrained(
        step, output_loading_info=True
    )
    assert not any(map(information.get, ("missing_keys", "unexpected_keys"))), information
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    assert opened.lm_head.weight is opened.transformer.wte.weight


def test_the_command_line_tool_reads_what_python_saved(tmp_path):
    from pathlib import Path

    tool = Path(sys.executable).parent / "strandline"
    if not tool.exists():
        pytest.skip("the command-line tool is not installed")
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": torch.nn.Linear(2, 2), "epoch": 3}, metrics={"loss": 0.5})
    for verb in (["ls", tmp_path], ["verify", tmp_path / "step-00000001"]):
        subprocess.run([tool, *map(str, verb)], check=True, timeout=60, capture_output=True)
