"""The estimator's study: its theory and its measurements against what is known exactly."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.estimator import __main__ as command
from experiments.estimator import eps, tail, theory
from experiments.estimator.probe import Probe, along, cosines, stats
from experiments.estimator.settings import REDUCED, SECTIONS
from experiments.train.config import TrainConfig
from experiments.train.data import load_data
from experiments.train.learner import FloatLearner
from experiments.train.resolve import resolve
from zo_kernels import reference

DIRECTIONS = 800
NOISES = pytest.mark.parametrize("noise", ["normal", "rademacher"])


class Sum(nn.Module):
    """Linear in all of its weights at once: the gradient of a mean output is that of its inputs."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(n, 1, False) for name, n in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        start, out = 0, torch.zeros(len(x), 1, dtype=x.dtype)
        for layer in self.layers.values():
            out = out + layer(x[:, start : start + layer.in_features])
            start += layer.in_features
        return out


def mean_output(output: Tensor, y: Tensor) -> Tensor:
    return output.mean()


def linear_probe(**sizes: int) -> tuple[Probe, Tensor]:
    """The probe of a linear model, and the gradient that it must have found."""
    torch.manual_seed(0)
    x = torch.randn(4, sum(sizes.values())) * torch.linspace(0.1, 2.0, sum(sizes.values()))
    probe = Probe(Sum(sizes), 0, x, torch.zeros(4), mean_output)
    return probe, x.double().mean(0)


def smooth_probe() -> Probe:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))
    return Probe(net, 0, torch.randn(16, 6), torch.arange(16) % 3, cross_entropy)


def within(values: list[float], expected: float) -> None:
    """The mean is within 5 of its standard errors."""
    found = stats(values)
    assert abs(found["mean"] - expected) < 5 * found["sd"] / math.sqrt(found["n"])


@NOISES
def test_estimates_follow_theory(noise: str) -> None:
    probe, gradient = linear_probe(a=60, b=30)
    torch.testing.assert_close(probe.gradient, gradient)
    model = probe.wrapped(eps=0.1, noise=noise, scale={"layers.b.*": 0.5})
    parts = probe.parts(model)
    head = list(parts.values())
    assert [(part.size, part.scale) for part in head] == [(60, 1.0), (30, 0.5)]
    squares, dots, lengths, b_lengths = [], [], [], []
    mean, b = torch.zeros(90), slice(60, 90)
    for i, (g, estimate) in enumerate(probe.directions(model, DIRECTIONS), start=1):
        squares.append(g * g)
        mean += estimate / 4
        if i % 4 == 0:
            dots.append(float(mean.double() @ gradient))
            lengths.append(float(mean.square().sum()))
            b_lengths.append(float(mean[b].square().sum()))
            mean.zero_()
    within(squares, theory.variance_of_g(head))
    within(dots, float(gradient[:60].square().sum() + 0.25 * gradient[b].square().sum()))
    within(lengths, theory.squared_norm(head, head, 4, noise))
    within(b_lengths, theory.squared_norm(head[1:], head, 4, noise))


@NOISES
def test_cosines_follow_theory(noise: str) -> None:
    probe, _ = linear_probe(a=2000)
    model = probe.wrapped(eps=0.1, noise=noise, scale={})
    (part,) = probe.parts(model).values()
    told: list[int] = []
    found = cosines(probe, model, (1, 4, 16), DIRECTIONS, told.append)
    assert sum(told) == 2 * DIRECTIONS
    for q in (1, 4, 16):
        values = found["head", q]
        assert len(values) == DIRECTIONS // q and found["layers.a", q] == values
        expected = theory.cosine([part], [part], q, noise)
        assert expected == pytest.approx(math.sqrt(q / (q + 2000)), rel=1e-3)
        # The mean of chi_q lies below its root mean square.
        below = math.sqrt(2 / q) * math.gamma((q + 1) / 2) / math.gamma(q / 2)
        within(values, expected * below)


def test_cosines_want_nested_averages() -> None:
    probe, _ = linear_probe(a=3)
    model = probe.wrapped(eps=0.1, noise="normal", scale={})
    for queries in ((2, 4), (1, 4, 6)):
        with pytest.raises(ValueError, match="queries must begin with 1 and each divide the next"):
            cosines(probe, model, queries, 8)


def test_an_estimate_is_g_times_z() -> None:
    probe = smooth_probe()
    model = probe.wrapped(eps=1e-3, noise="normal", scale={"2.*": 3.0}, seed=5)
    names = [name for name, _ in probe.net.named_parameters()]
    for step, (g, estimate) in enumerate(probe.directions(model, 3)):
        for index, (name, p) in enumerate(probe.net.named_parameters()):
            z = reference.sample(p.shape, torch.tensor([5, step]), tensor=index)
            scale = 3.0 if name.startswith("2.") else 1.0
            wanted = g * scale * z.flatten()
            torch.testing.assert_close(estimate[probe.places[name]], wanted, rtol=1e-5, atol=1e-5)
    assert list(probe.places) == names
    for p, q in zip(model.parameters(), probe.net.parameters(), strict=True):
        assert torch.equal(p, q)


@NOISES
def test_slopes_are_the_derivative_along_z(noise: str) -> None:
    probe = smooth_probe()
    model = probe.wrapped(eps=1e-3, noise=noise, scale={"0.*": 2.0}, queries=2, seed=7)
    found = probe.slopes(model)
    wide = {k: v.detach().double() for k, v in probe.net.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(probe.net, weights, (probe.x.double(),))
        return cross_entropy(out, probe.y)

    for query in range(2):
        z = {
            name: (2.0 if name.startswith("0.") else 1.0)
            * reference.sample(w.shape, torch.tensor([7, 0]), tensor=i, query=query, noise=noise)
            for i, (name, w) in enumerate(wide.items())
        }
        z = {name: one.double() for name, one in z.items()}
        _, exact = torch.func.jvp(loss, (wide,), (z,))
        assert float(found[query]) == pytest.approx(float(exact), rel=1e-5)
    exact_g = probe.projected(probe.wrapped(
        eps=1e-4, noise=noise, scale={"0.*": 2.0}, queries=2, seed=7, wide=True
    ))  # fmt: skip
    torch.testing.assert_close(exact_g, found, rtol=1e-4, atol=1e-6)


def test_the_best_eps_lies_between_round_off_and_curvature() -> None:
    probe = smooth_probe()
    bench: Any = SimpleNamespace(sizes=SimpleNamespace(slopes=16), told=lambda passes: None)
    epss = (1e-5, 1e-3, 1e-2, 3e-2, 1e-1)
    rows = {e: eps.errors(bench, probe, {"eps": e, "noise": "normal", "scale": {}}) for e in epss}
    best = min(epss, key=lambda e: rows[e]["fp32"]["mean"])
    assert epss[0] < best < epss[-1]
    for end in (epss[0], epss[-1]):
        assert rows[end]["fp32"]["mean"] > 10 * rows[best]["fp32"]["mean"]
    # Round-off as 1 / eps, about one rounding of each loss; curvature as eps^2.
    off = rows[1e-5]["round-off"]["mean"]
    assert 0.1 < off / rows[1e-5]["one_rounding"] < 10
    assert 30 < off / rows[1e-3]["round-off"]["mean"] < 300
    grows = rows[3e-2]["curvature"]["mean"] / rows[1e-2]["curvature"]["mean"]
    assert grows == pytest.approx(9.0, rel=0.1)
    assert rows[1e-5]["bf16"] is None and rows[1e-1]["bf16"]["sd"] > 0


def test_a_clean_pass_gives_the_true_gradient_of_the_tail(small: TrainConfig) -> None:
    bench: Any = SimpleNamespace(
        sizes=SimpleNamespace(population=100, tail_batches=6), told=lambda passes: None
    )
    config = resolve(replace(small, hold_out=200))
    learner = FloatLearner(config, load_data(config))
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    rows = {row["source"]: row for row in tail.compared(bench, learner)}
    assert rows["clean"]["batch"]["mean"] == pytest.approx(1.0, abs=1e-6)
    assert rows["clean"]["error"]["mean"] < 1e-5
    # Odd terms in z cancel in the mean.
    for source in ("plus", "minus"):
        assert rows["mean"]["error"]["mean"] < 0.7 * rows[source]["error"]["mean"]
        assert rows["mean"]["batch"]["mean"] > rows[source]["batch"]["mean"]
    assert all(torch.equal(v, before[k]) for k, v in learner.model.state_dict().items())


def test_along() -> None:
    a = torch.tensor([3.0, 4.0])
    assert along(a, 2 * a) == pytest.approx(1.0) and along(a, torch.zeros(2)) == 0.0
    assert along(a, torch.tensor([4.0, -3.0], dtype=torch.float64)) == pytest.approx(0.0)


def reduced(folder: Path, *more: str) -> list[str]:
    return [
        "--reduced", "--data", "digits", "--device", "cpu", "--seeds", "1",
        "--out", str(folder / "runs"), "--results", str(folder / "results"), *more,
    ]  # fmt: skip


def spreads(value: Any) -> list[bool]:
    """For every mean in a result, whether a standard deviation stands beside it."""
    if isinstance(value, dict):
        own = ["sd" in value] if isinstance(value.get("mean"), float) else []
        return own + [found for one in value.values() for found in spreads(one)]
    return [found for one in value for found in spreads(one)] if isinstance(value, list) else []


def test_reduced_command(tmp_path: Path) -> None:
    assert command.main(reduced(tmp_path)) == 0
    results = tmp_path / "results"
    pictures = {f"estimator_digits_reduced_{name}.png" for name in SECTIONS}
    pictures |= {"estimator_digits_reduced_cosine_layers.png"}
    pictures |= {"estimator_digits_reduced_eps_accuracy.png"}
    assert {p.name for p in results.glob("*.png")} == pictures
    text = (results / "estimator_digits_reduced.json").read_text()
    assert str(tmp_path) not in text
    sections = json.loads(text)["sections"]
    assert list(sections) == list(SECTIONS)
    assert all(spreads(sections)) and len(spreads(sections)) > 100
    for section in sections.values():
        assert section["commit"] and section["versions"]["torch"] and section["hardware"]

    spent = {row["queries"]: row["curve"][-1]["passes"] for row in sections["queries"]["rows"]}
    assert spent == {q: sections["queries"]["passes"] for q in REDUCED.passes_queries}
    for row in sections["queries"]["rows"]:
        best = max(row["tuning"], key=lambda one: one["accuracy"])
        assert row["head_lr"] == best["head_lr"]
        assert row["curve"][-1]["mean"] == row["mean"]
    # With the recipe's scales the noise of fc1 no longer drowns the convolutions.
    rows = {(r["variant"], r["layer"]): r for r in sections["cosine"]["rows"]
            if (r["method"], r["state"], r["queries"]) == ("full-zo", "untrained", 4)}  # fmt: skip
    assert rows["recipe", "conv1"]["theory"] > 2 * rows["no scales", "conv1"]["theory"]
    assert rows["no scales", "head"]["size"] == 107_786

    runs = sorted((tmp_path / "runs" / "digits").glob("*/result.json"))
    times = [run.stat().st_mtime_ns for run in runs]
    assert command.main(reduced(tmp_path, "--only", "queries")) == 0
    assert times == [run.stat().st_mtime_ns for run in runs]
    again = json.loads((results / "estimator_digits_reduced.json").read_text())["sections"]
    assert again["cosine"] == sections["cosine"] and list(again) == list(SECTIONS)


def test_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(reduced(tmp_path, "--seeds", "0")) == 2
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err
    assert command.main(reduced(tmp_path, "--threads", "0")) == 2
    assert "threads must be in [1, 1024], got 0" in capsys.readouterr().err
    assert command.main(["--out", str(tmp_path / "runs")]) == 2
    assert "data_dir must name their folder" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
