"""Pictures of the sections' results, drawn from their JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.train.plots import pyplot, save

Result = dict[str, Any]
NAMES = {"full-zo": "Full ZO", "cls2": "ZO-Feat-Cls2", "cls1": "ZO-Feat-Cls1"}
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
LAYERS_AT = 64  # directions of the picture by layer


def _pick(rows: Sequence[Result], **wanted: Any) -> list[Result]:
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def _values(rows: Sequence[Result], key: str) -> list[Any]:
    """Different values of a key, in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))


def _error_bars(axes: Any, x: Sequence[Any], found: Sequence[Result], **style: Any) -> None:
    means, spreads = [one["mean"] for one in found], [one["sd"] for one in found]
    axes.errorbar(x, means, spreads, capsize=3, markersize=4, **style)


def _panels(plt: Any, rows: Sequence[Result], height: float = 3.4) -> Any:
    """A panel a method (rows) and state (columns), as (method, state, axes)."""
    methods, states = _values(rows, "method"), _values(rows, "state")
    size = (5 * len(states), height * len(methods))
    figure, grid = plt.subplots(len(methods), len(states), figsize=size, squeeze=False)
    panels = [
        (method, state, grid[i][j])
        for i, method in enumerate(methods)
        for j, state in enumerate(states)
    ]
    for method, state, axes in panels:
        axes.set_title(f"{NAMES[method]}, {state}", fontsize=10)
        axes.grid(alpha=0.3)
    return figure, panels


def _accuracies(axes: Any, settings: Result, xs: Sequence[Any], **style: Any) -> None:
    """Every seed as a dot, mean and standard deviation beside them."""
    for x, one in zip(xs, settings.values(), strict=True):
        axes.plot([x] * one["n"], one["accuracies"], ".", color=style["color"], alpha=0.35)
    _error_bars(axes, xs, list(settings.values()), **style)
    axes.set_ylabel("held-out accuracy (%)")
    axes.grid(alpha=0.3)


def draw_cosine(path: Path, title: str, result: Result) -> None:
    """The whole head over q; each layer at one q in a second picture beside the first."""
    plt = pyplot()
    heads = _pick(result["rows"], layer="head")
    figure, panels = _panels(plt, heads)
    for method, state, axes in panels:
        own = _pick(heads, method=method, state=state)
        for i, (color, variant) in enumerate(zip(COLORS, _values(own, "variant"), strict=False)):
            line = _pick(own, variant=variant)
            qs = [row["queries"] * 1.12 ** (i - 1) for row in line]  # side by side
            _error_bars(axes, qs, line, fmt="o", color=color, label=variant)
            axes.plot(qs, [row["theory"] for row in line], "--", color=color, linewidth=1)
        axes.set(xscale="log", yscale="log", ylim=(1e-4, 1))
        axes.set(xlabel="directions averaged, q", ylabel="cosine to the true gradient")
    panels[0][2].legend(fontsize=8, title="dots: measured, dashed: theory", title_fontsize=8)
    figure.suptitle(f"{title}: cosine of the whole head (mean and standard deviation)", fontsize=11)
    save(plt, figure, path)
    _draw_layers(path.with_name(f"{path.stem}_layers.png"), title, result)


def _draw_layers(path: Path, title: str, result: Result) -> None:
    plt = pyplot()
    q = LAYERS_AT if _pick(result["rows"], queries=LAYERS_AT) else result["rows"][-1]["queries"]
    rows = _pick(result["rows"], queries=q)
    figure, panels = _panels(plt, rows)
    for method, state, axes in panels:
        own = _pick(rows, method=method, state=state)
        layers, variants = _values(own, "layer"), _values(own, "variant")
        for i, (color, variant) in enumerate(zip(COLORS, variants, strict=False)):
            line = _pick(own, variant=variant)
            at = [place + 0.2 * (i - 1) for place in range(len(layers))]
            _error_bars(axes, at, line, fmt="o", color=color, label=variant)
            axes.plot(at, [row["theory"] for row in line], "_", color=color, markersize=14)
        axes.set_xticks(range(len(layers)), layers)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_ylabel("cosine to the true gradient")
    panels[0][2].legend(fontsize=8, title="dots: measured, bars: theory", title_fontsize=8)
    figure.suptitle(f"{title}: cosine by layer, {q} directions averaged", fontsize=11)
    save(plt, figure, path)


def draw_queries(path: Path, title: str, result: Result) -> None:
    """Accuracy over the forward passes spent, a line a q, a panel a method."""
    plt = pyplot()
    methods = _values(result["rows"], "method")
    figure, grid = plt.subplots(1, len(methods), figsize=(5 * len(methods), 4), squeeze=False)
    for axes, method in zip(grid[0], methods, strict=True):
        for color, row in zip(COLORS, _pick(result["rows"], method=method), strict=False):
            label = f"q = {row['queries']}, head rate {row['head_lr']:.1e}"
            spent = [point["passes"] for point in row["curve"]]
            _error_bars(axes, spent, row["curve"], fmt="o-", color=color, label=label)
        axes.set(xlabel=f"forward passes of a batch of {result['batch']}", title=NAMES[method])
        axes.set_ylabel("test accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{title}: the same passes on one or many directions a step", fontsize=11)
    save(plt, figure, path)


def draw_noise(path: Path, title: str, result: Result) -> None:
    """Moments over what they should be, cosines over q, accuracies."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4))
    for color, noise in zip(COLORS, _values(result["rows"], "noise"), strict=False):
        own = _pick(result["rows"], noise=noise)
        offset = -0.1 if color == COLORS[0] else 0.1
        for marker, key, shift in (("o", "g_squared", 0.0), ("s", "length_squared", 4.5)):
            at = [place + offset + shift for place in range(len(own))]
            # The mean of n directions: its standard error.
            bars = [row[key]["sd"] / row[key]["n"] ** 0.5 for row in own]
            means = [row[key]["mean"] for row in own]
            label = noise if key == "g_squared" else None
            left.errorbar(at, means, bars, fmt=marker, color=color, capsize=3, label=label)
        for row in _pick(result["cosines"], noise=noise, state="trained", queries=1):
            line = _pick(result["cosines"], noise=noise, state="trained", method=row["method"])
            style = {"fmt": "o-" if row["method"] == "full-zo" else "s--", "color": color}
            label = f"{noise}, {NAMES[row['method']]}"
            qs = [one["queries"] * (1 + offset / 2) for one in line]
            _error_bars(middle, qs, line, label=label, **style)
    kinds = [f"{NAMES[r['method']]}\n{r['state']}" for r in own]
    places = [*range(len(own)), *(place + 4.5 for place in range(len(own)))]
    left.set_xticks(places, kinds * 2, fontsize=6.5, rotation=90)
    left.axhline(1, color="black", linewidth=0.6)
    left.set(ylabel="over the expectation without curvature")
    left.set_title("left g^2, right |g s z|^2 (mean, standard error)", fontsize=9)
    middle.set(xscale="log", xlabel="directions averaged, q", ylabel="cosine to the true gradient")
    middle.set_title("trained (mean, standard deviation)", fontsize=9)
    for i, (method, settings) in enumerate(result["accuracy"].items()):
        beside = [i * 3 + place for place in range(len(settings))]
        style = {"fmt": "_", "color": COLORS[i], "label": NAMES[method]}
        _accuracies(right, settings, beside, **style)
    ticks = {i * 3 + j: noise for i in (0, 1) for j, noise in enumerate(settings)}
    right.set_xticks(list(ticks), ticks.values(), fontsize=8)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(f"{title}: normal against Rademacher", fontsize=11)
    save(plt, figure, path)


def draw_eps(path: Path, title: str, result: Result) -> None:
    """Errors of g over eps, a panel a method and state; accuracies in a second picture."""
    plt = pyplot()
    figure, panels = _panels(plt, result["rows"])
    styles = {"fp32": "o-", "bf16": "s-", "round-off": "v--", "curvature": "^--"}
    for method, state, axes in panels:
        own = _pick(result["rows"], method=method, state=state)
        for color, (kind, style) in zip(COLORS, styles.items(), strict=True):
            there = [row for row in own if row[kind] is not None]
            epss = [row["eps"] for row in there]
            means = [row[kind]["mean"] for row in there]
            spreads = [row[kind]["sd"] for row in there]
            # A bar that reaches zero has no end on a logarithmic axis.
            below = [min(s, 0.9 * m) for s, m in zip(spreads, means, strict=True)]
            axes.errorbar(
                epss, means, [below, spreads], fmt=style, color=color, label=kind, capsize=2
            )
        line = [row["one_rounding"] for row in own]
        axes.plot([row["eps"] for row in own], line, ":", color="gray", label="one rounding of L")
        axes.axvline(result["accuracy"][method]["recipe_eps"], color="black", linewidth=0.6)
        axes.set(xscale="log", yscale="log", xlabel="eps (units of a weight)")
        axes.set_ylabel("|g - slope| / rms(slope)")
    panels[0][2].legend(fontsize=8)
    figure.suptitle(f"{title}: error of g (upright line: the recipe's eps)", fontsize=11)
    save(plt, figure, path)
    _draw_eps_accuracy(path.with_name(f"{path.stem}_accuracy.png"), title, result["accuracy"])


def _draw_eps_accuracy(path: Path, title: str, accuracy: Result) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 4))
    for color, (method, found) in zip(COLORS, accuracy.items(), strict=False):
        settings = {eps: one for eps, one in found.items() if eps != "recipe_eps"}
        at = [float(eps) for eps in settings]
        _accuracies(axes, settings, at, fmt="o-", color=color, label=NAMES[method])
        axes.axvline(found["recipe_eps"], color=color, linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="eps (units of a weight; dotted: the recipe's)")
    axes.set_title(f"{title}: short runs over eps", fontsize=10)
    axes.legend(fontsize=8)
    save(plt, figure, path)


def draw_tail(path: Path, title: str, result: Result) -> None:
    """Cosines of the tail's gradient by source, relative errors, accuracies."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4))
    groups = [(m, s) for m in _values(result["rows"], "method") for s in ("untrained", "trained")]
    sources = _values(result["rows"], "source")
    for color, source in zip(COLORS, sources, strict=False):
        for i, (method, state) in enumerate(groups):
            (row,) = _pick(result["rows"], method=method, state=state, source=source)
            at = i + 0.18 * (sources.index(source) - 1.5)
            label = source if i == 0 else None
            _error_bars(left, [at], [row["batch"]], fmt="o", color=color, label=label)
            _error_bars(middle, [at], [row["population"]], fmt="o", color=color, label=label)
    for axes, of in ((left, "of the same batch"), (middle, f"of {result['population']} images")):
        names = [f"{NAMES[method]}\n{state}" for method, state in groups]
        axes.set_xticks(range(len(groups)), names, fontsize=7)
        axes.set(ylabel="cosine of the tail's gradient")
        axes.set_title(f"to the unperturbed gradient {of}", fontsize=9)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    for i, (method, settings) in enumerate(result["accuracy"].items()):
        _accuracies(
            right, settings, range(len(settings)), fmt="o-", color=COLORS[i], label=NAMES[method]
        )
    right.set_xticks(range(len(sources)), sources)
    right.legend(fontsize=8)
    figure.suptitle(f"{title}: which pass feeds the tail (mean, standard deviation)", fontsize=11)
    save(plt, figure, path)


DRAW: dict[str, Callable[[Path, str, Result], None]] = {
    "cosine": draw_cosine,
    "queries": draw_queries,
    "noise": draw_noise,
    "eps": draw_eps,
    "tail": draw_tail,
}
