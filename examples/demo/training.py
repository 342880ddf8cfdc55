"""The training job of the demo, run as a process of its own.

A small GPT-2 learns the Python language reference byte by byte. Without --checkpoints it just
trains: that is the curve which the other runs are compared with. With --checkpoints it is the
usual resumable loop: restore, train, save every few steps. With --kill-from it ends its own life
with SIGKILL in the middle of a save, which no handler and no `finally` can soften.

Everything that the next step depends on is in `job`: weights, optimizer, learning-rate schedule
and the random generators. The batches are drawn from torch's global generator, so the position in
the data is part of the generators' state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import strandline

TEXT_ORIGIN = "the Python language reference (pydoc_data.topics, in Debian's libpython3-stdlib)"

# Two runs give the same bits only with the same number of threads: sums are split among them.
TORCH_THREADS = 2

Job = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The size of everything; what decides the time that the demo takes."""

    steps: int
    save_every: int
    report_every: int
    layers: int
    width: int
    context: int = 64  # bytes that the model sees at once
    batch: int = 8
    heads: int = 4
    learning_rate: float = 2e-3
    warm_up_steps: int = 20


FULL = Settings(steps=240, save_every=10, report_every=40, layers=4, width=320)
QUICK = Settings(steps=40, save_every=5, report_every=10, layers=2, width=192, warm_up_steps=5)


# ---- The job ----


def training_text() -> torch.Tensor:
    """The text as a tensor of bytes."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)


def build_job(settings: Settings) -> Job:
    """A new model with all that training it needs; the same one in every process."""
    torch.set_num_threads(TORCH_THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(2024)
    config = GPT2Config(
        vocab_size=256,  # bytes
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)  # with dropout, and with the embedding tied to the output
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True)

    def warm_up_then_cosine(step: int) -> float:
        if step < settings.warm_up_steps:
            return (step + 1) / settings.warm_up_steps
        progress = (step - settings.warm_up_steps) / (settings.steps - settings.warm_up_steps)
        return 0.55 + 0.45 * math.cos(math.pi * min(progress, 1.0))  # ends at a tenth

    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_cosine),
        "rng": strandline.torch.RngState(),
    }


def train_step(job: Job, text: torch.Tensor, settings: Settings) -> float:
    """One step of training; returns its loss."""
    length = settings.context + 1
    starts = torch.randint(len(text) - length, (settings.batch,)).tolist()
    batch = torch.stack([text[start : start + length] for start in starts]).long()

    model = job["model"]
    model.train()
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    job["optimizer"].step()
    job["schedule"].step()
    job["optimizer"].zero_grad()
    return loss.item()


def fingerprint(job: Job) -> str:
    """SHA-256 of all that the next step depends on."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(job["model"].state_dict())
    add(job["optimizer"].state_dict())
    add(job["schedule"].state_dict())
    add(torch.get_rng_state())
    return digest.hexdigest()


# ---- The runs ----


class Log:
    """A file of events, one JSON object a line. What was written before a SIGKILL is kept."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)

    def start(self, done: int, job: Job, text: torch.Tensor) -> None:
        parameters = sum(parameter.numel() for parameter in job["model"].parameters())
        self.write(
            "start", step=done, parameters=parameters, text=TEXT_ORIGIN, text_bytes=len(text)
        )
        print(
            f"    starting at step {done}: {parameters:,} parameters, {len(text):,} bytes of text"
        )

    def write(self, event: str, **fields: Any) -> None:
        # The monotonic clock is the same for all processes of a machine.
        self._file.write(json.dumps({"event": event, "time": time.monotonic(), **fields}) + "\n")

    def step(self, done: int, loss: float, settings: Settings) -> None:
        self.write("step", step=done, loss=loss.hex())  # hexadecimal: exact, to the last bit
        if done % settings.report_every == 0:
            print(f"    step {done:3d} of {settings.steps}   loss {loss:.4f}")


def train_without_saving(job: Job, log: Log, settings: Settings) -> None:
    text = training_text()
    log.start(0, job, text)
    for done in range(1, settings.steps + 1):
        log.step(done, train_step(job, text, settings), settings)


def train_and_save(
    job: Job, log: Log, settings: Settings, directory: Path, kill_from: int | None
) -> None:
    """The loop of every resumable job. This is all that using Strandline takes."""
    text = training_text()
    running: list[strandline.Save] = []  # only for the demo's log
    with strandline.Checkpointer(directory, keep=3) as ckpt:
        done = ckpt.restore(job, default=0)
        log.start(done, job, text)
        while done < settings.steps:
            loss = train_step(job, text, settings)
            done += 1
            log.step(done, loss, settings)
            log_ended(running, log, settings)
            if done % settings.save_every == 0:
                log.write("save", step=done)
                save = ckpt.save(done, job)
                log.write("saved", step=done, blocked_ms=save.timings.blocked_ms)
                running.append(save)
                if kill_from is not None and done >= kill_from:
                    die_in_the_middle_of(save, log)
    log_ended(running, log, settings)


def log_ended(running: list[strandline.Save], log: Log, settings: Settings) -> None:
    """Logs, and takes from the list, the saves that have an outcome by now."""
    for save in [save for save in running if save.outcome is not None]:
        running.remove(save)
        timings = save.timings
        log.write(
            "durable",
            step=save.step,
            durable_ms=timings.durable_ms,
            write_ms=timings.write_ms,
            commit_ms=timings.commit_ms,
        )
        if save.step % settings.report_every == 0:
            print(f"    {save}")


def die_in_the_middle_of(save: strandline.Save, log: Log) -> None:
    """Kills this process while `save` is being written.

    If the save was too quick to be caught before three quarters of it were written, training goes
    on, and the next save is tried.
    """
    while True:
        progress = save.progress
        if progress.ended or progress.bytes_written > progress.bytes_total * 3 // 4:
            return
        if progress.bytes_written > 0:
            log.write(
                "kill",
                step=save.step,
                bytes_written=progress.bytes_written,
                bytes_total=progress.bytes_total,
            )
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--kill-from", type=int, help="die in the first save from this step on")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()

    settings = QUICK if arguments.quick else FULL
    job = build_job(settings)
    log = Log(arguments.log)
    if arguments.checkpoints is None:
        train_without_saving(job, log, settings)
    else:
        train_and_save(job, log, settings, arguments.checkpoints, arguments.kill_from)
    log.write("end", step=settings.steps, fingerprint=fingerprint(job))
    return 0


if __name__ == "__main__":
    sys.exit(main())
