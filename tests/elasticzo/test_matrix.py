"""Every model of the zoo: the estimate, the tail's gradient, the pairings, what must not change."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from elasticzo import ZOSGD, ElasticZO, pair_losses
from elasticzo.forward.trees import strip
from tests.elasticzo.zoo import ZOO, Case, build, smooth_loss
from zo_kernels import sample

SEED = 7
CASES = [
    pytest.param(name, pairing, id=f"{name}-{pairing}")
    for name, case in ZOO.items()
    for pairing in case.pairings
]


def wrap(model: nn.Module, case: Case, pairing: str, **settings: Any) -> ElasticZO:
    return ElasticZO(
        copy.deepcopy(model), tail=case.tail, pairing=pairing, seed=SEED, **settings
    ).train()


def forward(model: ElasticZO, inputs: Any) -> Tensor:
    torch.manual_seed(3)  # models that draw from torch's generator: the same draw everywhere
    return model(*inputs)


def noise(model: ElasticZO, name: str, query: int = 0) -> Tensor:
    names = [n for n, _ in model.module.named_parameters()]
    shape = dict(model.module.named_parameters())[name].shape
    return sample(shape, torch.tensor([SEED, 0]), tensor=names.index(name), query=query).double()


@pytest.mark.filterwarnings("ignore:the model draws")
@pytest.mark.parametrize(("name", "pairing"), CASES)
def test_each_head_tensor_alone_gives_the_directional_derivative(name: str, pairing: str) -> None:
    """g of one perturbed tensor against autograd's gradient times z, in float64. The truncation
    error of a central difference at eps = 1e-5 is O(eps^2), its cancellation O(1e-16 / eps)."""
    case = ZOO[name]
    model, inputs = build(case)
    exact = ElasticZO(copy.deepcopy(model), tail="all", seed=SEED).train()
    smooth_loss(forward(exact, inputs)[0]).backward()
    gradients = {n: p.grad for n, p in exact.module.named_parameters()}
    head = [n for n, _ in wrap(model, case, pairing).named_head_parameters()]
    assert head
    for parameter in head:
        zo = wrap(model, case, pairing, eps=1e-5, scale={"*": 0.0, parameter: 1.0})
        losses = pair_losses(smooth_loss, forward(zo, inputs))
        g = (losses[0] - losses[1]) / 2e-5
        expected = (gradients[parameter] * noise(zo, parameter)).sum()
        size = (gradients[parameter] * noise(zo, parameter)).norm()
        assert abs(g - expected) <= 1e-6 * (1.0 + size), (parameter, float(g), float(expected))


@pytest.mark.filterwarnings("ignore:the model draws")
@pytest.mark.parametrize(("name", "pairing"), CASES)
def test_tail_gradient_is_that_of_the_mean_over_explicitly_perturbed_models(
    name: str, pairing: str
) -> None:
    case = ZOO[name]
    model, inputs = build(case)
    zo = wrap(model, case, pairing, eps=1e-2, queries=2)
    losses = pair_losses(smooth_loss, forward(zo, inputs))
    expected_losses, expected = explicit_halves(zo, model, case, inputs, eps=1e-2, queries=2)
    torch.testing.assert_close(losses.detach(), expected_losses, rtol=1e-9, atol=1e-9)
    if case.tail == 0:
        zo.backward(losses)
        return
    zo.backward(losses)
    got = {n: p.grad for n, p in zo.named_tail_parameters()}
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-8, atol=1e-9, msg=key)


def name_is_padded(case: Case) -> bool:
    return case is ZOO["padding"]


def explicit_halves(
    zo: ElasticZO, model: nn.Module, case: Case, inputs: Any, eps: float, queries: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The halves run one by one on a plain Full BP wrapper whose weights were moved by hand."""
    head = [n for n, _ in zo.named_head_parameters()]
    losses, gradients = [], {}
    for query in range(queries):
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for n, p in moved.named_parameters():
                    if n in head:
                        z = noise(zo, n, query)
                        if name_is_padded(case):
                            z[2] = 0
                        p += sign * eps * z
            plain = ElasticZO(moved, tail="all", seed=SEED).train()
            loss = smooth_loss(forward(plain, inputs)[0])
            loss.backward()
            losses.append(loss.detach())
            for n, p in moved.named_parameters():
                if n not in head:
                    gradients[n] = gradients.get(n, 0) + p.grad / (2 * queries)
    return torch.stack(losses), gradients


@pytest.mark.filterwarnings("ignore:the model draws")
@pytest.mark.parametrize("batch", [1, 6], ids=["B1", "B6"])
@pytest.mark.parametrize("name", [n for n, c in ZOO.items() if len(c.pairings) == 2])
def test_both_pairings_give_the_same_step(name: str, batch: int) -> None:
    case = ZOO[name]
    if batch == 1 and name in ("residual_cnn_tail_bn", "conv1d"):
        pytest.skip("BatchNorm over one value a channel")
    model, inputs = build(case, batch)
    states = []
    for pairing in ("stacked", "sequential"):
        zo = wrap(model, case, pairing, eps=1e-3, queries=2)
        opt = ZOSGD(zo, lr=1e-2, weight_decay=0.1)
        tail = zo.tail_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        for _ in range(2):
            losses = pair_losses(smooth_loss, forward(zo, inputs))
            zo.backward(losses)
            tail.step()
            tail.zero_grad()
            opt.step(losses)
        states.append(zo.state_dict())
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-7, atol=1e-8, msg=key)


@pytest.mark.filterwarnings("ignore:the model draws")
@pytest.mark.parametrize(("name", "pairing"), CASES)
def test_forwards_leave_weights_and_eval_is_the_model_itself(name: str, pairing: str) -> None:
    case = ZOO[name]
    model, inputs = build(case, dtype=torch.float32)
    zo = wrap(model, case, pairing)
    before = {n: p.detach().clone() for n, p in zo.module.named_parameters()}
    for _ in range(5):
        forward(zo, inputs)
    for n, p in zo.module.named_parameters():
        assert torch.equal(p, before[n]), n
    assert list(zo.state_dict()) == list(model.state_dict())
    plain = copy.deepcopy(zo.module).eval()
    with torch.no_grad():
        assert torch.equal(zo.eval()(*inputs), plain(*strip(inputs)))
        assert torch.equal(plain(*strip(inputs)), functional_call(plain, {}, strip(inputs)))


@pytest.mark.filterwarnings("ignore:the model draws")
@pytest.mark.parametrize(("name", "pairing"), CASES)
def test_deepcopy_pickle_and_to_give_the_same_losses(name: str, pairing: str) -> None:
    case = ZOO[name]
    model, inputs = build(case, dtype=torch.float32)
    zo = wrap(model, case, pairing)
    forward(zo, inputs)  # after the first forward, when the plan has settled
    copies = [copy.deepcopy(zo)]
    if name != "scales":  # parametrized modules cannot be pickled by torch itself
        copies.append(pickle.loads(pickle.dumps(zo)))
    fresh = wrap(model, case, pairing).to("cpu")
    expected = forward(fresh, inputs)
    for other in copies:
        other.forget_forwards()
        other.module.load_state_dict(model.state_dict())
        assert torch.equal(forward(other, inputs), expected)


@pytest.mark.parametrize("name", [n for n, c in ZOO.items() if len(c.pairings) == 1])
def test_time_first_models_are_refused_by_name_when_stacked(name: str) -> None:
    case = ZOO[name]
    model, _ = build(case)
    with pytest.raises(
        ValueError, match=r"(lstm \(LSTM\)|self_attn \(MultiheadAttention\)).*sequential"
    ):
        ElasticZO(model, tail=case.tail)
