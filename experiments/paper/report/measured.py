"""Tables of the results that are known, from their JSON."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from experiments.paper.compare import DATA_TITLES, METHOD_TITLES
from experiments.paper.report.blocks import Row, Table

Content = Mapping[str, Any]
ESTIMATOR: Mapping[str, str] = {
    "_cosine": "Cosine between the mean of q estimates and the true gradient, whole head.",
    "_cosine_layers": "The same by layer.",
    "_queries": "Accuracy against the forward passes spent, for q directions a step.",
    "_noise": "Normal against Rademacher noise.",
    "_eps": "Error of g against the exact slope, over eps.",
    "_eps_accuracy": "Accuracy of short runs over eps.",
    "_tail": "Which pass feeds the tail.",
}


def nothing(content: Content) -> list[Table]:
    """The pictures say it."""
    return []


def elastic(content: Content) -> list[Table]:
    """A line a cut; what was promised of it."""
    head = ["C", "BP trains", "accuracy %", "peak MB", "predicted MB", "step ms", "x Full ZO"]
    rows: list[Row] = [
        [
            str(p["cut"]),
            f"{p['tail_parameters']:,}",
            f"{mean(p['accuracies']):.2f}",
            f"{p['measured_bytes'] / 1e6:.2f}",
            f"{p['predicted_bytes'] / 1e6:.2f}",
            f"{p['step']['us'] / 1e3:.2f}",
            f"{p['over_full_zo']['median']:.2f}",
        ]
        for p in content["points"]
    ]
    caption = f"Batch {content['batch_size']}; BP trains: parameters; MB: 10^6 bytes."
    promised: list[Row] = [
        [promise, "kept" if holds else "broken"] for promise, holds in content["checks"].items()
    ]
    return [Table(head, rows, caption), Table(["promise", ""], promised)]


def memory_model(content: Content) -> list[Table]:
    """The largest error of each network and batch."""
    kinds = dict.fromkeys((r["network"], r["batch"]) for r in content["rows"])
    rows: list[Row] = []
    for network, batch in kinds:
        own = [
            r["error"] for r in content["rows"] if (r["network"], r["batch"]) == (network, batch)
        ]
        rows.append([network, str(batch), str(len(own)), f"{100 * max(own, key=abs):+.3f} %"])
    return [Table(["network", "batch", "cases", "largest error"], rows)]


def breakdown(content: Content) -> list[Table]:
    """A table a batch: the step and the shares of its stages."""
    tables = []
    for batch in dict.fromkeys(r["batch"] for r in content["rows"]):
        own = [r for r in content["rows"] if r["batch"] == batch]
        stages = list(own[0]["stages"])
        rows: list[Row] = [
            [
                f"{METHOD_TITLES[r['method']]}, {r['precision'].upper()}",
                f"{r['plain']['us'] / 1e3:.2f}",
                *(f"{100 * r['stages'][s]['share']:.0f}" for s in stages),
            ]
            for r in own
        ]
        caption = f"Batch {batch}: the step in ms, its stages in % of their sum."
        tables.append(Table(["method", "ms", *stages], rows, caption))
    return tables


def step_cpu(content: Content) -> list[Table]:
    rows: list[Row] = [
        [
            batch,
            f"{row['two_forwards_ms']:.2f} ms",
            f"{row['elasticzo_step_over_two_forwards']:.2f}x",
            f"{row['mezo_style_step_over_two_forwards']:.2f}x",
        ]
        for batch, row in content["batches"].items()
    ]
    return [Table(["batch", "two plain forwards", "ElasticZO step", "MeZO-style step"], rows)]


def directions(content: Content) -> list[Table]:
    """Time and launches of a step, then peaks by network."""
    tables = []
    for threads, found in content["steps"].items():
        steps: list[Row] = [
            [name, f"{row['ms']:.1f}", f"{row['median']:.2f}x", str(row["launches"])]
            for name, row in found.items()
        ]
        head = ["step, cut", "ms", "over two forwards", "launches"]
        named = f"LeNet-5, batch {content['batch']}, {threads} thread{'s' * (threads != '1')}."
        tables.append(Table(head, steps, named))
    for net, peaks in content["memory"].items():
        whole = peaks["inference"]["measured"]
        rows: list[Row] = [
            [
                name,
                *(f"{peak[k] / 1e6:.1f}" for k in ("predicted", "measured")),
                f"{peak['measured'] / whole:.2f}x",
            ]
            for name, peak in peaks.items()
        ]
        head = ["step", "predicted, MB", "measured, MB", "over inference"]
        tables.append(Table(head, rows, f"{net} samples; optimisers keep nothing."))
    return tables


def int8_step(content: Content) -> list[Table]:
    """Time of a step and of two passes alone; memory in two models."""
    time: list[Row] = [
        [
            f"{METHOD_TITLES[row['method']]}, batch {row['batch']}",
            f"{row['fp32']['us'] / 1e3:.2f}",
            f"{row['int8']['us'] / 1e3:.2f}",
            f"{row['speedup']['median']:.2f}x",
            f"{row['passes']['speedup']['median']:.2f}x",
        ]
        for row in content["time"]
    ]
    memory: list[Row] = [
        [
            f"{METHOD_TITLES[row['method']]}, batch {row['batch']}, {row['pairing']}",
            f"{row['fp32']['measured'] / 1e6:.2f}",
            f"{row['int8']['measured'] / 1e6:.2f}",
            f"{row['ratio']:.2f}x",
            _static_ratio(row),
        ]
        for row in content["memory"]
    ]
    return [
        Table(
            ["step", "FP32 ms", "INT8 ms", "faster", "two passes alone"],
            time,
            f"{content['clock']}, medians of {content['rounds']} rounds.",
        ),
        Table(
            ["memory", "FP32 MB", "INT8 MB", "smaller", "smaller, static model"],
            memory,
            "Measured peaks of a step, weights and batch included, MB: 10^6 bytes; static: the "
            "paper's formulas, every buffer held all the time.",
        ),
    ]


def _static_ratio(row: Content) -> str:
    floats, integers = row["fp32"]["static"], row["int8"]["static"]
    return f"{floats / integers:.2f}x" if floats and integers else ""


def random_walk(content: Content) -> list[Table]:
    """A line a head; differences seed by seed."""
    rows: list[Row] = [
        [head, f"{row['mean']:.2f} ± {row['sd']:.2f}", f"{mean(row['losses']):.3f}"]
        for head, row in content["heads"].items()
    ]
    gains: list[Row] = [
        [name, f"{gain['mean']:+.2f} ± {gain['standard_error']:.2f}"]
        for name, gain in content["gains"].items()
    ]
    seeds = len(content["heads"]["frozen"]["accuracies"])
    return [
        Table(
            ["head", "test accuracy %", "test loss"],
            rows,
            f"Mean ± standard deviation, n = {seeds}.",
        ),
        Table(["points", ""], gains, "Mean ± standard error of the differences seed by seed."),
    ]


def int8_sweep(content: Content) -> list[Table]:
    """A table a method: one change of the recipe at a time."""
    tables = []
    for method, entry in content["methods"].items():
        rows: list[Row] = [
            [change, f"{p['mean']:.2f}" + _error(p["standard_error"])]
            for change, p in entry["points"].items()
        ]
        caption = (
            f"{METHOD_TITLES[method]}, {content['epochs']} epochs of {content['train_images']}"
        )
        tables.append(Table(["change", "held-out %"], rows, f"{caption} images", folded=True))
    return tables


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.2f}"


def integer_signs(content: Content) -> list[Table]:
    """Steps that differ, and the cost of the loss, by F."""
    bits = list(content["rows"][0]["fraction_bits"])
    differ: list[Row] = []
    cost: list[Row] = []
    for row in content["rows"]:
        data = DATA_TITLES.get(row["data"], row["data"])
        name = f"{data}, {METHOD_TITLES[row['method']]}, batch {row['batch']}"
        found = row["fraction_bits"]
        differ.append([
            name, str(row["steps"]),
            *(f"{100 * found[f]['wrong']:.2f} / {100 * found[f]['zero']:.2f}" for f in bits),
        ])  # fmt: skip
        cost.append([name, *(f"{row['cost_us'][f]:.0f}" for f in (*bits, "float64"))])
    names = [f"F = {f}" for f in bits]
    smallest = content["smallest_fraction_bits"]
    said = "none of these" if smallest is None else f"F = {smallest}"
    return [
        Table(
            ["run", "steps", *names],
            differ,
            f"Opposite signs / no sign, in % of the steps. At most 0.1 % of the steps differ in "
            f"every run with {said}.",
        ),
        Table(["run", *names, "float64"], cost, "Both losses of a step, microseconds of CPU time."),
    ]


def integer_loss(content: Content) -> list[Table]:
    bits = list(content["rows"][0]["fraction_bits"])
    rows: list[Row] = []
    for row in content["rows"]:
        found = row["fraction_bits"]
        halved = ", range one bit more" if row["minus_halved"] else ""
        rows.append([
            f"batch {row['batch']}, exponent {row['exponent']}, change {row['change']}{halved}",
            *(f"{100 * found[f]['wrong']:.2f} / {100 * found[f]['zero']:.2f}" for f in bits),
        ])  # fmt: skip
    caption = f"Opposite signs / no sign, in % of {content['trials']} steps."
    return [Table(["logits", *(f"F = {f}" for f in bits)], rows, caption, folded=True)]


def accuracy(content: Content) -> list[Table]:
    rows: list[Row] = [
        [METHOD_TITLES[method], f"{row['mean']:.2f} ± {row['standard_error']:.2f}"]
        for method, row in content["methods"].items()
    ]
    caption = f"In %, {content['epochs']} epochs, batch {content['batch_size']}."
    precision = next(iter(content["methods"].values()))["config"]["precision"]
    return [Table(["test accuracy", precision.upper()], rows, caption)]
