"""Pictures of runs, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from elasticzo.files import whole

Lines = Sequence[Mapping[str, Any]]


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(plt: Any, figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all."""
    figure.tight_layout()
    with whole(path) as temporary:
        # Without a date inside, the same numbers give the same file.
        figure.savefig(temporary, format=path.suffix[1:], dpi=120, metadata={"Software": None})
    plt.close(figure)


def _curve(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    known = [line for line in lines if line[key] is not None]
    return [line["step"] for line in known], [line[key] for line in known]


def draw_curves(path: Path, title: str, train: Lines, test: Lines) -> None:
    """Loss and test accuracy of one run over its steps."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot(*_curve(train, "loss"), label="training", linewidth=1)
    left.plot(*_curve(test, "test_loss"), label="test", marker=".")
    left.set(xlabel="step", ylabel="loss", title=title)
    left.legend()
    right.plot(*_curve(test, "test_accuracy"), marker=".")
    right.set(xlabel="step", ylabel="test accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save(plt, figure, path)


def draw_accuracies(path: Path, title: str, runs: Mapping[str, Lines]) -> None:
    """Test accuracy of several runs over their steps."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, test in runs.items():
        axes.plot(*_curve(test, "test_accuracy"), marker=".", label=name)
    axes.set(xlabel="step", ylabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save(plt, figure, path)


def draw_points(
    path: Path, title: str, points: Mapping[str, Sequence[float]], floors: Mapping[str, float]
) -> None:
    """Accuracies of every seed, their mean with its standard error, the floor of each method."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for place, (name, values) in enumerate(points.items()):
        axes.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.4)
        mean = sum(values) / len(values)
        axes.errorbar(place, mean, standard_error(values), fmt="_", color="black", capsize=6)
        axes.annotate(f"{mean:.2f}", (place, mean), (10, -3), textcoords="offset points")
        if name in floors:
            axes.plot([place - 0.3, place + 0.3], [floors[name]] * 2, "--", color="tab:red")
    axes.set_xticks(range(len(points)), points)
    axes.margins(x=0.12)
    axes.set(ylabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.3, axis="y")
    save(plt, figure, path)


@dataclass(frozen=True)
class Grid:
    """Accuracies in % over head_lr (columns) and eps (rows); None diverged."""

    lrs: Sequence[float]
    epss: Sequence[float]
    values: Sequence[Sequence[float | None]]
    default: tuple[float, float]  # head_lr, eps


def draw_grids(path: Path, title: str, grids: Mapping[str, Grid]) -> None:
    """A heat map a method; a cross where a run diverged, a frame around the default."""
    plt = pyplot()
    figure, all_axes = plt.subplots(1, len(grids), figsize=(5.5 * len(grids), 4), squeeze=False)
    for axes, (name, grid) in zip(all_axes[0], grids.items(), strict=True):
        filled = [[float("nan") if v is None else v for v in row] for row in grid.values]
        axes.imshow(filled, aspect="auto", origin="lower", vmin=10, vmax=100)
        for row, values in enumerate(grid.values):
            for column, value in enumerate(values):
                text = "x" if value is None else f"{value:.1f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=8)
        at = (grid.lrs.index(grid.default[0]) - 0.5, grid.epss.index(grid.default[1]) - 0.5)
        axes.add_patch(plt.Rectangle(at, 1, 1, fill=False, edgecolor="red", linewidth=2))
        axes.set_xticks(range(len(grid.lrs)), [f"{lr:.1e}" for lr in grid.lrs], fontsize=7)
        axes.set_yticks(range(len(grid.epss)), [f"{e:g}" for e in grid.epss])
        axes.set(xlabel="head_lr", ylabel="eps", title=name)
    figure.suptitle(f"{title} (held-out accuracy in %, x: diverged, framed: default)")
    save(plt, figure, path)


def draw_changes(
    path: Path, title: str, methods: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """A panel a method: accuracies of every change to its recipe, which is the first and a line."""
    plt = pyplot()
    figure, all_axes = plt.subplots(1, len(methods), figsize=(4.2 * len(methods), 5), squeeze=False)
    for axes, (method, points) in zip(all_axes[0], methods.items(), strict=True):
        for place, values in enumerate(points.values()):
            axes.plot(values, [-place] * len(values), "o", color="tab:blue", alpha=0.4)
            axes.plot([sum(values) / len(values)], [-place], "|", color="black", markersize=14)
        recipe = next(iter(points.values()))
        axes.axvline(sum(recipe) / len(recipe), color="tab:red", linewidth=1)
        axes.set_yticks([-place for place in range(len(points))], points)
        axes.set(xlabel="accuracy (%)", title=method)
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(f"{title}, one change at a time (red: the recipe)")
    save(plt, figure, path)


def draw_elastic(
    path: Path, title: str, points: Sequence[Mapping[str, Any]], inference: int
) -> None:
    """Accuracy, peak memory (measured and predicted) and time of a step over the cut C."""
    plt = pyplot()
    figure, (accuracy, memory, time) = plt.subplots(1, 3, figsize=(14, 4))
    at = [p["cut"] for p in points]
    means = [sum(p["accuracies"]) / len(p["accuracies"]) for p in points]
    errors = [standard_error(p["accuracies"]) for p in points]
    accuracy.errorbar(at, means, errors, marker="o", capsize=3)
    accuracy.set(ylabel="test accuracy (%)", title=title)
    for kind, style in (("measured", "o-"), ("predicted", "x--")):
        memory.plot(at, [p[f"{kind}_bytes"] / 1e6 for p in points], style, label=kind)
    memory.axhline(inference / 1e6, color="gray", linestyle=":", label="inference (predicted)")
    memory.set(ylabel="peak memory of a step (MB)", ylim=(0, None))
    memory.legend()
    middle = [p["step"]["us"] / 1e3 for p in points]
    low = [m - p["step"]["us_20"] / 1e3 for m, p in zip(middle, points, strict=True)]
    high = [p["step"]["us_80"] / 1e3 - m for m, p in zip(middle, points, strict=True)]
    time.errorbar(at, middle, [low, high], marker="o", capsize=3)
    time.set(ylabel="time a step (ms, median, 20-80 %)", ylim=(0, None))
    for axes in (accuracy, memory, time):
        axes.set_xlabel("cut C: layers that ZO trains (0: Full BP)")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    save(plt, figure, path)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 of a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
