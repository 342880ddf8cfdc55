"""Opens a checkpoint with tools that have never heard of Strandline: safetensors and transformers.

They are compared with the job as Strandline restores it: the same tensors, the same logits.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from training import FULL, QUICK, Job, build_job, fingerprint, training_text
from transformers import GPT2LMHeadModel

import strandline


def open_with_safetensors(step_directory: Path, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Reads every tensor of every shard, and compares those of the model bit for bit."""
    weights = model.state_dict()
    shards = []
    for path in sorted(step_directory.glob("*.safetensors")):
        group = path.name.split("-")[0]
        equal = 0
        with safe_open(path, framework="pt") as shard:
            names = list(shard.keys())
            for name in names:
                tensor = shard.get_tensor(name)
                if group == "model":
                    equal += torch.equal(tensor, weights[name])
            first = shard.get_slice(names[0]) if names else None
        shards.append(
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "tensors": len(names),
                "first": f"{names[0]} {first.get_dtype()} {first.get_shape()}" if first else "",
                "equal_to_the_model": equal if group == "model" else None,
            }
        )
    return shards


def open_with_transformers(step_directory: Path, model: torch.nn.Module) -> dict[str, Any]:
    """Loads the step's directory as a pretrained model and lets both models read the same text."""
    loaded, info = GPT2LMHeadModel.from_pretrained(
        step_directory, output_loading_info=True, local_files_only=True
    )
    context = model.config.n_positions
    prompt = training_text()[:context].long().unsqueeze(0)
    with torch.no_grad():
        expected = model.eval()(input_ids=prompt).logits
        logits = loaded.eval()(input_ids=prompt).logits
    return {
        "missing_keys": sorted(info["missing_keys"]),
        "unexpected_keys": sorted(info["unexpected_keys"]),
        "mismatched_keys": sorted(str(key) for key in info["mismatched_keys"]),
        "logits": logits.numel(),
        "logits_equal": torch.equal(logits, expected),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()

    job: Job = build_job(QUICK if arguments.quick else FULL)
    with strandline.Checkpointer(arguments.checkpoints) as ckpt:
        step = ckpt.restore(job)
    # Before the readers draw random numbers: the restored job is the one that ended training.
    restored = fingerprint(job)
    step_directory = arguments.checkpoints / f"step-{step:08d}"
    arguments.result.write_text(
        json.dumps(
            {
                "step_directory": step_directory.name,
                "fingerprint": restored,
                "safetensors": open_with_safetensors(step_directory, job["model"]),
                "transformers": open_with_transformers(step_directory, job["model"]),
            },
            indent=2,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
