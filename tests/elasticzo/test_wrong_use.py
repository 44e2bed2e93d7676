"""Wrong use: every refusal says what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses, unbatched
from elasticzo.models import LeNet5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.a(x)))))


def make(**settings: Any) -> tuple[ElasticZO, ZOSGD]:
    model = ElasticZO(Net(), **{"tail": ["c"], **settings}).train()
    return model, ZOSGD(model, lr=0.1)


X, Y = torch.zeros(5, 4), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tail": ["d"]}, ValueError, r"unknown module 'd'; layers of this model: a, b, c"),
        ({"tail": [""]}, ValueError, r"unknown module ''"),
        ({"tail": ["a.weight"]}, ValueError, r"unknown module 'a.weight'"),
        ({"tail": []}, ValueError, r"tail=\[\] names no module; for Full ZO .* tail=0"),
        ({"tail": ["act"]}, ValueError, r"tail=\['act'\] names no module with param.*: a, b, c"),
        ({"tail": 4}, ValueError, r"must be in 0..3 for this model, got 4"),
        ({"tail": -1}, ValueError, r"must be in 0..3 for this model, got -1"),
        ({"tail": True}, TypeError, r"tail must be a list of module names.*got True"),
        ({"tail": 1.5}, TypeError, r"tail must be .*got 1.5"),
        ({"memory_budget": 10}, ValueError, r"belong to tail='auto', got tail=\['c'\]"),
        ({"eps": 0.0}, ValueError, r"eps must be a finite number > 0, got 0.0"),
        ({"eps": True}, ValueError, r"eps must be a finite number > 0, got True"),
        ({"eps": float("nan")}, ValueError, r"eps must be a finite number > 0, got nan"),
        ({"noise": "uniform"}, ValueError, r"noise must be one of .*got 'uniform'"),
        ({"queries": 0}, ValueError, r"queries must be an integer in \[1, 2\^24\), got 0"),
        ({"queries": True}, ValueError, r"queries must be an integer in \[1, 2\^24\), got True"),
        ({"seed": False}, ValueError, r"seed must be an integer in \[0, 2\^63\), got False"),
        ({"seed": -1}, ValueError, r"seed must be an integer in \[0, 2\^63\), got -1"),
        ({"seed": 1 << 63}, ValueError, r"seed must be an integer"),
        ({"pairing": "both"}, ValueError, r"pairing must be 'stacked' or 'sequential', got 'both'"),
        ({"backend": "cuda"}, ValueError, r"backend must be one of .*got 'cuda'"),
        ({"compute_dtype": torch.int8}, ValueError, r"compute_dtype must be one of .*int8"),
        ({"scale": {"z*": 1.0}}, ValueError, r"scale pattern 'z\*' matches no head parameter"),
        ({"scale": {"*": -1.0}}, ValueError, r"scale of '\*' must be finite and >= 0, got -1.0"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**settings)


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module in Python, got function"):
        ElasticZO(lambda x: x, tail=0)  # type: ignore[arg-type]


def test_tail_that_runs_before_the_head_names_both() -> None:
    model = ElasticZO(Net(), tail=["a"]).train()
    with pytest.raises(ValueError, match=r"'a' \(tail\) ran before 'b.weight' \(head\)"):
        model(X)


def test_tail_and_head_must_not_share_a_parameter() -> None:
    net = Net()
    net.b.weight = net.a.weight
    with pytest.raises(ValueError, match=r"'b.weight' \(tail\) is 'a.weight' \(head\)"):
        ElasticZO(net, tail=["b", "c"])


def test_head_parameter_that_the_forward_never_uses_is_named() -> None:
    net = Net()
    net.unused = nn.Linear(2, 2)
    model = ElasticZO(net, tail=["c"]).train()
    with pytest.raises(ValueError, match=r"'unused.bias' was not .*requires_grad_\(False\)"):
        model(X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eps_that_vanishes_in_the_compute_dtype(dtype: torch.dtype) -> None:
    eps = 1e-10 if dtype == torch.float32 else 1e-5
    model = ElasticZO(Net(), tail=["c"], eps=eps, compute_dtype=dtype).train()
    with pytest.raises(ValueError, match=rf"eps={eps:g} .* vanishes in {dtype} for 'a.weight'"):
        model(X)


def test_unsupported_dtypes() -> None:
    with pytest.raises(TypeError, match=r"'a.weight' must be float32.*got torch.float16"):
        ElasticZO(Net().half(), tail=["c"])


def test_embedding_that_renormalises_in_the_forward() -> None:
    with pytest.raises(ValueError, match=r"'0' \(Embedding\) has max_norm"):
        ElasticZO(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0), nn.Linear(2, 2)), tail=1)


def test_step_without_a_forward_and_twice_after_one() -> None:
    model, zo = make()
    with pytest.raises(RuntimeError, match=r"zo.step without a training forward"):
        zo.step(torch.zeros(2))
    losses = pair_losses(F.cross_entropy, model(X), Y)
    zo.step(losses)
    with pytest.raises(RuntimeError, match=r"zo.step without a training forward"):
        zo.step(losses)


def test_a_forward_that_failed_or_was_clean_is_no_forward() -> None:
    model, zo = make()
    with pytest.raises(RuntimeError):
        model(torch.zeros(5, 7))
    model.clean_forward(X)
    with pytest.raises(RuntimeError, match=r"zo.step without a training forward"):
        zo.step(torch.zeros(2))
    model(X)
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"zo.step without a training forward"):
        zo.step(torch.zeros(2))


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"losses must have shape \[2\], one a half, got \[3\]"),
        (torch.zeros(2, 1), ValueError, r"losses must have shape \[2\].*got \[2, 1\]"),
        (torch.tensor(1.0), ValueError, r"losses must have shape \[2\].*got \[\]"),
        (None, TypeError, r"zo.step needs the losses"),
        (lambda: 0, TypeError, r"takes losses, not a closure"),
    ],
    ids=["three", "matrix", "scalar", "none", "closure"],
)
def test_losses_of_the_wrong_kind(losses: Any, error: type[Exception], message: str) -> None:
    model, zo = make()
    model(X)
    with pytest.raises(error, match=message):
        zo.step(losses)


def test_backward_checks_losses_and_source() -> None:
    model, _ = make()
    losses = pair_losses(F.cross_entropy, model(X), Y)
    with pytest.raises(ValueError, match=r"losses must have shape \[2\], one a half, got \[1\]"):
        model.backward(losses[:1])
    with pytest.raises(TypeError, match="losses must be a Tensor of shape"):
        model.backward([1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"source must be one of .* got 'both'"):
        model.backward(losses, source="both")
    with pytest.raises(ValueError, match=r"clean pass must be a scalar, got \[1\]"):
        model.backward(losses, pair_losses(F.cross_entropy, model.clean_forward(X), Y))
    with pytest.raises(ValueError, match="no gradient to the tail"):
        model.backward(losses.detach())


def test_pair_losses_wants_halves_and_scalars() -> None:
    with pytest.raises(ValueError, match=r"outputs must be tensors of shape \[halves"):
        pair_losses(F.cross_entropy, torch.tensor(1.0), Y)
    with pytest.raises(ValueError, match=r"loss must be a scalar for each half, got shape \[5\]"):
        pair_losses(nn.CrossEntropyLoss(reduction="none"), torch.zeros(2, 5, 3), Y)


def test_a_parameter_replaced_or_moved_between_forward_and_step() -> None:
    model, zo = make()
    losses = pair_losses(F.cross_entropy, model(X), Y)
    model.module.a.weight.data = model.module.a.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"'a.weight' was replaced or moved between"):
        zo.step(losses)
    model.module.a.weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    losses = pair_losses(F.cross_entropy, model(X), Y)
    with pytest.raises(RuntimeError, match=r"'a.weight' is not the one this optimiser was"):
        zo.step(losses)


class Folds(nn.Module):
    """Pairs up rows: dimension 0 stops being the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).sum(0, keepdim=True))


def test_a_batch_that_does_not_divide() -> None:
    model = ElasticZO(Folds(), tail=0).train()
    assert model(X).shape == (2, 1, 3) and model.effective_pairing == "sequential"


def test_output_without_a_batch() -> None:
    class Mean(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean()

    with pytest.raises(ValueError, match=r"returned a tensor of shape \[\].*sequential"):
        ElasticZO(Mean(), tail=["c"]).train()(X)
    assert ElasticZO(Mean(), tail=["c"], pairing="sequential").train()(X).shape == (2,)


def test_inputs_must_have_the_batch_or_be_declared() -> None:
    class Masked(Net):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x * mask.sum())

    model = ElasticZO(Masked(), tail=["c"]).train()
    with pytest.raises(ValueError, match=r"\[3, 3\] does not have the batch \(5\).*unbatched"):
        model(X, torch.ones(3, 3))
    assert model(X, unbatched(torch.ones(3, 3))).shape == (2, 5, 3)
    with pytest.raises(TypeError, match="unbatched expects a Tensor, got int"):
        unbatched(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a tensor input whose dimension 0 is the batch"):
        model(3, mask=2)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([{"lr": 1.0}], TypeError, r"groups\[0\] must be a dictionary with 'params'"),
        ([{"params": "c"}], ValueError, r"groups\[0\] has a parameter that is not in the head"),
        (
            [{"params": [], "momentum": 1}],
            ValueError,
            r"groups\[0\] has unknown keys \['momentum'\]",
        ),
    ],
    ids=["no-params", "tail-parameter", "unknown-key"],
)
def test_groups(groups: list[dict[str, Any]], error: type[Exception], message: str) -> None:
    model, _ = make()
    if groups[0].get("params") == "c":
        groups = [{"params": [model.module.c.weight]}]
    with pytest.raises(error, match=message):
        ZOSGD(model, lr=0.1, groups=groups)


def test_optimizer_settings() -> None:
    model, _ = make()
    with pytest.raises(TypeError, match="model must be an ElasticZO, got Net"):
        ZOSGD(Net(), lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"numbers or 0-d tensors >= 0, got -1.0 and 0.0"):
        ZOSGD(model, lr=-1.0)
    with pytest.raises(ValueError, match=r"clip must be > 0 or None, got 0.0"):
        ZOSGD(model, lr=1.0, clip=0.0)


def test_state_of_another_run_is_refused() -> None:
    _, zo = make()
    _, other = make(eps=1e-2, queries=2)
    with pytest.raises(ValueError, match=r"eps was 0.001, is 0.01; queries was 1, is 2"):
        other.load_state_dict(zo.state_dict())
    with pytest.raises(ValueError, match=r"ZOSGD must have the .* zo; got one without zo$"):
        other.load_state_dict(torch.optim.SGD([torch.zeros(1)]).state_dict())


@pytest.fixture
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_and_compiled_wrappers_are_refused(process_group: None) -> None:
    model, _ = make()
    with pytest.raises(RuntimeError, match="does not support DistributedDataParallel yet"):
        torch.nn.parallel.DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="does not support DataParallel yet"):
        ElasticZO(nn.DataParallel(Net()), tail=0)
    with pytest.raises(ValueError, match=r"torch.compile\(ElasticZO\(model"):
        ElasticZO(torch.compile(Net()), tail=0)  # type: ignore[arg-type]

    class DTensor(nn.Parameter):
        """Stands for the type that fully_shard gives parameters."""

    model.module.a.weight = DTensor(torch.zeros(4, 4), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"sharded parameters yet: 'a.weight' is a DTensor"):
        model(X)


def test_backend_that_cannot_run_here() -> None:
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="backend 'numba' needs CPU tensors, got cuda ones"):
            ElasticZO(Net().cuda(), tail=0, backend="numba")
    assert ElasticZO(Net(), tail=0, backend="reference").backend == "reference"
    with pytest.raises(RuntimeError, match="clean_forward is for train"):
        ElasticZO(LeNet5(), tail=1).eval().clean_forward(torch.zeros(1, 1, 28, 28))


class Mixes(nn.Module):
    """Attention over the batch: a row sees the others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.mix = Attend()
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.inner(x)))


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.t(), -1) @ x


def test_check_names_the_first_module_that_mixes_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model = ElasticZO(Mixes(), tail=["out"]).train()
    with pytest.raises(ValueError, match=r"'mix' \(Attend\) gives other outputs.*sequential"):
        model.check(x)
    before = model.module.inner[0].weight.clone()
    ElasticZO(Net(), tail=["c"]).train().check(x)
    ElasticZO(Mixes(), tail=["out"], pairing="sequential").train().check(x)
    assert torch.equal(before, model.module.inner[0].weight)
    with pytest.raises(RuntimeError, match="check compares training forwards"):
        model.eval().check(x)


def test_weights_over_one_memory_are_refused() -> None:
    def over(first: Tensor, second: Tensor, name: str = "b.weight") -> Net:
        net = Net()
        net.a.weight = nn.Parameter(first)
        owner, _, local = name.partition(".")
        setattr(getattr(net, owner), local, nn.Parameter(second))
        return net

    base = torch.randn(40)
    message = r"'a.weight' and '{}' lie over each other"
    for name, second in (("b.weight", base[12:28].view(4, 4)), ("c.weight", base[3:15].view(3, 4))):
        with pytest.raises(ValueError, match=message.format(name)):
            ElasticZO(over(base[:16].view(4, 4), second, name), tail=["c"])
    frozen = over(base[:16].view(4, 4), base[:16].view(4, 4))
    frozen.b.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=message.format("b.weight")):
        ElasticZO(frozen, tail=["c"])
    columns = torch.randn(4, 8)  # their rows alternate, and none meet
    ElasticZO(over(columns[:, :4], columns[:, 4:]), tail=["c"])
    ElasticZO(over(base[:16].view(4, 4), base[16:32].view(4, 4)), tail=["c"])
    model = ElasticZO(Net(), tail=["c"])
    state = {**Net().state_dict(), "a.weight": base[:16].view(4, 4)}
    state["b.weight"] = base[8:24].view(4, 4)
    model.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match=message.format("b.weight")):
        ZOSGD(model, lr=0.1)
