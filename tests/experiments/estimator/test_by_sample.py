"""What directions of samples know of the gradient: theory against estimates, the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from elasticzo.models import LeNet5
from experiments.estimator.by_sample import KINDS, main, measure, truth_of
from experiments.files import read_json


def test_what_theory_needs_is_autograds() -> None:
    torch.manual_seed(0)
    net, x, y = LeNet5().double(), torch.randn(3, 1, 28, 28).double(), torch.tensor([0, 4, 7])
    truth = truth_of(net, x, y)
    own = []
    for i in range(3):
        loss = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        own.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*net.parameters()])]))
    torch.testing.assert_close(truth.gradient, torch.stack(own).mean(0))
    torch.testing.assert_close(truth.own, torch.stack(own).square().sum(1))
    whole = torch.stack([truth.energy[name, "sample"] for name in net._modules if "conv" in name or
                         "fc" in name]).sum(0)  # fmt: skip
    torch.testing.assert_close(whole, truth.own)


def test_estimates_are_as_good_as_theory_says() -> None:
    """n = 40 estimates of each kind by batches of 16: within 5 standard errors, and those of
    samples better than the batch's (which no batch improves)."""
    torch.manual_seed(1)
    net, x = LeNet5().double(), torch.randn(16, 1, 28, 28).double()
    rows = {row["kind"]: row for row in measure(net, x, torch.arange(16) % 10, range(40))}
    assert set(rows) == {*KINDS}
    for kind in ("weight", "sample", "auto"):
        row = rows[kind]
        assert abs(row["cosine"] - row["theory"]) < 5 * row["error"] + 0.1 * row["theory"], kind
    assert rows["weight"]["theory"] == pytest.approx(107_786**-0.5)
    assert rows["auto"]["theory"] > 5 * rows["sample"]["theory"] > 5 * rows["weight"]["theory"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--batches", "4", "8", "--draws", "2", "--out", str(tmp_path)]
    assert main(given) == 0
    rows = read_json(tmp_path / "by_sample_digits.json")["rows"]
    assert [(row["batch"], row["kind"]) for row in rows] == [(b, k) for b in (4, 8) for k in KINDS]
    assert (tmp_path / "by_sample_digits.png").exists()
    assert main([*given[:-2], "--draws", "1"]) == 2
    assert "draws must be >= 2, got 1" in capsys.readouterr().err
    assert main(["--data", "mnist"]) == 2
    assert "data_dir must name their folder" in capsys.readouterr().err
