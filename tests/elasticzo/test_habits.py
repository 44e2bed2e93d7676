"""What a PyTorch user does out of habit: it works, or says why it does not."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elasticzo import ZOSGD, ElasticZO, pair_losses

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 8, generator=GENERATOR), torch.arange(24) % 4


def make(tail: int = 1, dropout: float = 0.0, **settings: Any) -> ElasticZO:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))
    return ElasticZO(net, tail=tail, eps=1e-2, **settings).train()


def weights(model: ElasticZO) -> Tensor:
    return torch.cat([v.detach().double().flatten() for v in model.state_dict().values()])


def test_micro_batches_give_the_step_of_the_whole_batch() -> None:
    def run(parts: int) -> Tensor:
        model = make()
        zo, sgd = ZOSGD(model, lr=0.1), model.tail_optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(3):
            sgd.zero_grad()
            total = torch.zeros(2)
            for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
                losses = pair_losses(F.cross_entropy, model(x), y) / parts
                model.backward(losses)
                total += losses.detach()
            sgd.step()
            zo.step(total)
        return weights(model)

    torch.testing.assert_close(run(4), run(1), rtol=0.0, atol=1e-5)


class Trainer:
    """Model, optimisers, schedules and data as most training scripts have them."""

    def __init__(self) -> None:
        self.model = make(dropout=0.3, seed=3)
        self.zo = ZOSGD(self.model, lr=0.1, clip=1.0, defer=True)
        self.tail = self.model.tail_optimizer(torch.optim.AdamW, lr=1e-2)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        self.schedules = [cosine(optimizer, 5) for optimizer in (self.zo, self.tail)]
        self.parts = [self.model, self.zo, self.tail, *self.schedules]

    def epoch(self, number: int, workers: int = 0) -> None:
        order = torch.Generator().manual_seed(number)
        data = DataLoader(TensorDataset(X, Y), 9, True, generator=order, num_workers=workers)
        self.model.train()
        for x, y in data:
            losses = pair_losses(F.cross_entropy, self.model(x), y)
            self.model.backward(losses)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in (self.tail, self.zo):
                optimizer.step(*([losses] if optimizer is self.zo else []))
                optimizer.zero_grad()
        for schedule in self.schedules:
            schedule.step()
        with torch.inference_mode():
            assert self.model.eval()(X).shape == (24, 4)


def test_saved_and_resumed_by_torch_save_bit_for_bit() -> None:
    whole, first, second = Trainer(), Trainer(), Trainer()
    for number in range(4):
        whole.epoch(number, workers=2 if number == 1 else 0)
    for number in range(2):
        first.epoch(number)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first.parts], file)
    file.seek(0)
    for part, state in zip(second.parts, torch.load(file), strict=True):
        part.load_state_dict(state)
    for number in range(2, 4):
        second.epoch(number)
    assert torch.equal(weights(second.model), weights(whole.model))
    assert not torch.equal(weights(second.model), weights(first.model))


def test_layers_of_the_users_own_behind_full_zo_get_their_gradient() -> None:
    model, post = make(tail=0), nn.Linear(4, 4)
    out = model(X)
    losses = pair_losses(F.cross_entropy, post(out), Y)
    model.backward(losses)
    wanted = torch.autograd.grad(F.cross_entropy(post(out).flatten(0, 1), Y.repeat(2)), post.weight)
    torch.testing.assert_close(post.weight.grad, wanted[0])
    model.backward(losses.detach())  # nothing to do without them
    with pytest.raises(ValueError, match="source must be one of"):
        model.backward(losses, "both")


def test_a_tail_that_was_frozen_afterwards() -> None:
    model = make().requires_grad_(False)
    with pytest.raises(ValueError, match="or was the tail frozen since it was wrapped"):
        model.backward(pair_losses(F.cross_entropy, model(X), Y))


def test_groups_that_are_added_later() -> None:
    model = make()
    zo = ZOSGD(model, lr=0.1)
    for p in (model.module[3].weight, nn.Parameter(torch.ones(2))):
        with pytest.raises(ValueError, match="param_group has a parameter that is not in the head"):
            zo.add_param_group({"params": [p]})
    assert len(zo.param_groups) == 1


def test_losses_too_coarse_for_a_difference() -> None:
    model = make()
    model.to(torch.bfloat16)
    zo = ZOSGD(model, lr=0.1)
    logits = model(X.bfloat16())
    with pytest.warns(
        UserWarning, match=r"losses are torch.bfloat16: .*outputs.float\(\)"
    ) as caught:
        zo.step(pair_losses(F.cross_entropy, logits, Y))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zo.step(pair_losses(F.cross_entropy, model(X.bfloat16()), Y))  # once is enough
        fine = ZOSGD(model, lr=0.1)
        fine.step(pair_losses(F.cross_entropy, model(X.bfloat16()).float(), Y))


def test_inference_mode() -> None:
    model, other = make(tail=0), make(tail=0, pairing="sequential")
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"cannot run under torch.inference_mode.*no_grad"):
            model(X)
        losses = pair_losses(F.cross_entropy, other(X), Y)
    with torch.no_grad():
        torch.testing.assert_close(losses, pair_losses(F.cross_entropy, model(X), Y))
    before = weights(other)
    for wrapped in (model, other):
        ZOSGD(wrapped, lr=0.1).step(losses)
    assert torch.equal(weights(model), weights(other))
    assert not torch.equal(weights(other), before)
    pair_losses(F.cross_entropy, other(X), Y)  # nothing of inference mode was kept
