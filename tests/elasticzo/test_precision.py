"""Autocast, low precision, torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses
from elasticzo.models import LeNet5, ResNet20
from tests.elasticzo.zoo import ZOO, build, cast, smooth_loss
from zo_kernels import perturbed_weights


def lenet(**settings: object) -> tuple[ElasticZO, Tensor, Tensor]:
    torch.manual_seed(0)
    model = ElasticZO(LeNet5(), **{"tail": ["fc3"], **settings}).train()  # type: ignore[arg-type]
    return model, torch.randn(8, 1, 28, 28), torch.arange(8)


def explicit(model: ElasticZO, x: Tensor, sign: int) -> Tensor:
    """The half of a LeNet whose weights are rounded to bf16 after the fp32 sum."""
    moved = copy.deepcopy(model.module)
    names = [n for n, _ in moved.named_parameters()]
    key, eps = torch.tensor([0, 0]), torch.tensor(model.eps, dtype=torch.float64)
    with torch.no_grad():
        for n, p in moved.named_parameters():
            if not n.startswith("fc3"):
                halves = perturbed_weights(p, key, eps, tensor=names.index(n), dtype=torch.bfloat16)
                p.copy_(halves[0 if sign > 0 else 1])
        with torch.autocast("cpu", torch.bfloat16):
            return moved(x)


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
def test_autocast_perturbs_in_fp32_and_computes_in_bf16(pairing: str) -> None:
    model, x, y = lenet(pairing=pairing, eps=1e-2)
    zo = ZOSGD(model, lr=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        losses = pair_losses(F.cross_entropy, out, y)
    assert out.dtype == torch.bfloat16
    expected = torch.stack([explicit(model, x, s) for s in (1, -1)])
    # The same bf16 operands; sums may run in another order: one bf16 step of the largest logit.
    assert (out - expected).abs().max() <= 2**-7 * expected.abs().max()
    model.backward(losses)
    assert model.module.fc3.weight.grad.dtype == torch.float32
    zo.step(losses)
    assert model.module.conv1.weight.dtype == torch.float32


def test_compute_dtype_of_the_head_alone() -> None:
    model, x, _ = lenet(compute_dtype=torch.bfloat16, eps=1e-2)
    wide, _, _ = lenet(eps=1e-2)
    out, reference = model(x), wide(x)
    assert out.dtype == torch.float32
    error = (out - reference).norm() / reference.norm()
    assert 1e-4 < error < 3e-2  # bf16 operands: 2^-9 each, over five layers


def test_bf16_parameters_learn() -> None:
    """Stochastic rounding: updates far below half a bf16 step still move the weights on average."""
    torch.manual_seed(0)
    net = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    model = ElasticZO(net, tail=0, eps=1e-2).train()
    zo = ZOSGD(model, lr=1.0)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    start = net.weight.clone()
    model(x)
    zo.step(torch.tensor([1e-6, 0.0]))  # g = 5e-5, against a bf16 step of 2^-11 near 0.1
    moved = (net.weight != start).double().mean()
    assert net.weight.dtype == torch.bfloat16
    assert 0.02 < moved < 0.9


def test_to_another_dtype_after_wrapping() -> None:
    model, x, _ = lenet()
    model.to(torch.float64)
    assert model(x.double()).dtype == torch.float64
    assert model.session.eps.dtype == torch.float64 and model.session.key.dtype == torch.int64
    model.to(torch.bfloat16)
    assert model.session.eps.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:the model draws")
@pytest.mark.parametrize("mode", ["autocast", "bf16"])
@pytest.mark.parametrize(("name", "pairing"), [(n, p) for n, c in ZOO.items() for p in c.pairings])
def test_every_model_steps_in_low_precision(name: str, pairing: str, mode: str) -> None:
    """Losses near those of fp32, every head parameter moves, dtypes stay."""
    case = ZOO[name]
    model, inputs = build(case, dtype=torch.float32)
    results = []
    for low in (False, True):
        net, given = copy.deepcopy(model), inputs
        if low and mode == "bf16":
            net, given = net.to(torch.bfloat16), cast(inputs, torch.bfloat16)
        zo = ElasticZO(net, tail=case.tail, pairing=pairing, eps=1e-2).train()
        before = copy.deepcopy(zo.state_dict())
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=low and mode == "autocast"):
            losses = pair_losses(smooth_loss, zo(*given))
        zo.backward(losses)
        ZOSGD(zo, lr=1.0).step(torch.tensor([1.0, 0.0]))
        assert torch.isfinite(losses).all()
        for n, p in zo.named_head_parameters():
            assert not torch.equal(p, before[n]) and p.dtype == before[n].dtype, n
        results.append(losses.detach().float())
    # bf16 has 8 bits; the worst model stacks a dozen roundings of order-one activations.
    assert (results[0] - results[1]).abs().max() <= 0.1 * (1 + results[0].abs().max())


@pytest.mark.parametrize("tail", [["fc"], 0], ids=["tail", "full-zo"])
def test_torch_compile_of_the_wrapper(tail: object) -> None:
    """Paired layers run as they are, what lies between them is compiled; eager and compiled runs
    take the same steps, in training and evaluation."""
    torch._dynamo.reset()
    states, outputs = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = ElasticZO(ResNet20(channels=1), tail=tail).train()  # type: ignore[arg-type]
        run = torch.compile(model, backend="aot_eager") if compiled else model
        zo = ZOSGD(model, lr=1e-6)
        x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
        for _ in range(3):
            losses = pair_losses(F.cross_entropy, run(x), y)
            model.backward(losses)
            zo.step(losses)
        run.eval()
        with torch.no_grad():
            outputs.append(run(x))
        run.train()
        outputs.append(run(x).detach())
        states.append(model.state_dict())
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-4, atol=1e-5, msg=key)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs[1], outputs[3], rtol=1e-3, atol=1e-3)


def test_models_have_the_sizes_of_the_papers() -> None:
    assert sum(p.numel() for p in LeNet5().parameters()) == 107_786
    # He et al. 2015: 0.27 M; with 1x1 shortcuts of type B.
    assert 0.26e6 < sum(p.numel() for p in ResNet20().parameters()) < 0.28e6
    assert ResNet20()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
