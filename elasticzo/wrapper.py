"""`ElasticZO`: any `nn.Module`, its head perturbed, its tail open to backpropagation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.cut import Tail, resolve_cut, warn_of_empty_head
from elasticzo.estimator import Estimator, asked_estimator
from elasticzo.feedback import Feedback
from elasticzo.forward.check import check_stacked
from elasticzo.forward.engine import Engine
from elasticzo.forward.hear import learn_by_feedback
from elasticzo.forward.learn import estimates
from elasticzo.forward.plan import head_of
from elasticzo.forward.trees import check_leaves, strip
from elasticzo.head import Kind
from elasticzo.losses import all_finite, check_losses, select_source
from elasticzo.memory.budget import Candidate, fit_tail
from elasticzo.module import Ties, ZOModule, load_inside, loaded, place_of, registry_of
from elasticzo.optim.replay import replayer
from elasticzo.optim.tail import tail_optimizer
from elasticzo.overlap import check_apart
from elasticzo.ownership import check_free, check_held, freeze, unwrap
from elasticzo.points import CLEAN
from elasticzo.session import Session
from elasticzo.settings import Unread, check_budget, check_noise, check_settings


class ElasticZO(ZOModule):
    """Train the first layers of `model` by zeroth-order optimisation, the last by backpropagation.

    In `train()` a forward runs the model at `w + eps s z_q` and `w - eps s z_q` for every query q
    and returns `[2Q, B, ...]`: half `2q` is +, half `2q + 1` is -. In `eval()` it is the model.
    The projected gradient of a query is `g = (L+ - L-) / (2 eps)`; `ZOSGD.step` does the update.

    Args:
        model: any module that is not wrapped. Its parameters are shared, never copied; those frozen
            before stay frozen, those of the head are until `unwrap()`.
        tail: what backpropagation trains: module names (children included), the number of last
            Linear / Conv / Embedding layers, 0 (Full ZO), "all" (Full BP, one pass) or "auto".
        eps: perturbation scale.
        noise: "normal" or "rademacher"; None is normal for directions of kind "weight", and signs
            for the others. "rank1" is directions="rank1" with signs.
        queries: directions a step, Q.
        seed: of the run, in [0, 2^63). Models of one seed draw the same `z`: give each its own.
        pairing: "stacked" (the halves as one batch) or "sequential" (one after the other:
            inference's activation memory; for models that mix rows, or have no batch in front).
        backend: "auto", "triton", "numba" or "reference"; `self.backend` says which one runs.
        compute_dtype: of matrix products and convolutions in the head: a dtype, or "ieee", "tf32",
            "tf32x3" for float32 ones; None is autocast's, or the weight's own.
        scale: {name pattern: s}: perturbs by `eps * s * z`; update and g use the same `s z`.
        memory_budget, example_input: of tail="auto", the largest tail whose training step fits that
            many bytes: what torch's allocator holds at most, predicted by `elasticzo.memory` for a
            batch like `example_input` (an input, or a tuple of them) and a head without state
            (plain `ZOSGD`). Read it from `cut.tail`.
        path: how a layer of the head is perturbed: "fused" (its kernel makes `z`; where one
            exists), "staged" (its halves are written first), "auto" (the faster one by
            `zo_kernels.paths`), or {name pattern: path}.
        estimator: another one than the paper's (`elasticzo.estimator`: `one_sided`, `low_rank`), in
            place of noise and queries.
        directions: by whose noise weights are learnt, of all of the head or {name pattern: kind}:
            "weight" (the paper's: one direction of N K elements a batch), "rank1" (one `r u^T` a
            batch), "sample" (one `r u^T` a sample), "node" (noise on the layer's outputs, one a
            sample; the layer's input is kept for the step), "auto" (of the last two the one that
            looks into fewer dimensions, settled by the first forward). Those of samples need
            the loss of each: `pair_losses(..., reduction="none")`. What a layer cannot serve has
            another kind: `model.directions` says which, and why. "feedback", or a `Feedback(...)`:
            of the whole head, errors by learnt matrices, a forward is one pass `[1, B, ...]`.
        group: neighbouring samples that share a direction of kind "sample".
        state_tensors: of tail="auto": tensors that the tail's optimiser keeps for a parameter (Adam
            2, momentum 1, plain SGD 0).
    Shapes: inputs may be nested; tensors have the batch as dimension 0 or are declared `unbatched`.
    Raises: ValueError, TypeError that name what was expected and what came.
    Source: arXiv:2501.04287, abstract; Spall 1992 for the two-sided estimator.
    """

    def __init__(
        self,
        model: nn.Module,
        tail: Tail,
        eps: float = 1e-3,
        noise: str | None = None,
        queries: int = 1,
        seed: int = 0,
        pairing: str = "stacked",
        backend: str = "auto",
        compute_dtype: torch.dtype | str | None = None,
        scale: Mapping[str, float] | None = None,
        memory_budget: int | None = None,
        example_input: Any = None,
        path: str | Mapping[str, str] = "auto",
        state_tensors: int = 2,
        estimator: Estimator | None = None,
        directions: str | Mapping[str, str] | Feedback = "weight",
        group: int = 1,
    ) -> None:
        super().__init__()
        check_settings(model, eps, queries, seed, pairing, backend)
        if noise not in (None, "rank1"):
            check_noise(noise)
        check_budget(tail, memory_budget, example_input, state_tensors)
        self.estimator, directions = asked_estimator(estimator, noise, queries, directions, group)
        check_free(model)
        self.module = model
        self.register_load_state_dict_post_hook(loaded)  # type: ignore[no-untyped-call]
        samples, learnt = self.estimator.samples, self.estimator.feedback
        self.wanted_backend = backend
        self.fitted: Candidate | None = None  # what tail="auto" chose
        how: dict[str, Any] = {"pairing": pairing, "backend": backend}
        if isinstance(tail, str) and tail == "auto":
            given = {**how, "eps": eps, "compute_dtype": compute_dtype, "estimator": self.estimator}
            given |= {"directions": directions, "group": group}
            if learnt is not None:
                given |= {"directions": learnt, "estimator": None}
            assert memory_budget is not None
            wanted = (memory_budget, example_input, state_tensors)
            self.fitted, scale, path = fit_tail(ElasticZO, model, *wanted, scale, path, given)
            tail = self.fitted.tail
        self.cut = resolve_cut(model, tail)
        warn_of_empty_head(self.cut.head_parameters, self.cut)
        self.head = head_of(model, self.cut, scale)
        check_apart(model, self.head.named())
        self.session = Session(seed, eps, place_of(model))
        learnt = None if self.cut.everything else learnt
        self.session.learns = learnt is not None
        of = (model, self.cut, self.head, self.session, self.estimator.direction, samples, learnt)
        how |= {"path": path, "directions": directions, "wanted": compute_dtype}
        self.engine = Engine(*of, **how)
        if learnt is not None:
            learnt.check_layers(list(self.engine.plan.layers))
        self._tenure = freeze(model, self.head)

    # ---- what it is

    @property
    def eps(self) -> float:
        """Perturbation scale; fixed, since a log and a checkpoint state it for the whole run."""
        return self.session.scale

    @property
    def noise(self) -> str:
        """Of the directions: "normal" or "rademacher"."""
        return self.estimator.noise

    @property
    def directions(self) -> dict[str, Kind]:
        """By whose noise each weight of the head is learnt, and why; "auto" is settled by the first
        forward."""
        return dict(self.head.kinds)

    @property
    def feedback_residual(self) -> dict[str, Tensor]:
        """Of learnt feedback: the share of what the noise on each layer's inputs did to the loss
        that its matrix did not foretell in the last step, `sum (c - xi . M e)^2 / sum c^2`: 1 where
        it knows nothing, and what other layers' noise does stays in it."""
        return dict(self.engine.residual)

    @property
    def pairing(self) -> str:
        """As it was asked for."""
        return self.engine.pairing

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Of products in the head, where one was named."""
        return self.engine.compute_dtype

    @property
    def precision(self) -> str | None:
        """Of float32 products in the head, where one was named."""
        return self.engine.precision

    @property
    def effective_pairing(self) -> str:
        """How the halves run: those of a model with parameters at its root, one by one."""
        return self.engine.effective_pairing

    def named_tail_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        names = set(self.cut.tail_parameters)
        return ((n, p) for n, p in self.module.named_parameters() if n in names)

    def unwrap(self) -> nn.Module:
        """The model itself, as `elasticzo.unwrap` gives it back; this wrapper trains no more."""
        model: nn.Module = unwrap(self)
        return model

    def check_held(self) -> None:
        check_held(self._tenure)

    def extra_repr(self) -> str:
        head = sum(p.numel() for p in self.head_parameters())
        tail = sum(p.numel() for p in self.tail_parameters())
        return (
            f"head={head} parameters (ZO), tail={tail} (BP: {self.cut.named}), eps={self.eps:g}, "
            f"noise={self.noise}, queries={self.queries}, pairing={self.effective_pairing}, "
            f"backend={self.backend}{self._kinds()}"
        )

    def _kinds(self) -> str:
        """How many weights have which kind, where it is not the paper's alone."""
        count = Counter(kind.name for kind in self.head.kinds.values())
        if set(count) <= {"weight"}:
            return ""
        return ", directions: " + ", ".join(f"{n} {name}" for name, n in count.items())

    # ---- the forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`train()`: `[2Q, B, ...]` of the perturbed halves; `eval()`: the model's own output."""
        if not self.training:
            self.flush()
            return self.module(*strip(args), **strip(kwargs))
        self.check_held()
        check_leaves((args, kwargs), "an input")
        points = CLEAN if self.cut.everything else self.estimator.points
        return self.engine.run(points, args, kwargs)

    def clean_forward(self, *args: Any, **kwargs: Any) -> Any:
        """One unperturbed training pass, `[1, B, ...]`, for a tail that is to learn from it."""
        if not self.training:
            raise RuntimeError("clean_forward is for train(); in eval() call the model itself")
        self.check_held()
        return self.engine.clean(args, kwargs)

    def settle(self, *args: Any, **kwargs: Any) -> dict[str, Kind]:
        """Let the first forward look at the model, on these inputs; nothing moves by it.

        Returns: `directions`, of which none is "auto" any more.
        """
        if not self.training:
            raise RuntimeError("settle looks at a training forward: call model.train() first")
        self.flush()
        if not self.cut.everything:
            self.engine.settle_on(self.estimator.points, args, kwargs)
        return self.directions

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Compare stacked with sequential pairing on these inputs, module by module.

        Both run at a large temporary eps; weights, buffers and generators are as before afterwards.
        Raises: ValueError that names the first module whose outputs differ.
        """
        if not self.training:
            raise RuntimeError("check compares training forwards: call model.train() first")
        self.flush()
        if not self.cut.everything:
            check_stacked(self.engine, self.estimator.points, args, kwargs)

    # ---- losses and the tail

    def backward(self, losses: Tensor, source: str | Tensor = "mean") -> None:
        """Backpropagate the "mean" of the losses `[2Q]`, or `[2Q, B]` by sample ("plus" / "minus":
        of those halves), or the scalar loss of a `clean_forward`, into the tail; note on the device
        what is not finite."""
        samples = self.session.samples
        if isinstance(losses, Tensor) and losses.dim() == 2:  # of this micro-batch
            samples = losses.shape[1]
        check_losses(losses, self.halves, samples if self.reduction else None)
        self.session.note_losses(all_finite(losses, source))
        if losses.dim() == 2:
            losses = losses.mean(1)
        loss = select_source(losses, source, self.estimator.sources)
        if loss.requires_grad:  # through the tail, and layers outside of the model
            loss.backward()  # type: ignore[no-untyped-call]
        elif self.cut.tail_parameters:
            raise ValueError(
                "the losses carry no gradient to the tail: was the forward under no_grad, were the "
                "losses detached, or was the tail frozen since it was wrapped?"
            )

    def tail_optimizer(
        self, cls: type[torch.optim.Optimizer], **settings: Any
    ) -> torch.optim.Optimizer:
        """An optimiser of any torch class on the tail, which skips the steps that the head skips.

        Fused classes get `found_inf` on the device; others read the flag on the host.
        """
        return tail_optimizer(self, cls, **settings)

    def gate(self) -> Tensor:
        """1.0 where a loss of this step is not finite: `[]` float32 on the device."""
        return self.session.gate(self.tail_parameters())

    # ---- nn.Module

    def __getattr__(self, name: str) -> Any:
        """What the model has under this name, too: functional_call and checkpoints of
        torch.distributed walk by the keys of `state_dict`, which are the model's."""
        place = registry_of(self, name)
        return place[name] if place is not None else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        place = registry_of(self, name) if isinstance(value, Tensor) else None
        if place is None or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:  # what functional_call puts in place of a tensor of the model's root
            place[name] = value

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state of the wrapped model, under its own keys."""
        self.flush()
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        self.flush()
        self.forget_forwards()
        ties = Ties(self.module)
        found = self.module.load_state_dict(state_dict, strict=strict, assign=assign)
        ties.restore()
        self.follow()
        return found

    def _load_from_state_dict(self, *args: Any) -> None:
        self.flush()
        self.forget_forwards()
        load_inside(self, *args)

    def train(self, mode: bool = True) -> ElasticZO:
        if not mode:
            self.flush()
        return super().train(mode)

    def moved(self, device: torch.device) -> None:
        super().moved(device)
        self.engine.unsettle()

    def learn(self, a: Tensor, found: Tensor, take: Callable[[str, Tensor], None]) -> None:
        if self.engine.feedback is not None:
            learn_by_feedback(self.engine, self.backend, found, take)
            return
        samples = self.estimator.samples
        for name, u in estimates(self.session, self.head, samples, a, self.backend):
            take(name, u)

    def replayer(self, header: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
        return replayer(self, header)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Sequence[str]:
        return Unread()
