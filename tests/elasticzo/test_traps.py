"""Ways in which a wrapper goes wrong without a sound; each was a defect once."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from elasticzo import ZOSGD, ElasticZO, TrajectoryLog, pair_losses, replay
from tests.elasticzo.zoo import smooth_loss
from zo_kernels import sample


def slope(model: nn.Module, x: Any, loss: Any = smooth_loss) -> tuple[float, float]:
    """g of the wrapper, and the derivative along the same direction by autograd, in float64."""
    torch.manual_seed(0)
    model = model.double()
    exact = copy.deepcopy(model).train()
    loss(exact(x)).backward()
    zo = ElasticZO(model, tail=0, eps=1e-5).train()
    losses = pair_losses(loss, zo(x))
    expected = 0.0
    for i, (_, p) in enumerate(exact.named_parameters()):
        z = sample(p.shape, torch.tensor([0, 0]), tensor=i)
        expected += float((p.grad * z).sum())
    return float(losses[0] - losses[1]) / 2e-5, expected


class UntiedHead(nn.Module):
    """Reads a weight a second time, around the module that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.fc(self.emb(tokens).mean(1))), self.emb.weight)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(4) * 0.7)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.p


class ReadsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.fc = Gain(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.gain(x)) + self.gain.p)


def test_a_second_read_around_the_module_is_perturbed_too() -> None:
    for model, x in (
        (UntiedHead(), torch.randint(0, 7, (5, 3))),
        (ReadsChild(), torch.randn(5, 4).double()),
    ):
        got, expected = slope(model, x)
        assert got == pytest.approx(expected, rel=1e-6)


class Table(nn.Module):
    """A module of its own kind that takes a table beside the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) @ table.t()


class UsesTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = Table()
        self.c = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(x, torch.arange(8.0).reshape(2, 4).to(x)))


def test_a_table_as_long_as_the_stacked_batch_is_not_cut() -> None:
    torch.manual_seed(0)
    net, x = UsesTable(), torch.randn(1, 4)
    out = [
        ElasticZO(copy.deepcopy(net), tail=["c"], pairing=p).train()(x)
        for p in ("stacked", "sequential")
    ]
    torch.testing.assert_close(out[0], out[1])


@dataclass
class Output:
    value: Tensor


class ReturnsObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Output:
        return Output(self.fc(x))


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
def test_objects_that_hide_tensors_are_refused(pairing: str) -> None:
    model = ElasticZO(ReturnsObject(), tail=0, pairing=pairing).train()
    with pytest.raises(ValueError, match="returned a Output that differs"):
        model(torch.randn(2, 4))
    plain = ElasticZO(nn.Linear(4, 3), tail=0, pairing=pairing).train()
    with pytest.raises(TypeError, match="an input holds tensors in a Output"):
        plain(Output(torch.randn(2, 4)))


class MyBN(nn.BatchNorm1d):
    """As timm's BatchNormAct2d: a subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tail", [["2"], ["1", "2"]], ids=["head-bn", "tail-bn"])
def test_a_subclass_of_batchnorm_keeps_the_halves_apart(tail: list[str], affine: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), MyBN(5, affine=affine), nn.Linear(5, 3))
    x = torch.randn(6, 4)
    models = [
        ElasticZO(copy.deepcopy(net), tail=tail, eps=0.1, pairing=p).train()
        for p in ("stacked", "sequential")
    ]
    torch.testing.assert_close(models[0](x), models[1](x))
    for a, b in zip(models[0].module.buffers(), models[1].module.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_parametrized_block_with_batchnorm_in_the_tail() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    parametrizations.weight_norm(block[0])
    net = nn.Sequential(nn.Linear(4, 5), block, nn.Linear(5, 3))
    x = torch.randn(6, 4)
    out = [
        ElasticZO(copy.deepcopy(net), tail=["1", "2"], eps=0.1, pairing=p).train()(x)
        for p in ("stacked", "sequential")
    ]
    torch.testing.assert_close(out[0], out[1])


def bn_model() -> tuple[ElasticZO, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    return ElasticZO(net, tail=["2"]).train(), torch.randn(6, 4)


def test_modules_set_to_train_or_replaced_after_the_first_forward() -> None:
    model, x = bn_model()
    zo, bn = ZOSGD(model, lr=0.0), model.module[1]
    bn.eval()
    model(x)
    zo.step(torch.zeros(2))
    bn.train()
    before = bn.running_mean.clone()
    model(x)
    assert not torch.equal(bn.running_mean, before)
    zo.step(torch.tensor([float("nan"), 1.0]))
    assert torch.equal(bn.running_mean, before)
    model.module[0] = nn.Linear(4, 5)
    with pytest.raises(RuntimeError, match="added or replaced since it was wrapped"):
        model(x)


def test_an_encoder_set_to_eval_is_still_perturbed() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3))
    model, x = ElasticZO(net, tail=["2"], eps=0.1).train(), torch.randn(5, 4, 8)
    with torch.no_grad():
        expected = model(x)
        layer.eval()  # without dropout the same function, by torch's fused path
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_clean_pass_moves_no_statistics() -> None:
    model, x = bn_model()
    before = copy.deepcopy(model.state_dict())
    model.clean_forward(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_found_inf_of_a_gradient_scaler_is_respected() -> None:
    model, x = bn_model()
    zo, tail = ZOSGD(model, lr=0.0), model.tail_optimizer(torch.optim.SGD, lr=0.1)
    losses = pair_losses(smooth_loss, model(x))
    model.backward(losses)
    model.module[2].weight.grad.fill_(float("inf"))
    before = model.module[2].weight.clone()
    tail.found_inf = torch.ones(())  # type: ignore[attr-defined]
    tail.step()
    assert torch.equal(model.module[2].weight, before)
    zo.step(losses)


def test_the_tail_optimizer_after_zo_step_and_with_a_plain_state() -> None:
    model, x = bn_model()
    zo, tail = ZOSGD(model, lr=0.0), model.tail_optimizer(torch.optim.Adam, lr=0.1)
    plain = torch.optim.Adam(model.tail_parameters(), lr=0.2)
    losses = pair_losses(smooth_loss, model(x)) * torch.tensor([1.0, float("nan")])
    model.backward(losses, source="plus")
    before = copy.deepcopy(model.state_dict())
    zo.step(losses)
    tail.step()
    for name, p in model.named_tail_parameters():
        assert torch.equal(p, before[name])
    tail.load_state_dict(plain.state_dict())
    tail.zero_grad()  # 0 * NaN is in them
    model.backward(pair_losses(smooth_loss, model(x)))
    tail.step()
    assert not torch.equal(model.module[2].weight, before["2.weight"])


def test_eps_vanishes_in_a_fallback_under_autocast() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    model = ElasticZO(nn.Sequential(Own(), nn.Linear(4, 2)), tail=["1"], eps=1e-5).train()
    model(torch.randn(3, 4))  # verified in fp32, where it does not vanish
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"vanishes in torch.bfloat16 for '0.w'"),
    ):
        model(torch.randn(3, 4))


def test_eps_and_seed_are_fixed_for_a_run() -> None:
    model, _ = bn_model()
    for name in ("eps", "seed"):
        with pytest.raises(AttributeError):
            setattr(model, name, 1)


def test_replay_with_a_weight_decay_that_moved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    start = copy.deepcopy(net)
    model, x = ElasticZO(net, tail=0, seed=3).train(), torch.randn(6, 4)
    zo = ZOSGD(model, lr=0.1, weight_decay=0.1)
    log = TrajectoryLog(tmp_path / "log", zo)
    for step in range(3):
        zo.param_groups[0]["weight_decay"] = 0.1 * step
        zo.step(pair_losses(smooth_loss, model(x)))
    log.drain()
    again = ElasticZO(start, tail=0)
    replay(tmp_path / "log", again)
    assert torch.equal(start.weight, net.weight)
    assert again.seed == 3


def test_a_model_that_writes_its_input() -> None:
    class Doubles(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    model = ElasticZO(Doubles(4, 3), tail=0, pairing="sequential").train()
    with pytest.raises(ValueError, match="writes its input in place"):
        model(torch.randn(2, 4))


def test_unwrapping_gives_the_head_back() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    net[0].bias.requires_grad_(False)
    ElasticZO(net, tail=1).unwrap()
    names = [n for n, _ in ElasticZO(net, tail=0).named_head_parameters()]
    assert names == ["0.weight", "1.weight", "1.bias"]


def test_check_of_a_fresh_model_with_dropout() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    ElasticZO(net, tail=["2"]).train().check(torch.randn(6, 4))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_pair_of_model_and_optimizer_goes_on(how: Any) -> None:
    model, x = bn_model()
    zo = ZOSGD(model, lr=0.1)
    zo.step(pair_losses(smooth_loss, model(x)))
    other, zo_other = how((model, zo))
    for m, o in ((model, zo), (other, zo_other)):
        o.step(pair_losses(smooth_loss, m(x)))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_generator_that_is_used_later() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.draws = nn.Linear(4, 3), False

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + (torch.randn(3) if self.draws else 0)

    net = Later()
    model, x = ElasticZO(net, tail=0, eps=1e-6).train(), torch.randn(2, 4)
    model(x)
    net.draws = True
    with pytest.warns(UserWarning, match="draws from torch's generator"):
        out = model(x)
    torch.testing.assert_close(out[0], out[1], rtol=1e-3, atol=1e-4)


def test_attention_masks_by_head() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            mask = (x[:, :, None, 0] > x[:, None, :, 0] + 1.0).repeat_interleave(2, 0)
            return self.fc(self.attention(x, x, x, attn_mask=mask)[0].mean(1))

    torch.manual_seed(0)
    net, x = Masked(), torch.randn(5, 4, 8)
    out = [
        ElasticZO(copy.deepcopy(net), tail=["fc"], pairing=p).train()(x)
        for p in ("stacked", "sequential")
    ]
    torch.testing.assert_close(out[0], out[1])


def test_scale_must_be_a_mapping_and_models_python() -> None:
    with pytest.raises(TypeError, match=r"scale must be \{name pattern: number\}, got 0.1"):
        ElasticZO(nn.Linear(2, 2), tail=0, scale=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be an nn.Module in Python"):
        ElasticZO(torch.jit.script(nn.Linear(2, 2)), tail=0)
