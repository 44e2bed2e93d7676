"""The contracts of BatchNorm and dropout, in head and tail."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses
from zo_kernels import sample


def bn_net(momentum: float | None = 0.3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.Flatten(), nn.Linear(64, 3)
    )


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
@pytest.mark.parametrize("momentum", [0.3, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("tail", [["3"], ["1", "3"]], ids=["head-bn", "tail-bn"])
def test_running_statistics_move_once_by_the_average_over_the_halves(
    tail: list[str], momentum: float | None, pairing: str
) -> None:
    x = torch.randn(5, 2, 6, 6)
    model = ElasticZO(bn_net(momentum), tail=tail, eps=0.1, pairing=pairing).train()
    conv, bn = model.module[0], model.module[1]
    for forward in range(1, 4):
        mean, var = bn.running_mean.clone(), bn.running_var.clone()
        model(x)
        moved = []
        for sign in (1, -1):  # the statistics each half would have left
            w = conv.weight + sign * 0.1 * sample(conv.weight.shape, torch.tensor([0, 0]), tensor=0)
            b = conv.bias + sign * 0.1 * sample(conv.bias.shape, torch.tensor([0, 0]), tensor=1)
            m, v = mean.clone(), var.clone()
            factor = 1 / forward if momentum is None else momentum
            F.batch_norm(F.conv2d(x, w, b), m, v, training=True, momentum=factor)
            moved.append((m, v))
        torch.testing.assert_close(bn.running_mean, (moved[0][0] + moved[1][0]) / 2)
        torch.testing.assert_close(bn.running_var, (moved[0][1] + moved[1][1]) / 2)
        assert int(bn.num_batches_tracked) == forward


@pytest.mark.parametrize("tail", [["3"], ["1", "3"]], ids=["head-bn", "tail-bn"])
def test_batchnorm_that_the_user_froze_uses_its_running_statistics(tail: list[str]) -> None:
    net = bn_net()
    model = ElasticZO(net, tail=tail, eps=1e-5).train()
    net[1].eval()
    x = torch.randn(5, 2, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(x).mean(0), net(x), rtol=1e-3, atol=1e-3)
    assert int(net[1].num_batches_tracked) == 0


def dropout_net(tail_dropout: bool) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, 3), nn.Dropout(0.3))


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
@pytest.mark.parametrize("tail", [["2"], ["1", "2", "3"]], ids=["head", "tail"])
def test_halves_share_masks_which_change_with_step_and_micro_batch(
    tail: list[str], pairing: str
) -> None:
    model = ElasticZO(dropout_net(True), tail=tail, eps=1e-6, pairing=pairing, queries=2).train()
    zo = ZOSGD(model, lr=0.0)
    x = torch.randn(7, 6)
    generator = torch.get_rng_state()
    dropped: list[Tensor] = []
    for _ in range(2):
        for _ in range(2):
            out = model(x).detach()
            zero = out == 0
            assert (zero == zero[0]).all()
            dropped.append(zero[0])
        zo.step(torch.zeros(4))
    assert torch.equal(generator, torch.get_rng_state())
    for i in range(4):
        for j in range(i):
            assert not torch.equal(dropped[i], dropped[j]), (i, j)


def test_both_pairings_draw_the_same_masks() -> None:
    x = torch.randn(7, 6)
    out = [
        ElasticZO(dropout_net(True), tail=["2"], pairing=p).train()(x)
        for p in ("stacked", "sequential")
    ]
    torch.testing.assert_close(out[0], out[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dropout(0.3), (50, 400)),
        (nn.Dropout1d(0.3), (2000, 10, 3)),
        (nn.Dropout2d(0.3), (2000, 10, 3, 2)),
        (nn.Dropout3d(0.3), (2000, 10, 3, 2, 2)),
        (nn.AlphaDropout(0.3), (50, 400)),
        (nn.FeatureAlphaDropout(0.3), (2000, 10, 3)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_masks_have_the_layers_rate_mean_and_unit(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """n = 20,000 units; the rate within 5 sigma = 5 sqrt(0.3 * 0.7 / n) = 0.0162."""
    model = ElasticZO(nn.Sequential(layer), tail=0).train()
    x = torch.randn(shape)
    y = model(x)
    assert torch.equal(y[0], y[1])
    alpha = isinstance(layer, (nn.AlphaDropout, nn.FeatureAlphaDropout))
    units = y[0].flatten(2) if type(layer) not in (nn.Dropout, nn.AlphaDropout) else y[0][..., None]
    changed = units == units[..., :1]
    reference = layer(x)  # torch's own layer: the same two values for kept and dropped units
    if alpha:
        low = reference[reference == reference.flatten().mode().values].flatten()[0]
        rate = (units - low).abs().amax(-1) < 1e-5
        kept = ~rate
        a = (0.7 * (1 + 0.3 * 1.7580993408473766**2)) ** -0.5
        b = a * 0.3 * 1.7580993408473766
        expected = (a * x + b).reshape(units.shape)
    else:
        rate = (units == 0).all(-1)
        kept = ~rate
        expected = (x / 0.7).reshape(units.shape)
        assert changed[rate].all()
    torch.testing.assert_close(units[kept], expected[kept])
    assert abs(rate.double().mean() - 0.3) <= 5 * (0.3 * 0.7 / 20_000) ** 0.5


def test_dropout_with_probability_one_and_in_eval() -> None:
    model = ElasticZO(nn.Sequential(nn.Dropout(1.0)), tail=0).train()
    x = torch.randn(4, 3)
    assert (model(x) == 0).all()
    assert torch.equal(model.eval()(x), x)


class DrawsNoise(nn.Module):
    """Uses torch's generator itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.5, training=self.training))


def test_a_model_that_draws_from_the_generator_runs_by_halves_from_one_state() -> None:
    torch.manual_seed(0)
    model = ElasticZO(DrawsNoise(), tail=["b"], eps=1e-6).train()
    x = torch.randn(50, 4)
    torch.manual_seed(4)
    with pytest.warns(UserWarning, match="draws from torch's generator"):
        first = model(x)
    torch.testing.assert_close(first[0], first[1], rtol=1e-3, atol=1e-4)
    assert model.effective_pairing == "sequential"
    torch.manual_seed(4)
    plain = copy.deepcopy(model.module)(x)
    torch.testing.assert_close(first.mean(0), plain, rtol=1e-3, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), _state_after_plain(model.module, x))


def _state_after_plain(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(4)
    module(x)
    return torch.get_rng_state()


def test_shared_masks_keep_the_spread_of_g_small() -> None:
    """The reason for shared masks: with independent ones g measures the masks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Dropout(0.5), nn.Linear(50, 3))
    x, y = torch.randn(64, 20), torch.randint(0, 3, (64,))
    model = ElasticZO(net, tail=0).train()
    zo = ZOSGD(model, lr=0.0)
    shared, independent = [], []
    for _ in range(50):
        zo.step(pair_losses(F.cross_entropy, model(x), y))
        shared.append(float(zo.projected_gradient))
        with torch.no_grad():
            pair = [float(F.cross_entropy(net(x), y)) for _ in range(2)]
        independent.append((pair[0] - pair[1]) / 2e-3)
    assert torch.tensor(independent).std() > 10 * torch.tensor(shared).std()
