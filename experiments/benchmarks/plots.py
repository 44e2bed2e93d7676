"""Pictures of the sections' results, drawn from their JSON."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmarks.section import Row, usable
from experiments.train.plots import pyplot, save

TARGET = 97  # % of two inference passes


def titled(what: str, result: Row, reduced: str = "no measurements") -> str:
    """With the device, and what a reduced run means."""
    warning = f"\nREDUCED: {reduced}" if result["reduced"] else ""
    return f"{what} - {result['device']['name']}{warning}"


def draw_step(path: Path, result: Row) -> None:
    """Throughput of the captured step over the batch, a panel a network."""
    rows = usable(result["rows"], "ratio_step_captured")
    models = list(dict.fromkeys(row["model"] for row in rows))
    plt = pyplot()
    figure, panels = plt.subplots(1, len(models), figsize=(4.2 * len(models), 4), squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        own = [row for row in rows if row["model"] == model and not row["defer"]]
        for dtype, variant in dict.fromkeys((row["dtype"], row["variant"]) for row in own):
            line = [r for r in own if (r["dtype"], r["variant"]) == (dtype, variant)]
            ratios = [r["ratio_step_captured"] for r in line]
            middle = [100 * r["median"] for r in ratios]
            below = [100 * max(r["median"] - r["p20"], 0) for r in ratios]
            above = [100 * max(r["p80"] - r["median"], 0) for r in ratios]
            batches = [r["batch"] for r in line]
            label = f"{variant}, {dtype}"
            axes.errorbar(batches, middle, [below, above], marker=".", capsize=3, label=label)
        axes.axhline(TARGET, color="gray", linestyle="--", linewidth=1)
        axes.set(xscale="log", xlabel="batch", title=result["networks"][model])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    panels[0][0].set_ylabel("step, % of two inference passes")
    figure.suptitle(titled(f"ZO step (dashed: {TARGET} %)", result))
    save(plt, figure, path)


def draw_kernels(path: Path, result: Row) -> None:
    """The part of its floor that each call reaches, by what binds it."""
    rows = usable(result["rows"], "fraction")
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 2 + 0.18 * len(rows)))
    colors = {"memory": "tab:blue", "products": "tab:orange", "noise": "tab:green"}
    for place, row in enumerate(rows):
        axes.barh(place, 100 * row["fraction"], color=colors[row["bound"]])
    names = [f"{row['kernel']} {row['case']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=6)
    axes.invert_yaxis()
    axes.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in colors.values()], [*colors])
    axes.set(xlabel="% of the floor", title=titled("Kernels", result))
    axes.grid(alpha=0.3, axis="x")
    save(plt, figure, path)


def draw_paths(path: Path, result: Row) -> None:
    """log2 of fused over staged, a panel a layer, dtype and noise; the letter is the rule's choice
    and stands in a frame where the other one is faster by 5 %."""
    rows = usable(result["rows"], "regret")
    kinds = list(dict.fromkeys((row["layer"], row["kind"], row["noise"]) for row in rows))
    columns = min(len(kinds), 5)
    lines = -(-len(kinds) // columns)
    plt = pyplot()
    size = (3.6 * columns, 3.4 * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for axes in panels.flat[len(kinds) :]:
        axes.axis("off")
    for axes, kind in zip(panels.flat, kinds, strict=False):
        own = [row for row in rows if (row["layer"], row["kind"], row["noise"]) == kind]
        widths = sorted({(row["width"], row["size"]) for row in own})
        counts = sorted({row["rows"] for row in own})
        grid = [[math.nan] * len(counts) for _ in widths]
        for row in own:
            x, y = counts.index(row["rows"]), widths.index((row["width"], row["size"]))
            grid[y][x] = math.log2(row["fused_over_staged"]["median"])
            wrong = row["regret"] > 1.05
            box = {"edgecolor": "black", "facecolor": "none"} if wrong else None
            axes.text(x, y, row["choice"][0], ha="center", va="center", fontsize=8, bbox=box)
        axes.imshow(grid, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-2, vmax=2)
        axes.set_xticks(range(len(counts)), [str(n) for n in counts], fontsize=6)
        names = [str(w) if size == 1 else f"{w} ({size}x{size})" for w, size in widths]
        axes.set_yticks(range(len(widths)), names, fontsize=6)
        axes.set(title=" ".join(kind), xlabel="images" if kind[0] == "conv2d" else "rows")
    figure.suptitle(titled("blue: fused faster, red: staged; f, s: the choice", result))
    save(plt, figure, path)


def draw_memory(path: Path, result: Row) -> None:
    """Peak memory over inference."""
    rows = [r for r in usable(result["rows"], "over_inference") if r["over_inference"] is not None]
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 1 + 0.2 * len(rows)))
    for place, row in enumerate(rows):
        axes.barh(place, row["over_inference"], color="tab:blue")
    keys = ("model", "dtype", "method", "pairing", "path")
    names = [" ".join(row[key] for key in keys) for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=6)
    axes.invert_yaxis()
    axes.axvline(1.0, color="gray", linestyle="--", linewidth=1)
    axes.set(
        xlabel="peak memory over inference",
        title=titled("Memory of a step", result, "a tiny network"),
    )
    save(plt, figure, path)


def draw_precision(path: Path, result: Row) -> None:
    """Error of g over eps, a panel a network."""
    rows = usable(result["rows"], "error")
    models = list(dict.fromkeys(row["model"] for row in rows))
    plt = pyplot()
    figure, panels = plt.subplots(1, len(models), figsize=(4.5 * len(models), 4), squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        own = [row for row in rows if row["model"] == model]
        for compute, way in dict.fromkeys((row["compute"], row["path"]) for row in own):
            line = [row for row in own if (row["compute"], row["path"]) == (compute, way)]
            style = "-" if way == "fused" else "--"
            label = f"{compute} {way} ({line[0]['computed']})"
            values = [row["error"] for row in line]
            axes.plot([row["eps"] for row in line], values, style, marker=".", label=label)
        axes.set(xscale="log", yscale="log", xlabel="eps", title=model)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel("relative error of g against float64")
    figure.suptitle(titled("Precision", result, "a small batch"))
    save(plt, figure, path)


DRAW: dict[str, tuple[Callable[[Path, Row], None], str]] = {
    "step": (draw_step, "ratio_step_captured"),
    "kernels": (draw_kernels, "fraction"),
    "paths": (draw_paths, "regret"),
    "memory": (draw_memory, "over_inference"),
    "precision": (draw_precision, "error"),
}


def draw(section: str, result: dict[str, Any], folder: Path) -> Path | None:
    """The picture of a section, or None where it has nothing to show."""
    function, key = DRAW[section]
    rows = [row for row in usable(result["rows"], key) if row[key] is not None]
    if not rows:
        return None
    path = folder / f"{section}.png"
    function(path, result)
    return path
