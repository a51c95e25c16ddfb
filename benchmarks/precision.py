"""`python -m benchmarks.precision`: how far each implementation is from the exact formula.

The truth is the rule's own traced formula in numpy's long double (64 bits of mantissa on x86),
given the very numbers that the implementations are given: parameters, a fixed sequence of
gradients that the dtype can hold, and hyperparameters in float64.

- "step": the truth starts each step from the parameter and state as the implementation has stored
  them, so that this is the error that one step adds. 0.5 is the least that rounding allows.
- "path": the truth goes its own way for all steps. In half precision the stored state is too
  coarse for this to tell good arithmetic from bad, so only float32 and float64 have it; nor can it
  in float64 where a rule keeps numbers in float32, as NAdam and ASGD do.

Errors are in ULP of the dtype, of the parameters and their state alike; a number smaller than the
mean one of its tensor is judged as if it were of that size, since a sum that cancels carries the
rounding of its terms.
"""

from __future__ import annotations

import inspect
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
from stepwell.language.fields import Slot
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
    "Adagrad": {"lr": 0.1, "lr_decay": 0.01},
    "RMSprop": {"lr": 0.1, "momentum": 0.9, "centered": True},
    "Adadelta": {"lr": 1.0},
    "Adamax": {"lr": 0.1},
    "NAdam": {"lr": 0.1},
    "RAdam": {"lr": 0.1},
    # averaging begins on the way
    "ASGD": {"lr": 0.1, "lambd": 0.01, "t0": 20.0},
    "Rprop": {"lr": 0.1},
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
    "minimum": np.minimum,
    "abs": np.abs,
    "sign": np.sign,
    "gt": np.greater,
    "lt": np.less,
    "eq": np.equal,
    "where": np.where,
    "lerp": lambda start, end, weight: start + weight * (end - start),
}


# Where both round equally often, which one is ahead differs from seed to seed, by less than this;
# the largest error is that of one number among many, so that chance has a larger part in it, and
# more so at the end of a way, of which there is one per element and not one per element and step.
CHANCE = {
    ("step", "mean"): 1.02,
    ("step", "largest"): 1.2,
    ("path", "mean"): 1.05,
    ("path", "largest"): 1.5,
}


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
    """One rule in one dtype: the errors of all contenders that there are."""

    rule: str
    dtype: torch.dtype
    errors: Mapping[str, Errors]

    def worse(self, ours: str) -> list[str]:
        """In what one of our back-ends is worse than the better one of torch's."""
        found = []
        rivals = self.errors.keys() & set(RIVALS)
        for (kind, what), chance in CHANCE.items():
            value = self._value(ours, kind, what)
            best = min(self._value(rival, kind, what) for rival in rivals)
            if value > chance * best:
                found.append(f"{kind}, {what}: {value:.4g} ULP, torch's {best:.4g}")
        return found

    def _value(self, contender: str, kind: str, what: str) -> float:
        error = getattr(self.errors[contender], kind)
        return 0.0 if error is None else float(getattr(error, what))


def measure(rule: str, dtype: torch.dtype, *, size: int = SIZE, steps: int = STEPS) -> Row:
    """The errors of all implementations of a rule."""
    takes = inspect.signature(getattr(torch.optim, rule)).parameters
    names = [name for name in CONTENDERS if name != "torch fused" or "fused" in takes]
    return Row(rule, dtype, {name: _errors(rule, name, dtype, size, steps) for name in names})


def _errors(rule: str, contender: str, dtype: torch.dtype, size: int, steps: int) -> Errors:
    param = torch.nn.Parameter(_drawn(dtype, 0, size))
    package, request = CONTENDERS[contender]
    optimizer = getattr(package, rule)([param], **RULES[rule], **request)
    stored = truth = _stored(optimizer, param)
    found = []
    for step in range(steps):
        param.grad = _drawn(dtype, 1 + step, size)
        optimizer.step()
        expected = _exact_step(rule, stored, param.grad)
        stored = _stored(optimizer, param)
        found.append(_difference(stored, expected, dtype))
        if dtype in WITH_PATH:
            truth = _exact_step(rule, truth, param.grad)
    # what there is one of per parameter is kept in float32, and no float64 that uses it is exact
    coarse = dtype is torch.float64 and any(not v.ndim for n, v in stored.items() if n != "step")
    has_path = dtype in WITH_PATH and not coarse
    path = _summary(_difference(stored, truth, dtype)) if has_path else None
    return Errors(_summary(np.concatenate(found)), path)


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
    start = {name: _initial(slot, group, before["param"]) for name, slot in slots.items()}
    start["step"] = np.zeros((), np.longdouble)
    # of both sides of a where(), the one that does not count may be a root of something below zero
    with np.errstate(divide="ignore", invalid="ignore"):
        after = _evaluate(program, {**start, **before, "grad": _exactly(grad)}, group)
    return {**before, **after}


def _initial(slot: Slot, group: Mapping[str, Any], like: Exact) -> Exact:
    number = group[slot.initial] if isinstance(slot.initial, str) else slot.initial or 0.0
    return np.full(() if slot.scalar else like.shape, number, np.longdouble)


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
    """In ULP, of everything but the numbers of which there is one per parameter."""
    info = torch.finfo(dtype)
    parts = []
    for name in found:
        if not found[name].ndim:
            continue
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
    found = [row.errors.get(name) for name in CONTENDERS]
    lines = [[f"{row.rule}, {dtype}", "step", *(str(e.step) if e else "-" for e in found)]]
    if any(e and e.path for e in found):
        lines.append(["", "path", *(str(e.path) if e else "-" for e in found)])
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
