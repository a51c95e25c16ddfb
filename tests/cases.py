"""The table of cases: every rule under every combination of its flags, and what it learns from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

import stepwell
from stepwell.native.triton_jit import is_interpreting

Shapes = Sequence[tuple[int, ...]]

# the names of torch's optimizers
CLASSES = [
    name
    for name in torch.optim.__all__
    if inspect.isclass(getattr(torch.optim, name)) and name != "Optimizer"
]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# what is fastest for the tests' tensors: with TRITON_INTERPRET=1, the kernels for GPUs on a CPU
NATIVE = "triton" if is_interpreting() else "cpu"
# the ways a user names a back-end, and the one that is then expected
REQUESTS: dict[str, dict[str, bool]] = {
    "eager": {"foreach": False},
    "foreach": {"foreach": True},
    NATIVE: {"fused": True},
}
# none, one, less than a vector register, more than one, more than a block, and 0-d
SIZES: Shapes = ((0,), (1,), (7,), (10, 100), (20_000,), ())


@dataclass(frozen=True)
class Case:
    """A rule with hyperparameters, and torch's class of the same name."""

    name: str
    rule: type[Any]
    twin: type[Any] | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, params: Any, **more: Any) -> Any:
        """Ours; tensors among the hyperparameters are fresh ones."""
        return self.rule(params, **self._fresh(), **more)

    def make_twin(self, params: Any, **more: Any) -> Any:
        """Torch's."""
        assert self.twin is not None
        return self.twin(params, **self._fresh(), **more)

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the rule updates such parameters: complex numbers have no rows and columns."""
        return not (dtype.is_complex and issubclass(self.rule, stepwell.Adafactor))

    def _fresh(self) -> dict[str, Any]:
        return {name: _copied(value) for name, value in self.options.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return value.clone() if isinstance(value, Tensor) else value


def _spelt(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ",".join(map(_spelt, value)) + ")"
    if isinstance(value, Tensor):
        return f"tensor{value.item():g}"
    return "None" if value is None else f"{value:g}"


def _case(rule: type[Any], twin: type[Any] | None, **options: Any) -> Case:
    words = [k if v is True else f"{k}={_spelt(v)}" for k, v in options.items() if v is not False]
    return Case(f"{rule.__name__}({', '.join(words)})", rule, twin, options)


def _combinations(**choices: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for values in product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _sgd() -> Iterator[Case]:
    flags = _combinations(
        momentum=(0, 0.9),
        dampening=(0, 0.1),
        nesterov=(False, True),
        weight_decay=(0, 0.05),
        maximize=(False, True),
    )
    for options in flags:
        if options["nesterov"] and (not options["momentum"] or options["dampening"]):
            continue
        yield _case(stepwell.SGD, torch.optim.SGD, lr=0.1, **options)
    yield _case(stepwell.SGD, torch.optim.SGD, lr=torch.tensor(0.1), momentum=0.9)


def _adam() -> Iterator[Case]:
    flags = _combinations(
        weight_decay=(0, 0.05),
        amsgrad=(False, True),
        decoupled_weight_decay=(False, True),
        maximize=(False, True),
    )
    for options in flags:
        # eps so large that it matters, or a misplaced one would not be seen
        yield _case(stepwell.Adam, torch.optim.Adam, lr=0.02, eps=1e-3, **options)
    yield _case(stepwell.Adam, torch.optim.Adam, lr=torch.tensor(0.02), amsgrad=True)
    betas = (torch.tensor(0.8), torch.tensor(0.95))
    yield _case(stepwell.Adam, torch.optim.Adam, lr=torch.tensor(0.02), betas=betas)


def _adamw() -> Iterator[Case]:
    flags = _combinations(weight_decay=(0, 0.05), amsgrad=(False, True), maximize=(False, True))
    for options in flags:
        yield _case(
            stepwell.AdamW, torch.optim.AdamW, lr=0.02, betas=(0.8, 0.95), eps=1e-3, **options
        )
    yield _case(stepwell.AdamW, torch.optim.AdamW)
    betas = (torch.tensor(0.8), torch.tensor(0.95))
    yield _case(stepwell.AdamW, torch.optim.AdamW, lr=torch.tensor(0.02), betas=betas)


def _all(rule: type[Any], twin: type[Any], flags: Mapping[str, Any], **same: Any) -> Iterator[Case]:
    """Every combination of flags and switches, with `maximize`; and a rate that is a tensor."""
    for options in _combinations(**flags, maximize=(False, True)):
        yield _case(rule, twin, **same, **options)
    yield _case(rule, twin, **{**same, "lr": torch.tensor(0.02)})


def per_element(cases: Sequence[Case]) -> tuple[Case, ...]:
    """All but those by rows and columns, which have no kernels for GPUs yet."""
    return tuple(case for case in cases if case.rule is not stepwell.Adafactor)


DECAYS = {"weight_decay": (0, 0.05)}
DECOUPLED = {**DECAYS, "decoupled_weight_decay": (False, True)}

CASES: tuple[Case, ...] = (
    *_sgd(),
    *_adam(),
    *_adamw(),
    *_all(
        stepwell.Adagrad,
        torch.optim.Adagrad,
        {**DECAYS, "lr_decay": (0, 0.1), "initial_accumulator_value": (0, 0.2)},
        lr=0.05,
    ),
    *_all(
        stepwell.RMSprop,
        torch.optim.RMSprop,
        {**DECAYS, "momentum": (0, 0.9), "centered": (False, True)},
        lr=0.02,
        eps=1e-3,
    ),
    *_all(stepwell.Adadelta, torch.optim.Adadelta, DECAYS, lr=0.5, eps=1e-3),
    *_all(stepwell.Adamax, torch.optim.Adamax, DECAYS, lr=0.02, eps=1e-3),
    *_all(stepwell.NAdam, torch.optim.NAdam, DECOUPLED, lr=0.02, eps=1e-3),
    # betas with which the mean square is trusted after a few steps
    *_all(stepwell.RAdam, torch.optim.RAdam, DECOUPLED, lr=0.02, betas=(0.8, 0.95), eps=1e-3),
    *_all(stepwell.ASGD, torch.optim.ASGD, {**DECAYS, "t0": (1e6, 2)}, lr=0.05, lambd=0.1),
    *_all(stepwell.Rprop, torch.optim.Rprop, {"step_sizes": ((1e-6, 50), (1e-3, 0.03))}),
    *_all(
        stepwell.Adafactor,
        torch.optim.Adafactor,
        {**DECAYS, "d": (1, 1.5), "eps": ((None, 1e-3), (0.01, 2.0))},
        lr=0.02,
    ),
)

if is_interpreting():
    # it takes its time: every third combination, the rest is the same kernels without a term
    CASES = per_element(CASES)[::3]

# one of each rule, for questions that no flag changes
PLAIN: tuple[Case, ...] = (
    _case(stepwell.SGD, torch.optim.SGD, lr=0.1),
    _case(stepwell.SGD, torch.optim.SGD, lr=0.1, momentum=0.9),
    _case(stepwell.Adam, torch.optim.Adam, lr=0.02),
    _case(stepwell.AdamW, torch.optim.AdamW, lr=0.02, amsgrad=True),
    _case(stepwell.Adagrad, torch.optim.Adagrad, lr=0.05),
    _case(stepwell.RMSprop, torch.optim.RMSprop, lr=0.02, momentum=0.9, centered=True),
    _case(stepwell.Adadelta, torch.optim.Adadelta, lr=0.5),
    _case(stepwell.Adamax, torch.optim.Adamax, lr=0.02),
    _case(stepwell.NAdam, torch.optim.NAdam, lr=0.02),
    _case(stepwell.RAdam, torch.optim.RAdam, lr=0.02, betas=(0.8, 0.95)),
    _case(stepwell.ASGD, torch.optim.ASGD, lr=0.05, t0=2),
    _case(stepwell.Rprop, torch.optim.Rprop),
    _case(stepwell.Adafactor, torch.optim.Adafactor, lr=0.02),
)

if is_interpreting():
    PLAIN = per_element(PLAIN)


def named(cases: Sequence[Any]) -> dict[str, Any]:
    """Arguments for `pytest.mark.parametrize`: the cases with readable ids."""
    return {"argvalues": cases, "ids": [getattr(case, "name", str(case)) for case in cases]}


def numbers(shape: Sequence[int], dtype: torch.dtype, seed: int, *, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same for every dtype up to its rounding."""
    draw = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return (scale * torch.randn(tuple(shape), generator=draw, dtype=wide)).to(dtype)


def parameters(shapes: Shapes, dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    """Parameters with these shapes."""
    return [torch.nn.Parameter(numbers(s, dtype, 1000 * seed + i)) for i, s in enumerate(shapes)]


def set_grads(params: Sequence[Tensor], step: int, *, seed: int = 0, scale: float = 1.0) -> None:
    """Give each parameter the gradient of this step; steps differ in size, as they do in life."""
    for i, param in enumerate(params):
        size = scale * (1.0, 0.3, 2.5)[step % 3]
        drawn = numbers(
            param.shape, param.dtype, 7 + 31 * step + 1009 * i + 100_003 * seed, scale=size
        )
        param.grad = drawn


def train(
    make: Callable[[Any], Any],
    params: Sequence[Tensor],
    steps: int,
    *,
    first: int = 0,
    scale: float = 1.0,
) -> Any:
    """An optimizer for these parameters after some steps."""
    optimizer = make(list(params))
    for step in range(first, first + steps):
        set_grads(params, step, scale=scale)
        optimizer.step()
    return optimizer
