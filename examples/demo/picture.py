"""Draws the demo's timeline: the losses, the saves, the kill, and what a save cost each library."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, not a window
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

Event = dict[str, Any]

UNINTERRUPTED = "#b8c4ce"
KILLED = "#1f6fb4"
RESUMED = "#e08214"
BLOCKED = "#c1121f"
WRITING = "#7fb77e"
KILL = "#222222"

IN_A_STEP: dict[str, Any] = {
    "color": "white",
    "ha": "center",
    "va": "center",
    "fontsize": 7,
    "clip_on": True,
}

ZOOM_SAVES = 2  # complete saves before the kill that the second panel shows


def draw(
    path: Path,
    uninterrupted: list[Event],
    killed: list[Event],
    resumed: list[Event],
    rows: list[dict[str, Any]],
    compared: int,
) -> None:
    figure = plt.figure(figsize=(13, 10.5), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(5, 3, 2.6))
    draw_losses(figure.add_subplot(grid[0, :]), uninterrupted, killed, resumed, compared)
    draw_last_seconds(figure.add_subplot(grid[1, :]), killed)
    draw_costs(figure.add_subplot(grid[2, 0]), rows, "blocked_ms", "blocked per save")
    draw_costs(figure.add_subplot(grid[2, 1]), rows, "durable_ms", "until durable")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def of(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def losses(events: list[Event]) -> tuple[list[int], list[float]]:
    steps = of(events, "step")
    return [e["step"] for e in steps], [float.fromhex(e["loss"]) for e in steps]


def draw_losses(
    axes: Axes,
    uninterrupted: list[Event],
    killed: list[Event],
    resumed: list[Event],
    compared: int,
) -> None:
    """All runs over the number of steps; equal curves lie on each other."""
    axes.plot(*losses(uninterrupted), color=UNINTERRUPTED, linewidth=7, label="uninterrupted run")
    axes.plot(*losses(killed), color=KILLED, linewidth=1.6, label="run that is killed")
    axes.plot(*losses(resumed), color=RESUMED, linewidth=1.6, label="its resumption, a new process")

    killed_at = of(killed, "kill")[0]["step"]
    resumed_at = of(resumed, "start")[0]["step"]
    axes.axvline(killed_at, color=KILL, linewidth=1.2, linestyle="--")
    axes.axvspan(resumed_at, killed_at, color=RESUMED, alpha=0.18, linewidth=0)
    top = max(losses(uninterrupted)[1])
    axes.annotate(
        f"SIGKILL in the middle of\nthe save of step {killed_at}",
        (killed_at, top),
        xytext=(8, -4),
        textcoords="offset points",
        verticalalignment="top",
    )
    axes.annotate(
        f"resumed at step {resumed_at},\nthe newest complete checkpoint",
        (resumed_at, top),
        xytext=(-8, -4),
        textcoords="offset points",
        horizontalalignment="right",
        verticalalignment="top",
    )
    axes.set_xlim(0, losses(uninterrupted)[0][-1] + 1)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title(
        f"Killed in the middle of a save, resumed: {compared} losses, each equal to the "
        "uninterrupted run's to the last bit",
        loc="left",
        fontweight="bold",
    )
    mark_saves(axes, killed, resumed)
    axes.legend(loc="center right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def mark_saves(axes: Axes, killed: list[Event], resumed: list[Event]) -> None:
    """A mark for each save on the lower edge."""
    at_the_edge: dict[str, Any] = {
        "transform": axes.get_xaxis_transform(),
        "clip_on": False,
        "markeredgewidth": 2,
    }
    for events, color, label in (
        (killed, KILLED, "a checkpoint became durable"),
        (resumed, RESUMED, None),
    ):
        steps = [event["step"] for event in of(events, "durable")]
        heights = [0.02] * len(steps)
        axes.plot(steps, heights, "|", color=color, markersize=11, label=label, **at_the_edge)
    at = of(killed, "kill")[0]["step"]
    label = "the save that was killed"
    axes.plot([at], [0.02], "x", color=KILL, markersize=8, label=label, **at_the_edge)


def draw_last_seconds(axes: Axes, killed: list[Event]) -> None:
    """The end of the killed run to scale: what the trainer did, and what went on behind it."""
    killed_at = of(killed, "kill")[0]["time"]
    saves = [event["time"] - killed_at for event in of(killed, "save")][-ZOOM_SAVES - 1 :]
    # From half an interval between saves before the first that is shown.
    begin = saves[0] - (saves[-1] - saves[0]) / ZOOM_SAVES / 2

    draw_steps(axes, killed, killed_at, begin)
    draw_saves(axes, killed, killed_at, begin)
    axes.plot([0], [0.5], "x", color=KILL, markersize=11, markeredgewidth=2.5, clip_on=False)
    axes.axvline(0, color=KILL, linewidth=1.2, linestyle="--")
    axes.set_xlim(begin, -0.03 * begin)
    axes.set_ylim(-0.5, 2.8)
    axes.set_yticks([0.5, 1.5], ["behind it", "the trainer"])
    axes.set_xlabel("seconds before the kill")
    axes.set_title("The last seconds of the killed run, to scale", loc="left", fontweight="bold")
    axes.legend(
        handles=[
            Patch(color=KILLED, label="a training step"),
            Patch(color=BLOCKED, label="blocked by save()"),
            Patch(color=WRITING, label="writing and committing, behind training"),
        ],
        loc="lower left",
        ncols=3,
        frameon=False,
        bbox_to_anchor=(0.0, -0.04),
    )
    axes.spines[["top", "right"]].set_visible(False)


def draw_steps(axes: Axes, killed: list[Event], killed_at: float, begin: float) -> None:
    """The trainer's steps; each began when the one before, or the save after it, had ended."""
    start: float | None = None
    for event in killed:
        now = event["time"] - killed_at
        if event["event"] == "step" and start is not None and now > begin:
            shade = 0.85 if event["step"] % 2 else 0.55
            axes.broken_barh([(start, now - start)], (1.1, 0.8), color=KILLED, alpha=shade)
            if start > begin:
                axes.text((start + now) / 2, 1.5, str(event["step"]), **IN_A_STEP)
        if event["event"] in ("step", "saved"):
            start = now


def draw_saves(axes: Axes, killed: list[Event], killed_at: float, begin: float) -> None:
    """For each save how long the trainer was blocked, and how long it went on behind it."""
    blocked = {event["step"]: event["blocked_ms"] / 1e3 for event in of(killed, "saved")}
    durable = {event["step"]: event["durable_ms"] / 1e3 for event in of(killed, "durable")}
    for event in of(killed, "save"):
        start = event["time"] - killed_at
        if start < begin:
            continue
        span = blocked[event["step"]]
        told = f"save of step {event['step']}\nblocked {span * 1e3:.0f} ms,"
        if event["step"] in durable:
            until = durable[event["step"]]
            told += f" durable after {until * 1e3:.0f} ms"
            side = "left"
        else:
            until = -start  # the kill
            told += "\nthen killed"
            side = "right"
        axes.broken_barh([(start, span)], (1.1, 0.8), color=BLOCKED, linewidth=0)
        axes.broken_barh([(start + span, until - span)], (0.1, 0.8), color=WRITING)
        axes.annotate(told, (start, 1.9), xytext=(0, 5), textcoords="offset points", ha=side)


def draw_costs(axes: Axes, rows: list[dict[str, Any]], key: str, title: str) -> None:
    """Median and range for each library."""
    for place, row in enumerate(reversed(rows)):
        values = row[key]
        middle = statistics.median(values)
        color = BLOCKED if key == "blocked_ms" else WRITING
        axes.barh(place, middle, height=0.55, color=color, alpha=0.85)
        axes.plot([min(values), max(values)], [place, place], color=KILL, linewidth=1.5, marker="|")
        axes.annotate(
            f"{middle:.1f} ms",
            (max(values), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    names = [row["name"].replace(" + ", "\n+ ") for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names)
    axes.set_xlim(0, 1.22 * max(max(row[key]) for row in rows))
    axes.set_xlabel("milliseconds (median; the line spans least to most)")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
