"""`ElasticZO`: any `nn.Module`, its head perturbed, its tail open to backpropagation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elasticzo.check import check_stacked
from elasticzo.cut import Tail, resolve_cut
from elasticzo.deferred import Deferred, flush_others
from elasticzo.distributed import refuse_sharded, refuse_wrapped
from elasticzo.engine import UsesGenerator, each_half, run_stacked, taken_over
from elasticzo.losses import all_finite, check_losses, select_source
from elasticzo.nested import load_inside, loaded
from elasticzo.passes import SMALL, Pass
from elasticzo.plan import build_plan
from elasticzo.precision import parse_compute_dtype
from elasticzo.settings import check_budget, check_settings
from elasticzo.state import BufferSnapshot, Slot, address, all_buffers
from elasticzo.tail import gate_on, tail_optimizer
from elasticzo.trees import (
    InputsStay,
    check_leaves,
    join,
    stack_inputs,
    stack_leaves,
    strip,
    unstack_outputs,
)
from elasticzo.verify import DRAWS, circumstances, first_pair
from zo_kernels import resolve_backend

if TYPE_CHECKING:
    from elasticzo.budget import Candidate


class ElasticZO(nn.Module):
    """Train the first layers of `model` by zeroth-order optimisation, the last by backpropagation.

    In `train()` a forward runs the model at `w + eps s z_q` and `w - eps s z_q` for every query q
    and returns `[2Q, B, ...]`: half `2q` is +, half `2q + 1` is -. In `eval()` it is the model.
    The projected gradient of a query is `g = (L+ - L-) / (2 eps)`; `ZOSGD.step` does the update.

    Args:
        model: any module. Its parameters are shared, never copied; those frozen before stay frozen.
        tail: what backpropagation trains: module names (children included), the number of last
            Linear / Conv / Embedding layers, 0 (Full ZO), "all" (Full BP, one pass) or "auto".
        eps: perturbation scale.
        noise: "normal" or "rademacher".
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
            batch like `example_input` (an input, or a tuple of them). Read it from `cut.tail`.
        path: how a layer of the head is perturbed: "fused" (its kernel makes `z`; where one
            exists), "staged" (its halves are written first), "auto" (the faster one by
            `zo_kernels.paths`), or {name pattern: path}.
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
        noise: str = "normal",
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
    ) -> None:
        super().__init__()
        check_settings(model, eps, noise, queries, seed, pairing, backend)
        check_budget(tail, memory_budget, example_input, state_tensors)
        flush_others(model)
        self.module = model
        self.register_load_state_dict_post_hook(loaded)  # type: ignore[no-untyped-call]
        self._wrapped_modules = list(model.modules())
        self.noise = noise
        self.queries = queries
        self.pairing = pairing
        self.compute_dtype, self.precision = parse_compute_dtype(compute_dtype)
        self._wanted_backend = backend
        for p in model.parameters():
            if getattr(p, "_elasticzo_head", False):  # frozen by a wrapper before, not by the user
                p.requires_grad_(True)
        self.fitted: Candidate | None = None  # what tail="auto" chose
        if isinstance(tail, str) and tail == "auto":
            from elasticzo.budget import fit_tail  # it wraps models itself

            how = {"eps": eps, "noise": noise, "queries": queries, "pairing": pairing}
            how |= {"backend": backend, "compute_dtype": compute_dtype}
            assert memory_budget is not None
            wanted = (memory_budget, example_input, state_tensors)
            self.fitted, scale, path = fit_tail(model, *wanted, scale, path, how)
            tail = self.fitted.tail
        self.cut = resolve_cut(model, tail)
        self._plan = build_plan(model, self.cut, scale, path)
        if pairing == "stacked" and self._plan.sequence_first and not self.cut.everything:
            raise ValueError(
                "pairing='stacked' needs the batch as dimension 0, but these modules have "
                f"batch_first=False: {', '.join(self._plan.sequence_first)}; use "
                "pairing='sequential'"
            )
        for name, p in model.named_parameters():
            if name in self._plan.parameters:
                p.requires_grad_(False)
                p._elasticzo_head = True  # type: ignore[attr-defined]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._backend = resolve_backend(backend, device)
        self._key = torch.tensor([seed, 0], dtype=torch.int64, device=device)
        self._eps = torch.tensor(float(eps), dtype=torch.float64, device=device)
        self._next = torch.tensor([0, 1], dtype=torch.int64, device=device)
        self._found = torch.zeros((), dtype=torch.float32, device=device)
        self._last_found = torch.zeros_like(self._found)  # of the step before
        self._seed, self._eps_value = seed, float(eps)
        self._stepped = False  # whether a step was done since wrapping
        self._gated = False  # whether `backward` looked at this step's losses
        self._micro_batches = 0  # training forwards since the last step
        # What the plan was verified under; None before the first forward.
        self._verified: tuple[Any, ...] | None = None
        self._compiled = False  # whether torch.compile traces around the paired layers
        self._mixes_generator = False
        self._moving: list[Slot] = []
        self._before: BufferSnapshot | None = None  # buffers as the last step left them
        self._seen: list[tuple[int, int]] = []  # head parameters as the last forward read them
        self._deferred: Deferred | None = None  # an update that waits for the next forward

    # ---- what it is

    @property
    def eps(self) -> float:
        """Perturbation scale; fixed, since a log and a checkpoint state it for the whole run."""
        return self._eps_value

    @property
    def seed(self) -> int:
        """Seed of the noise."""
        return self._seed

    @property
    def halves(self) -> int:
        """Halves of a training forward: 2Q, or 1 where there is nothing to perturb ("all")."""
        return 1 if self.cut.everything else 2 * self.queries

    @property
    def backend(self) -> str:
        """The backend that runs on the device of the parameters: triton, numba or reference."""
        return self._backend

    @property
    def effective_pairing(self) -> str:
        """How the halves run: those of a model with parameters at its root, one by one."""
        by_half = "" in self._plan.layers and self._plan.layers[""].kind == "fallback"
        return "sequential" if by_half or self._mixes_generator else self.pairing

    @property
    def step_index(self) -> int:
        """Steps done, skipped ones included. Reads the device."""
        return int(self._key[1])

    def _head(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, module, local in self._plan.slots:
            p = module._parameters[local]
            assert p is not None
            yield name, p

    def named_head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The head by name, as the last step left it."""
        self.flush()
        return self._head()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that zeroth-order optimisation trains."""
        return (p for _, p in self.named_head_parameters())

    def named_tail_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        names = set(self.cut.tail_parameters)
        return ((n, p) for n, p in self.module.named_parameters() if n in names)

    def tail_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that backpropagation trains."""
        return (p for _, p in self.named_tail_parameters())

    def extra_repr(self) -> str:
        head = sum(p.numel() for p in self.head_parameters())
        tail = sum(p.numel() for p in self.tail_parameters())
        return (
            f"head={head} parameters (ZO), tail={tail} (BP: {self.cut.named}), eps={self.eps:g}, "
            f"noise={self.noise}, queries={self.queries}, pairing={self.effective_pairing}, "
            f"backend={self.backend}"
        )

    # ---- the forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`train()`: `[2Q, B, ...]` of the perturbed halves; `eval()`: the model's own output."""
        if not self.training:
            self.flush()
            return self.module(*strip(args), **strip(kwargs))
        if torch.compiler.is_compiling():
            self._compiled = True
        check_leaves((args, kwargs), "an input")
        if self._verified == circumstances(self):
            return self._pair(args, kwargs)
        return self._first_pair(args, kwargs)

    def clean_forward(self, *args: Any, **kwargs: Any) -> Any:
        """One unperturbed training pass, `[1, B, ...]`, for a tail that is to learn from it."""
        if not self.training:
            raise RuntimeError("clean_forward is for train(); in eval() call the model itself")
        self.flush()
        buffers = BufferSnapshot(all_buffers(self.module))
        output = self._run(self._new_pass(False, halves=1, perturb=False), args, kwargs)
        buffers.restore()  # statistics move with the pair, once a micro-batch
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _first_pair(self, args: Any, kwargs: Any) -> Any:
        self.flush()
        output = first_pair(self, args, kwargs)
        self._verified = circumstances(self)
        self._micro_batches += 1
        return output

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def _pair(self, args: Any, kwargs: Any) -> Any:
        if self._before is None:
            self._before = BufferSnapshot(self._moving)
        try:
            output = self._run(self._new_pass(False, self.halves), args, kwargs)
            self.flush()  # what this forward did not read
        except UsesGenerator:
            self._mixes_generator = True
            self._before.restore()
            raise RuntimeError(f"{DRAWS}; it did not before: repeat this step") from None
        self._micro_batches += 1
        return output

    def _new_pass(self, verify: bool, halves: int, perturb: bool = True) -> Pass:
        self._seen, small = [], []
        for name, p in self._head():
            refuse_sharded(name, p)
            self._seen.append((id(p), address(p)))
            head = self._plan.parameters[name]
            if p.numel() <= SMALL and head.scale != 0.0 and head.still_row is None:
                small.append((head, p))
        if len({p.dtype for _, p in small}) > 1:
            small = []
        return Pass(
            self._key,
            self._eps,
            self.noise,
            self.backend,
            halves,
            self._micro_batches,
            perturb=perturb and not self.cut.everything,
            verify=verify,
            wanted=self.compute_dtype,
            precision=self.precision,
            small=small,
            deferred=self._deferred,
        )

    def _run(self, current: Pass, args: Any, kwargs: Any) -> Any:
        n = current.halves
        sequential = self.effective_pairing == "sequential" or n == 1
        settings = (self._moving, self._compiled)
        with taken_over(self.module, self._plan, current, *settings):
            if not sequential:
                stacked, current.unbatched, current.batched = stack_inputs((args, kwargs), n)
                output = run_stacked(self.module, current, *stacked)
                return unstack_outputs(output, n)
            a, k = strip(args), strip(kwargs)
            inputs = InputsStay((a, k))
            outputs = each_half(current, self._moving, lambda half: inputs.run(self.module, half))
            return join(outputs, stack_leaves)

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Compare stacked with sequential pairing on these inputs, module by module.

        Both run at a large temporary eps; weights, buffers and generators are as before afterwards.
        Raises: ValueError that names the first module whose outputs differ.
        """
        self.flush()
        check_stacked(self, args, kwargs)

    def flush(self) -> None:
        """Apply an update that waits for the next forward (`ZOSGD(defer=True)`); else nothing."""
        if self._deferred is not None:
            self._deferred.finish(self.noise, self.backend)

    # ---- losses and the tail

    def backward(self, losses: Tensor, source: str | Tensor = "mean") -> None:
        """Backpropagate the "mean" of the losses `[2Q]` ("plus" / "minus": of those halves), or the
        scalar loss of a `clean_forward`, into the tail; note on the device what is not finite."""
        check_losses(losses, self.halves)
        finite = all_finite(losses, source)
        self._found.copy_(torch.maximum(self._found, (~finite).to(torch.float32)))
        self._gated = True
        loss = select_source(losses, source)
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
        return gate_on(self)

    # ---- nn.Module

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state of the wrapped model, under its own keys."""
        self.flush()
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        self.flush()
        self._forget_forwards()
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.flush()
        self._forget_forwards()
        load_inside(self, *args)

    def _forget_forwards(self) -> None:
        """What is known of this step belongs to other weights now, or to the step before."""
        self._found.zero_()
        self._gated, self._micro_batches, self._before = False, 0, None

    def train(self, mode: bool = True) -> ElasticZO:
        if not mode:
            self.flush()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return {**self.__dict__, "_deferred": None}

    def _apply(self, fn: Any, recurse: bool = True) -> ElasticZO:
        self.flush()
        self._deferred = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # `fn` may change a floating dtype: only the device is taken from it.
        device = fn(self._key).device
        self._backend = resolve_backend(self._wanted_backend, device)
        for name in ("_key", "_eps", "_next", "_found", "_last_found"):
            setattr(self, name, getattr(self, name).to(device))
        self._verified = None
        self._before = None
        return self

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Sequence[str]:
        refuse_wrapped("DistributedDataParallel")
        return []


__all__ = ["ElasticZO"]
