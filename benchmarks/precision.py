"""`python -m benchmarks.precision`: how far each implementation is from the exact formula.

The truth is the rule's own traced formula in numpy's long double (64 bits of mantissa on x86),
given the very numbers that the implementations are given: parameters, a fixed sequence of
gradients that the dtype can hold, and hyperparameters in float64.

- "step": the truth starts each step from the parameter and state as the implementation has stored
  them, so that this is the error that one step adds. 0.5 is the least that rounding allows.
- "path": the truth goes its own way for all steps. In half precision the stored state is too
  coarse for this to tell good arithmetic from bad, so only float32 and float64 have it.

Errors are in ULP of the dtype, of the parameters and their state alike; a number smaller than the
mean one of its tensor is judged as if it were of that size, since a sum that cancels carries the
rounding of its terms.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stepwell
from stepwell.language import Program, program_for
from stepwell.race.machine import describe

__all__ = ["DTYPES", "FUSED", "OURS", "RULES", "Row", "measure"]

STEPS = 100
SIZE = 4096

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WITH_PATH = (torch.float32, torch.float64)

RULES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3},
    # a rate so large that what is wrong with an update shows in the parameter
    "Adam": {"lr": 0.1},
    "AdamW": {"lr": 0.1, "amsgrad": True},
}

FUSED = "cpu"
OURS = (FUSED, "foreach", "eager")
RIVALS = ("torch fused", "torch for-loop")
CONTENDERS: dict[str, tuple[Any, dict[str, bool]]] = {
    "cpu": (stepwell, {"fused": True}),
    "foreach": (stepwell, {"foreach": True}),
    "eager": (stepwell, {"foreach": False}),
    "torch fused": (torch.optim, {"fused": True}),
    "torch for-loop": (torch.optim, {"foreach": False}),
}

Exact = npt.NDArray[np.longdouble]

EXACT: dict[str, Callable[..., Exact]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "pow": np.power,
    "sqrt": np.sqrt,
    "maximum": np.maximum,
    "lerp": lambda start, end, weight: start + weight * (end - start),
}


# Where both round equally often, which one is ahead differs from seed to seed, by less than this;
# the largest error is that of one number among many, so that chance has a larger part in it.
CHANCE = {"mean": 1.02, "largest": 1.2}


@dataclass(frozen=True)
class Error:
    """The mean and the largest error of all numbers, in ULP; infinite where they are not finite."""

    mean: float
    largest: float

    def __str__(self) -> str:
        # torch 2.13's fused SGD in half precision, and its Adam whose eps float16 cannot hold
        return "wrong" if self.mean > 100 else f"{self.mean:.3f} / {self.largest:.2f}"


@dataclass(frozen=True)
class Errors:
    """Of single steps, and of the way of all of them where that is measured."""

    step: Error
    path: Error | None


@dataclass(frozen=True)
class Row:
    """One rule in one dtype: the errors of all contenders."""

    rule: str
    dtype: torch.dtype
    errors: Mapping[str, Errors]

    def worse(self, ours: str) -> list[str]:
        """In what one of our back-ends is worse than the better one of torch's."""
        found = []
        for kind in ("step", "path"):
            for what in ("mean", "largest"):
                value = self._value(ours, kind, what)
                best = min(self._value(rival, kind, what) for rival in RIVALS)
                if value > CHANCE[what] * best:
                    found.append(f"{kind}, {what}: {value:.4g} ULP, torch's {best:.4g}")
        return found

    def _value(self, contender: str, kind: str, what: str) -> float:
        error = getattr(self.errors[contender], kind)
        return 0.0 if error is None else float(getattr(error, what))


def measure(rule: str, dtype: torch.dtype, *, size: int = SIZE) -> Row:
    """The errors of all implementations of a rule."""
    return Row(rule, dtype, {name: _errors(rule, name, dtype, size) for name in CONTENDERS})


def _errors(rule: str, contender: str, dtype: torch.dtype, size: int) -> Errors:
    param = torch.nn.Parameter(_drawn(dtype, 0, size))
    package, request = CONTENDERS[contender]
    optimizer = getattr(package, rule)([param], **RULES[rule], **request)
    stored = truth = _stored(optimizer, param)
    steps = []
    for step in range(STEPS):
        param.grad = _drawn(dtype, 1 + step, size)
        optimizer.step()
        expected = _exact_step(rule, stored, param.grad)
        stored = _stored(optimizer, param)
        steps.append(_difference(stored, expected, dtype))
        if dtype in WITH_PATH:
            truth = _exact_step(rule, truth, param.grad)
    path = _summary(_difference(stored, truth, dtype)) if dtype in WITH_PATH else None
    return Errors(_summary(np.concatenate(steps)), path)


def _summary(differences: npt.NDArray[np.float64]) -> Error:
    if not np.isfinite(differences).all():
        return Error(np.inf, np.inf)
    return Error(float(differences.mean()), float(differences.max()))


def _drawn(dtype: torch.dtype, seed: int, size: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=draw, dtype=torch.float64).to(dtype)


def _exactly(tensor: Tensor) -> Exact:
    return tensor.detach().double().numpy().astype(np.longdouble)


def _stored(optimizer: Any, param: Tensor) -> dict[str, Exact]:
    state = optimizer.state.get(param, {})
    return {"param": _exactly(param), **{n: _exactly(v) for n, v in state.items() if v is not None}}


def _exact_step(rule: str, before: Mapping[str, Exact], grad: Tensor) -> dict[str, Exact]:
    """Parameter and state after a step from `before`."""
    formula = getattr(stepwell, rule).formula
    group = {name: field.default for name, field in formula.fields.items()} | RULES[rule]
    slots = formula.slots_in(group)
    absent = frozenset(n for n, s in slots.items() if s.initial is None and n not in before)
    program = program_for(formula, group, absent)
    start = {name: np.zeros_like(before["param"]) for name in slots} | {"step": np.longdouble(0)}
    return {**before, **_evaluate(program, {**start, **before, "grad": _exactly(grad)}, group)}


def _evaluate(
    program: Program, inputs: Mapping[str, Exact], group: Mapping[str, Any]
) -> dict[str, Exact]:
    values: dict[int, Exact] = {}
    for node in program.nodes:
        if node.op == "const":
            values[node.index] = np.longdouble(node.value)
        elif node.op == "group":
            name, _, item = str(node.value).partition(".")
            number = group[name][int(item)] if item else group[name]
            values[node.index] = np.longdouble(number)
        elif not node.args:
            values[node.index] = inputs[str(node.value)]
        else:
            values[node.index] = EXACT[node.op](*(values[arg.index] for arg in node.args))
    return {name: values[node.index] for name, node in program.outputs.items()}


def _difference(
    found: Mapping[str, Exact], truth: Mapping[str, Exact], dtype: torch.dtype
) -> npt.NDArray[np.float64]:
    """In ULP, of everything but the step count."""
    info = torch.finfo(dtype)
    parts = []
    for name in found.keys() - {"step"}:
        size = np.abs(truth[name]).astype(np.float64)
        size = np.maximum(size, size.mean())
        ulp = info.eps * np.exp2(np.floor(np.log2(np.maximum(size, info.smallest_normal))))
        with np.errstate(invalid="ignore"):
            parts.append(np.abs(found[name] - truth[name]) / ulp)
    return np.concatenate(parts).astype(np.float64)


def main() -> int:
    """Print the table; the exit status is 1 if the fused step is worse than torch's better one."""
    console = Console(width=None if sys.stdout.isatty() else 132)
    console.print(describe())
    table = Table(title=f"mean / largest error in ULP, {STEPS} steps of {SIZE:,} numbers")
    for name in ("rule", "of a", *CONTENDERS):
        table.add_column(name, justify="left" if name in ("rule", "of a") else "right")
    rows = []
    for rule in RULES:
        table.add_section()
        for dtype in DTYPES:
            with console.status(f"{rule} {dtype}"):
                rows.append(measure(rule, dtype))
            for cells in _cells(rows[-1]):
                table.add_row(*cells)
    console.print(table)
    worse = [f"{r.rule} {r.dtype} {problem}" for r in rows for problem in r.worse(FUSED)]
    console.print(*worse or ["The fused step is nowhere worse than the better one of torch's."])
    return int(bool(worse))


def _cells(row: Row) -> list[list[str]]:
    dtype = str(row.dtype).removeprefix("torch.")
    lines = [[f"{row.rule}, {dtype}", "step", *(str(e.step) for e in row.errors.values())]]
    if row.dtype in WITH_PATH:
        lines.append(["", "path", *(str(e.path) for e in row.errors.values())])
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
