"""Muon: momentum whose matrices are made orthogonal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property
from itertools import groupby, islice, repeat
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..cohort import Scaling
from ..declaration import Declaration
from ..inspection import Inspection, Row
from ..language import Formula, Message, NonNegative, Range, Real, Unlisted, lerp, zeros
from ..modes import is_inference, undisturbed, without_autocast
from ..optimizer import Optimizer
from ..param_groups import check_waiting
from ..plan import Stepper
from ..shards import is_sharded, part_of, whole
from ..state import create_state

__all__ = ["Muon"]

# Elements per batch. Its temporaries take 8 bytes per element (16 if the iteration is in float32):
# 268 MB, and on a CPU 4 MB, which stay in its cache.
MOST_ON_CPU = 2**19
MOST_ELSEWHERE = 2**25

HAS_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
"""What CPUs call the instructions without which products in bfloat16 are slow."""

Rate = Annotated[float | Tensor, Range(0), Message("Learning rate should be >= 0 but is: {value}")]
Momentum = Annotated[float | Tensor, Range(0), Message("momentum should be >= 0 but is: {value}")]
Shrinkage = Annotated[
    float | Tensor, Range(0), Message("weight decay should be >= 0 but is: {value}")
]
Steps = Annotated[
    int,
    Range(0, 99),
    Message("Number of steps must be less than 100 for computational efficiency, got {value}"),
]
Adjustment = Annotated[
    Literal["original", "match_rms_adamw", "spectral_unclamped"] | None,
    Message("Adjust learning rate function {value} is not supported"),
]


class Muon(Optimizer):
    """Momentum whose matrices are made orthogonal: all singular values become about one.

        B <- mu B + (1 - mu) g
        U <- B                          (nesterov: mu B + (1 - mu) g)
        X <- U / |U|                    (the norm of all elements, eps if that is larger)
        X <- a X + b A X + c A A X      with A = X X^T, ns_steps times
        p <- p (1 - lr wd) - lr s X     s = sqrt(max(1, rows / columns)), or
                                        0.2 sqrt(max(rows, columns)) with match_rms_adamw,
                                        sqrt(rows / columns) with spectral_unclamped

    Paper: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon. `match_rms_adamw`: Liu et al., Muon is Scalable for
    LLM Training, arXiv:2502.16982. `spectral_unclamped`: Bernstein, Deriving Muon, 2025,
    https://jeremybernste.in/writing/deriving-muon.

    It is for the weights of hidden layers. A parameter needs two dimensions or more; embeddings,
    heads and what has fewer are for AdamW, and `stepwell.groups.muon_split(model)` makes both
    groups. More dimensions are flattened: a convolution's weight of (out, in, height, width) is a
    matrix of out rows and in x height x width columns. Where the first dimensions number matrices
    of their own, as those of experts in one tensor do, `batch_dims` says how many they are: it is
    never guessed from the shape, and may differ from group to group.

    All matrices of one shape are multiplied at once, in batches of up to 2^19 elements on a CPU
    and 2^25 elsewhere; a larger matrix is alone in its batch.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the step size
        weight_decay: the share of the parameter removed per unit of `lr`
        momentum: how much of the running mean of gradients survives a step
        nesterov: look one step of momentum ahead
        ns_coefficients: a, b and c of the iteration
        eps: keeps the norm above zero
        ns_steps: how often the iteration is repeated
        adjust_lr_fn: the factor s; None means "original"
        batch_dims: how many dimensions come before those of a matrix
        ns_dtype: the precision of the iteration; None means "bfloat16", as in torch, but "float32"
            on CPUs that have no instructions for bfloat16: there it is faster, and more exact

    >>> weight = torch.nn.Parameter(torch.eye(2))
    >>> weight.grad = torch.tensor([[0.0, 3.0], [-3.0, 0.0]])
    >>> optimizer = Muon([weight], lr=0.1, weight_decay=0, ns_coefficients=(2, -1.5, 0.5))
    >>> optimizer.step()  # the gradient is 3 times a rotation: what is left is that rotation
    >>> weight.detach().round(decimals=2)
    tensor([[ 1.0000, -0.1000],
            [ 0.1000,  1.0000]])
    """

    lr: Rate = 1e-3
    weight_decay: Shrinkage = 0.1
    momentum: Momentum = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[Real, Real, Real] = (3.4445, -4.7750, 2.0315)
    eps: NonNegative = 1e-7
    ns_steps: Steps = 5
    adjust_lr_fn: Adjustment = None
    _: KW_ONLY
    batch_dims: Annotated[int, Range(0), Unlisted()] = 0
    ns_dtype: Annotated[Literal["bfloat16", "float32"] | None, Unlisted()] = None

    momentum_buffer = zeros()

    @staticmethod
    def check(group: Mapping[str, Any]) -> str | None:
        """Every parameter must be a matrix, or several."""
        least, names = 2 + group.get("batch_dims", 0), group.get("param_names")
        for index, param in enumerate(group["params"]):
            which = f"parameter {names[index] if names else index!r}"
            if param.is_complex():
                # the type of torch's error
                raise RuntimeError(
                    f"Muon does not support complex parameters (Muon, {which} is {param.dtype}: "
                    "leave it to AdamW)"
                )
            if param.ndim < least:
                return (
                    "Muon only supports 2D parameters whereas we found a parameter with size: "
                    f"{param.size()}; {which} must have at least {least} dimensions with "
                    f"batch_dims={least - 2}: stepwell.groups.muon_split(model) leaves the others "
                    "to AdamW"
                )
        return None

    def _state_formula(self) -> Formula:
        return _inspected(self.declaration)

    def _make_plan(self, scaling: Scaling) -> Stepper:
        return _Stepper(self.declaration, self.param_groups, self.state)


class _Stepper:
    """The stepper of Muon: it gathers batches of matrices anew at each step."""

    def __init__(
        self, declaration: Declaration, groups: list[dict[str, Any]], state: dict[Tensor, Any]
    ) -> None:
        self._declaration, self._groups, self._state = declaration, groups, state
        self._scale: Any = None
        self._mode = False
        self._found: list[Piece] = []

    def load(self, scaling: Scaling) -> bool:
        """Gather the pieces; all that is refused is refused before any state is made."""
        check_waiting(self._groups)
        rows = self._inspect()
        # it may lie on a device, for whose answer a rule of several calls has to wait
        rows = [] if scaling.found_inf else rows
        held = [self._state.get(row.param, {}).get("momentum_buffer") for row in rows]
        written = [*(row.param for row in rows), *(buffer for buffer in held if buffer is not None)]
        self._scale, self._mode = scaling.grad_scale, is_inference(written)
        with undisturbed(self._mode):
            self._found = self._pieces(rows)
        return True

    def run(self) -> None:
        """Update all parameters."""
        found, self._found = self._found, []
        with undisturbed(self._mode):
            if self._scale is not None:
                for piece in found:
                    if piece.turn == 1:
                        _unscale(piece.grad, self._scale)
            for batch in _batches(found):
                with without_autocast(batch[0].param.device):
                    _step(batch)

    def describe(self) -> list[str]:
        """Return one line that describes how a step runs."""
        return ["batches of matrices"]

    def _pieces(self, rows: list[Row]) -> list[Piece]:
        settings = [Settings.of(group) for group in self._groups]
        turns: Counter[int] = Counter()
        found: list[Piece] = []
        for row in rows:
            param, state = row.param, self._state[row.param]
            state.update(create_state(row.program, self._groups[row.group], param, state))
            buffer = state["momentum_buffer"]
            assert param.grad is not None
            turns[id(param)] += 1
            turn = turns[id(param)]
            found += Piece(param, param.grad, buffer, settings[row.group], turn).cut()
        return found

    def _inspect(self) -> list[Row]:
        for index, group in enumerate(self._groups):
            # parameters may have been put into the group's list since it was added
            problem = self._declaration.check(group)
            if problem is not None:
                raise ValueError(f"{problem} ({self._declaration.owner}, group {index})")
        formula = _inspected(self._declaration)
        return Inspection(
            formula, self._groups, self._state, grad_scale=None, densify=False, known={}
        ).rows()


def _unscale(grad: Tensor, scale: Any) -> None:
    """Undo a loss scaler's factor, where others see the gradient too."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    with undisturbed(grad.is_inference()):
        grad.copy_(grad.to(wide) * (1 / scale))


def _average(param: Any, grad: Any, state: Any, group: Any) -> Any:
    state.momentum_buffer = lerp(state.momentum_buffer, grad, 1 - group.momentum)
    return param


@cache
def _inspected(declaration: Declaration) -> Formula:
    """The part of a step that is a formula: from it an inspection knows state and gradients."""
    return Formula(declaration.owner, declaration.fields, declaration.slots, _average)


class Iteration(NamedTuple):
    """How matrices are made orthogonal; `dtype` is None where the device decides."""

    coefficients: tuple[float, ...]
    eps: float
    steps: int
    dtype: torch.dtype | None


class Settings(NamedTuple):
    """The hyperparameters of a group, with numbers instead of tensors."""

    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    adjust: str | None
    batch_dims: int
    iteration: Iteration

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Settings:
        """Those of this group."""
        dtype = group.get("ns_dtype")
        iteration = Iteration(
            tuple(float(number) for number in group["ns_coefficients"]),
            float(group["eps"]),
            int(group["ns_steps"]),
            getattr(torch, dtype) if dtype else None,
        )
        lr, weight_decay, momentum = (float(group[n]) for n in ("lr", "weight_decay", "momentum"))
        how = bool(group["nesterov"]), group["adjust_lr_fn"], int(group.get("batch_dims", 0))
        return cls(lr, weight_decay, momentum, *how, iteration)


@dataclass(frozen=True, eq=False)
class Piece:
    """A parameter, or some of its matrices, with what belongs to it.

    Attributes:
        turn: how often the parameter has been listed so far; it is updated as often
    """

    param: Tensor
    grad: Tensor
    buffer: Tensor
    settings: Settings
    turn: int

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of each matrix."""
        rows, *others = self.param.shape[self.settings.batch_dims :]
        return rows, math.prod(others)

    @property
    def count(self) -> int:
        """How many matrices it has."""
        return math.prod(self.param.shape[: self.settings.batch_dims])

    @property
    def company(self) -> Any:
        """What pieces must have in common to be multiplied at once."""
        param, mesh = self.param, getattr(self.param, "device_mesh", None)
        kind = type(param), mesh, param.device, param.dtype, self.buffer.dtype
        return self.turn, self.shape, kind, self.settings.iteration

    @property
    def step_size(self) -> float:
        """How far the parameter moves along each singular vector."""
        rows, columns = self.shape
        if self.settings.adjust == "match_rms_adamw":
            return self.settings.lr * 0.2 * math.sqrt(max(rows, columns))
        least = 0.0 if self.settings.adjust == "spectral_unclamped" else 1.0
        return self.settings.lr * math.sqrt(max(least, rows / columns))

    def cut(self) -> list[Piece]:
        """If it has many matrices, pieces of the size of a batch; nothing if it is empty."""
        size = self.param.numel()
        if not self.settings.batch_dims or size <= self.most or is_sharded(self.param):
            return [self] if size else []
        length = max(1, self.most * len(self.param) // size)
        tensors = self.param.detach(), self.grad.detach(), self.buffer
        parts = zip(*(torch.split(tensor, length) for tensor in tensors), strict=True)
        return [Piece(p, grad, buffer, self.settings, self.turn) for p, grad, buffer in parts]

    @property
    def most(self) -> int:
        """How many elements a batch may have."""
        return MOST_ON_CPU if self.param.device.type == "cpu" else MOST_ELSEWHERE


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces that can be multiplied at once, as many as a batch may have."""
    companies: dict[Any, list[Piece]] = {}
    for piece in pieces:
        companies.setdefault(piece.company, []).append(piece)
    for company in companies.values():
        batch: list[Piece] = []
        room = company[0].most
        for piece in company:
            size = piece.param.numel()
            if batch and size > room:
                yield batch
                batch, room = [], piece.most
            batch.append(piece)
            room -= size
        yield batch


def _step(batch: list[Piece]) -> None:
    """One step of matrices that are multiplied at once."""
    runs = [list(run) for _, run in groupby(batch, key=lambda piece: piece.settings)]
    iteration = batch[0].settings.iteration
    dtype = iteration.dtype or _fastest_dtype(batch[0].param.device)
    directions = torch.cat([matrices for run in runs for matrices in _directions(run, dtype)])
    orthogonal = _orthogonalize(directions, iteration)
    parts = iter(torch.split(orthogonal, [piece.count for piece in batch]))
    for run in runs:
        _move(run, list(islice(parts, len(run))))


def _directions(run: list[Piece], dtype: torch.dtype) -> list[Tensor]:
    """The momentum after this gradient, as (count, rows, columns) for each piece."""
    momentum = run[0].settings.momentum
    buffers = [piece.buffer for piece in run]
    grads = [piece.grad.to(piece.buffer.dtype) for piece in run]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    if run[0].settings.nesterov:
        if is_sharded(run[0].param):
            # torch 2.11 has no rule for a list of distributed tensors
            buffers = list(map(torch.lerp, grads, buffers, repeat(momentum)))
        else:
            buffers = list(torch._foreach_lerp(grads, buffers, momentum))
    if is_sharded(run[0].param):
        buffers = list(map(whole, buffers))
    return [buffer.to(dtype).reshape(-1, *run[0].shape) for buffer in buffers]


def _move(run: list[Piece], orthogonal: list[Tensor]) -> None:
    """Weight decay, and a step along what was made orthogonal."""
    settings, params = run[0].settings, [piece.param for piece in run]
    kept = 1 - settings.lr * settings.weight_decay
    if kept != 1:
        # a tensor, for on a CPU this call rounds a float to half precision before it multiplies
        torch._foreach_mul_(params, torch.tensor(kept, dtype=torch.float64, device="cpu"))
    shaped = [x.reshape(param.shape) for x, param in zip(orthogonal, params, strict=True)]
    if is_sharded(run[0].param):
        shaped = [part_of(x, param) for x, param in zip(shaped, params, strict=True)]
    torch._foreach_add_(params, shaped, alpha=-run[0].step_size)


def _orthogonalize(x: Tensor, iteration: Iteration) -> Tensor:
    """The iteration on each of many matrices, (count, rows, columns), which it overwrites."""
    a, b, c = iteration.coefficients
    least = max(iteration.eps, torch.finfo(x.dtype).tiny)
    x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=least))
    count, rows, columns = x.shape
    side = min(rows, columns)
    # written to in turns: on a CPU, fresh memory for every product takes up to 15 % longer
    after = torch.empty_like(x)
    gram, change = x.new_empty(2, count, side, side)
    for _ in range(iteration.steps):
        # of X X^T and X^T X the smaller one, from its side; no matrix is ever transposed
        torch.bmm(*((x.mT, x) if rows > columns else (x, x.mT)), out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=change)
        factors = (x, change) if rows > columns else (change, x)
        torch.baddbmm(x, *factors, beta=a, out=after)
        x, after = after, x
    return x


@cache
def _fastest_dtype(device: torch.device) -> torch.dtype:
    has = getattr(torch.cpu, "get_capabilities", dict[str, Any])()
    slow = device.type == "cpu" and not any(has.get(name) for name in HAS_BFLOAT16)
    return torch.float32 if slow else torch.bfloat16
