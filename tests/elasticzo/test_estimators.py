"""What holds for every estimator: a new one is a line in `ESTIMATORS`, and is tested here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elasticzo import (
    ZOSGD,
    ElasticZO,
    Estimator,
    TrajectoryLog,
    capture_step,
    low_rank,
    one_sided,
    pair_losses,
    replay,
    spsa,
)
from elasticzo.estimator import ESTIMATORS
from elasticzo.head import HeadParameter
from tests.elasticzo.zoo import ZOO, build, smooth_loss

SETTINGS: dict[str, dict[str, Any]] = {"low_rank": {"rank": 2, "every": 1}}
STEPS = 1500
FEW = ("residual_cnn", "padding", "conv1d")
MANY = (*FEW, "odd_convs", "transformer", "vit", "lstm_time_first", "tied", "functional", "scales")
every = pytest.mark.parametrize("name", list(ESTIMATORS))


def make(name: str, queries: int = 1, noise: str = "normal") -> Estimator:
    return ESTIMATORS[name](queries=queries, noise=noise, **SETTINGS.get(name, {}))


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@every
def test_it_is_unbiased_on_a_quadratic(name: str, noise: str) -> None:
    """f(w) = w'Aw / 2 + b'w at w = 0, gradient b; n = 1,500 steps of two queries, 5 sigma. The
    third moments of all directions vanish, so a one-sided difference has no bias here either."""
    estimator, backend = make(name, 2, noise), "auto"
    root = torch.randn(12, 12, dtype=torch.float64)
    a, b = root @ root.t() / 12, torch.randn(3, 4, dtype=torch.float64)

    def f(w: Tensor) -> Tensor:
        flat = w.flatten()
        return 0.5 * flat @ a @ flat + (b * w).sum()

    w, eps = torch.zeros(3, 4, dtype=torch.float64), torch.tensor(1e-3, dtype=torch.float64)
    head, estimates = HeadParameter("w", 3, 1.0), []
    for step in range(STEPS):
        key = torch.tensor([11, step])
        points = (head, w, key, eps, estimator.points, None, backend)
        losses = torch.stack([f(at) for at in estimator.direction.weights(*points)])
        coeff = estimator.coefficients(estimator.project(losses, eps), None)
        estimates.append(estimator.direction.sum(head, w, key, coeff, backend))
    found = torch.stack(estimates)
    sigma = found.std(0) / STEPS**0.5
    assert ((found.mean(0) - b).abs() <= 5 * sigma).all()


def wrapped(name: str, model: str, **settings: Any) -> tuple[ElasticZO, Any]:
    case = ZOO[model]
    net, inputs = build(case, dtype=torch.float32)
    how = {"estimator": make(name, 2), "eps": 1e-2, "seed": 7, "pairing": case.pairings[0]}
    return ElasticZO(copy.deepcopy(net), case.tail, **(how | settings)).train(), inputs


def train(model: ElasticZO, inputs: Any, steps: int = 3, zo: Any = None, **how: Any) -> Any:
    zo = zo or ZOSGD(model, lr=1e-2, weight_decay=0.1, **how)
    tail = model.tail_optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    for _ in range(steps):
        torch.manual_seed(3)
        losses = pair_losses(smooth_loss, model(*inputs))
        model.backward(losses)
        tail.step()
        tail.zero_grad()
        zo.step(losses)
    return model.state_dict()


def over(models: Sequence[str]) -> Any:
    """Every estimator on these models; the paper's, which test_matrix.py has on all, on few."""
    pairs = [(e, m) for e in ESTIMATORS for m in models if e != "spsa" or m in FEW]
    return pytest.mark.parametrize(("name", "model"), pairs)


@pytest.mark.filterwarnings("ignore:the model draws")
@over(MANY)
def test_forwards_are_those_of_explicitly_moved_weights(name: str, model: str) -> None:
    zo, inputs = wrapped(name, model)
    torch.manual_seed(3)
    outputs = zo(*inputs)
    points, key, eps = zo.estimator.points, zo.session.key, zo.session.eps
    assert len(outputs) == zo.halves == len(points)
    at = {
        head.name: zo.estimator.direction.weights(head, w, key, eps, points, None, "auto")
        for head, w in zo.head
    }
    for place in range(len(points)):
        moved, _ = build(ZOO[model], dtype=torch.float32)
        for head in zo.head.parameters.values():
            w = moved.get_parameter(head.name)
            stays = w.detach().clone() if head.still_row is not None else None
            w.data.copy_(at[head.name][place])
            if stays is not None:
                w.data[head.still_row] = stays[head.still_row]
        torch.manual_seed(3)
        pairing = ZOO[model].pairings[-1]
        plain = ElasticZO(moved, tail="all", seed=7, pairing=pairing).train()
        torch.testing.assert_close(outputs[place], plain(*inputs)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the model draws")
@over([n for n in MANY if len(ZOO[n].pairings) == 2])
def test_stacked_and_one_by_one_give_the_same_step(name: str, model: str) -> None:
    states = [train(*wrapped(name, model, pairing=p), 2) for p in ("stacked", "sequential")]
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-3, atol=1e-4, msg=key)


@over(FEW)
def test_deferred_captured_and_replayed_runs_have_the_same_bits(
    name: str, model: str, tmp_path: Path
) -> None:
    first, inputs = wrapped(name, model)
    start = copy.deepcopy(first)
    zo = ZOSGD(first, lr=1e-2, weight_decay=0.1)
    log = TrajectoryLog(tmp_path / "log", zo)
    wanted = train(first, inputs, zo=zo)
    log.drain()
    assert all(map(torch.equal, wanted.values(), train(*wrapped(name, model), defer=True).values()))
    captured, _ = wrapped(name, model)
    lr, rate = torch.tensor(1e-2, dtype=torch.float64), torch.tensor(0.05)
    tail = captured.tail_optimizer(torch.optim.SGD, lr=rate, momentum=0.9)
    step = capture_step(ZOSGD(captured, lr, weight_decay=0.1), smooth_loss, inputs, (), tail=tail)
    for _ in range(3):
        step(inputs, ())
    assert all(map(torch.equal, wanted.values(), captured.state_dict().values()))
    assert replay(log.path, start) == 3
    for a, b in zip(first.head_parameters(), start.head_parameters(), strict=True):
        assert torch.equal(a, b)


@every
def test_a_run_goes_on_from_its_state(name: str) -> None:
    """Four steps of the head, and two and two with a state in between."""
    model, inputs = wrapped(name, "padding")
    zo = ZOSGD(model, lr=1e-2)

    def steps(model: ElasticZO, zo: ZOSGD) -> list[Tensor]:
        for _ in range(2):
            zo.step(pair_losses(smooth_loss, model(*inputs)))
        return [p.detach().clone() for p in model.head_parameters()]

    steps(model, zo)
    other, _ = wrapped(name, "padding")
    other.load_state_dict(model.state_dict())
    resumed = ZOSGD(other, lr=1e-2)
    resumed.load_state_dict(zo.state_dict())
    assert all(map(torch.equal, steps(model, zo), steps(other, resumed)))


@pytest.mark.parametrize("saved", [n for n in ESTIMATORS if n != "spsa"])
def test_a_state_and_a_log_of_another_estimator_are_refused(saved: str, tmp_path: Path) -> None:
    model, inputs = wrapped(saved, "padding")
    zo = ZOSGD(model, lr=1e-2)
    log = TrajectoryLog(tmp_path / "log", zo)
    train(model, inputs, 1, zo=zo)
    log.drain()
    other, _ = wrapped("spsa", "padding")
    with pytest.raises(ValueError, match="estimator"):
        ZOSGD(other, lr=1e-2).load_state_dict(zo.state_dict())
    with pytest.raises(ValueError, match="estimator"):
        replay(log.path, other)


def test_the_base_point_is_shared_and_first() -> None:
    model, inputs = wrapped("one_sided", "input_twice")
    outputs = model(*inputs)
    assert outputs.shape[0] == 3
    torch.testing.assert_close(outputs[0], model.eval()(*inputs))


def test_sources_of_the_tail() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    for source, wanted in {"clean": [1.0, 0, 0], "plus": [0, 0.5, 0.5]}.items():
        model = ElasticZO(nn.Sequential(nn.Linear(2, 2)), 0, estimator=one_sided(2)).train()
        model(torch.randn(3, 2))
        losses.grad = None
        model.backward(losses, source)
        assert losses.grad is not None and losses.grad.tolist() == wanted
        with pytest.raises(ValueError, match=r"source must be one of \('mean', 'plus', 'clean'\)"):
            model.backward(losses, "minus")


def test_low_rank_keeps_a_factor_for_its_period() -> None:
    """Directions of one period span a space of rank r; those of another lie in another one."""
    direction = low_rank(rank=2, every=5).direction
    head, w = HeadParameter("w", 0, 1.0), torch.zeros(20, 30)
    one = torch.ones(1, dtype=torch.float64)

    def z(step: int) -> Tensor:
        return direction.sum(head, w, torch.tensor([3, step]), one, "auto")

    held = torch.cat([z(step) for step in range(5)])
    assert torch.linalg.matrix_rank(held, rtol=1e-4) == 2
    assert torch.linalg.matrix_rank(torch.cat([held, z(5)]), rtol=1e-4) == 4
    draws = torch.stack([z(5 * period) for period in range(2000)])
    n = draws.numel()  # the fourth moment of a product of normals over r = 2 is 6: sd of the square
    assert abs(float(draws.square().mean()) - 1.0) <= 5 * (n / (20 * 30)) ** -0.5 * 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 2}, "estimator has its own noise and queries"),
        ({"noise": "rademacher"}, "estimator has its own noise and queries"),
    ],
)
def test_noise_and_queries_belong_to_the_estimator(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElasticZO(nn.Linear(2, 2), tail=0, estimator=spsa(), **settings)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: spsa(queries=0), r"queries must be an integer in \[1, 2\^24\), got 0"),
        (lambda: one_sided(noise="cauchy"), r"noise must be one of .*got 'cauchy'"),
        (lambda: low_rank(rank=0), r"rank must be an integer in \[1, 65536\], got 0"),
        (lambda: low_rank(every=0.5), r"every must be an integer in .*got 0.5"),
    ],
)
def test_settings_are_refused_by_name(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()
