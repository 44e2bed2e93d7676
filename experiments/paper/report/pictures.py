"""Pictures as text of the page: drawn here, or read from beside the results."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from experiments.paper.compare import ARITHMETIC_TITLES, METHOD_TITLES, Runs, Scene
from experiments.paper.report.blocks import Picture
from experiments.train.plots import pyplot

COLORS = {"fp32": "#1f4e79", "int8": "#c55a11", "int8-float": "#7f7f7f"}
SHIFT = 0.24  # of an arithmetic beside another, in rows
WIDTH = 5.4  # inches: its letters can be read on a telephone


def dots(runs: Runs, scene: Scene) -> Picture | None:
    """Every seed's test accuracy as a dot, means as bars; None where nothing ran."""
    arithmetics = [a for a in runs.arithmetics if _any(runs, scene, a)]
    if not arithmetics:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, 0.42 * len(runs.methods) + 1.2))
    for i, arithmetic in enumerate(arithmetics):
        label: str | None = ARITHMETIC_TITLES[arithmetic]
        for place, method in enumerate(runs.methods):
            found = list(runs.accuracies(scene, arithmetic, method).values())
            y = place + SHIFT * (i - (len(arithmetics) - 1) / 2)
            color = COLORS[arithmetic]
            if found:
                style = {"color": color, "alpha": 0.5, "markersize": 4, "label": label}
                axes.plot(found, [y] * len(found), "o", **style)
                middle = sum(found) / len(found)
                axes.plot([middle], [y], "|", color=color, markersize=11)
                label = None
    axes.set_yticks(range(len(runs.methods)), [METHOD_TITLES[m] for m in runs.methods], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy (%)", fontsize=9)
    axes.tick_params(axis="x", labelsize=9)
    axes.grid(alpha=0.3, axis="x")
    figure.legend(fontsize=8, loc="upper center", ncols=3, frameon=False, columnspacing=1)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    caption = f"{scene.title}: a dot a seed, a bar their mean."
    return Picture(_svg(plt, figure), caption)


def _any(runs: Runs, scene: Scene, arithmetic: str) -> bool:
    own = (r["arithmetic"] == arithmetic for r in _of(runs, scene))
    return any(own)


def _of(runs: Runs, scene: Scene) -> list[dict[str, Any]]:
    wanted = (scene.section, scene.data, scene.rotate)
    return [
        run
        for run in runs.content["runs"]
        if (run["section"], run["data"], run.get("rotate")) == wanted
    ]


def _svg(plt: Any, figure: Any) -> str:
    """The same figures give the same text."""
    buffer = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "elasticzo", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return _uri("image/svg+xml", buffer.getvalue())


def beside(path: Path, caption: str) -> Picture:
    """A PNG of the results."""
    return Picture(_uri("image/png", path.read_bytes()), caption, wide=True)


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
