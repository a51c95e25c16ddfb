"""Do our refusals begin with torch's very words, in every class?

Torch's error is made on the spot, by the same call to torch's class. Where torch raises it by a
`raise` of its own, ours must be of that type and begin with that text; where Python stumbled over
the value, ours must be a refusal in words. What we take and torch does not, or the other way
round, is a row of docs/differences.md.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import stepwell

from .cases import CLASSES, numbers
from .differences import row
from .torch_versions import INSTALLED

tensor = torch.tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*[Ss]parse")

TORCH = Path(torch.optim.__file__).parent

NAN, INF = math.nan, math.inf
TWO = tensor([0.9, 0.9])
MIXED = (0.9, tensor(0.9))

# Each goes to every class that has all these arguments.
OPTIONS: tuple[dict[str, Any], ...] = (
    *({"lr": v} for v in (-0.1, NAN, INF, 0.0, "x", None, tensor([0.1, 0.2]), tensor(-1.0))),
    *({"eps": v} for v in (-1.0, NAN, 0.0, "x", (-1.0, 1e-3), (None, -1e-3), (1e-30, NAN))),
    *({"weight_decay": v} for v in (-1.0, NAN, tensor(-1.0))),
    *({"betas": v} for v in ((1.0, 0.9), (-0.1, 0.9), (0.9, 1.0), (0.9, -0.1), (0.9, NAN))),
    *({"betas": v} for v in ((0, 0.9), (0.9,), 0.9, (0.9, 0.9, 0.9), MIXED)),
    *({"betas": v} for v in ((TWO, tensor(0.9)), (tensor(0.9), TWO))),
    *({"betas": (tensor(0.8), tensor(0.9)), "foreach": foreach} for foreach in (False, True)),
    *({"momentum": v} for v in (-0.1, NAN)),
    {"dampening": NAN},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    *({"rho": v} for v in (-0.1, 1.1, 1.0, NAN)),
    *({"alpha": v} for v in (-0.1, 1.0, 2.0, NAN)),
    *({"lr_decay": v} for v in (-1.0, NAN)),
    *({"initial_accumulator_value": v} for v in (-1.0, NAN)),
    *({"momentum_decay": v} for v in (-1.0, NAN)),
    *({"etas": v} for v in ((0.0, 1.2), (0.5, 1.0), (1.2, 0.5), (NAN, 1.2), (0.5,))),
    *({"lambd": v} for v in (-1.0, NAN)),
    *({"beta2_decay": v} for v in (0.1, NAN)),
    *({"d": v} for v in (0.5, NAN)),
    *({"adjust_lr_fn": v} for v in ("original", "x", 3)),
    *({"ns_steps": v} for v in (0, 100)),
    {"ns_coefficients": (1.0, 2.0)},
    *({"line_search_fn": v} for v in ("strong_wolfe", "x")),
    *({"max_iter": v} for v in (1, -1)),
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
    *({"lr": tensor(0.1), "foreach": foreach} for foreach in (False, True)),
    {"capturable": True},
    {"capturable": True, "foreach": True},
    {"differentiable": True, "foreach": True},
    {"maximize": None},
    {"nonsense": 1},
)


class Input(NamedTuple):
    """A parameter, and its gradient."""

    param: Callable[[], Tensor]
    grad: Callable[[], Tensor]


def _drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: numbers(shape, dtype, 1)


def _sparse() -> Tensor:
    return torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2), (5, 2), check_invariants=True)


INPUTS: dict[str, Input] = {
    "a matrix": Input(_drawn(5, 2), _drawn(5, 2)),
    "a sparse gradient": Input(_drawn(5, 2), _sparse),
    "a sparse parameter": Input(_sparse, _sparse),
    "complex": Input(_drawn(5, 2, dtype=torch.complex64), _drawn(5, 2, dtype=torch.complex64)),
    "one dimension": Input(_drawn(7), _drawn(7)),
    "three dimensions": Input(_drawn(2, 3, 4), _drawn(2, 3, 4)),
}
INPUT_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"foreach": True},
    {"fused": True},
    {"weight_decay": 0.1},
)

# Who may differ, and the row that says so; each is asked for the class, the options and the input.
ALLOWED: dict[str, Callable[[str, dict[str, Any], str], bool]] = {
    "NaN or infinity for a hyperparameter": lambda name, options, what: any(
        isinstance(v, float) and not math.isfinite(v) for v in options.values()
    ),
    "hyperparameters that torch takes unchecked": lambda name, options, what: (
        not options.keys().isdisjoint({"maximize", "ns_coefficients", "ns_steps", "max_iter"})
        or (name == "Muon" and "eps" in options)
        or options.get("betas") == (0.9, 0.9, 0.9)
    ),
    "betas of which only one is a Tensor": lambda name, options, what: (
        options.get("betas") == MIXED
    ),
    "`betas=(0, 0.9)`": lambda name, options, what: options.get("betas") == (0, 0.9),
    "a Tensor rate, or Tensor betas, with `foreach=True`": lambda name, options, what: (
        bool(options.get("foreach")) and not options.keys().isdisjoint({"lr", "betas"})
    ),
    "`foreach=True` with `differentiable=True`": lambda name, options, what: (
        options == {"differentiable": True, "foreach": True}
    ),
    "`capturable=True` where nothing can be captured": lambda name, options, what: (
        "capturable" in options
    ),
    "messages of `AdamW`": lambda name, options, what: name == "AdamW" and "sparse" in what,
    "`fused=True` with sparse gradients or complex parameters": lambda name, options, what: (
        "fused" in options and what in ("a sparse gradient", "complex")
    ),
    "`SGD` or `Adagrad` with weight decay and sparse gradients": lambda name, options, what: (
        name in ("SGD", "Adagrad") and what == "a sparse gradient" and "weight_decay" in options
    ),
    '`LBFGS(line_search_fn="weak_wolfe")`': lambda name, options, what: (
        options.get("line_search_fn") == "x"
    ),
    "a sparse parameter": lambda name, options, what: what == "a sparse parameter",
    "`Muon`, parameters of more than two dimensions": lambda name, options, what: (
        name == "Muon" and what == "three dimensions"
    ),
}
if INSTALLED < (2, 15):
    ALLOWED["`ASGD`: negative `lambd` or `alpha`"] = lambda name, options, what: (
        name == "ASGD" and not options.keys().isdisjoint({"lambd", "alpha"})
    )


def _try(library: Any, name: str, options: dict[str, Any], given: Input) -> Exception | None:
    """How a constructor and a first step end."""
    param = torch.nn.Parameter(given.param())
    try:
        optimizer = getattr(library, name)([param], **options)
        param.grad = given.grad()
        closure = inspect.signature(optimizer.step).parameters["closure"]
        if closure.default is inspect.Parameter.empty:
            optimizer.step(lambda: tensor(1.0))
        else:
            optimizer.step()
    except Exception as error:
        return error
    return None


def _raised_at(error: BaseException) -> tuple[str, int]:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    return trace.tb_frame.f_code.co_filename, trace.tb_lineno


def _is_torchs_own(error: BaseException) -> bool:
    """Whether it was raised in so many words, and not by Python or a kernel."""
    path, line = _raised_at(error)
    return Path(path).parent == TORCH and "raise" in linecache.getline(path, line)


def _rows(call: Call) -> list[str]:
    return [where for where, allows in ALLOWED.items() if allows(*call[:2], call.what)]


def _agree(one: Exception | None, other: Exception | None) -> bool:
    """Whether ours says what torch's says."""
    if one is None or other is None:
        return one is other
    if _is_torchs_own(one):
        return isinstance(other, type(one)) and str(other).startswith(str(one))
    return isinstance(other, (TypeError, ValueError, RuntimeError)) and len(str(other)) > 20


class Call(NamedTuple):
    """The constructor of a class, and a first step."""

    name: str
    options: dict[str, Any]
    what: str

    def __str__(self) -> str:
        return f"{self.name}, {self.options}, {self.what}"


def _calls() -> Iterator[Call]:
    for name in CLASSES:
        known = inspect.signature(getattr(torch.optim, name)).parameters.keys()
        for options in OPTIONS:
            if options.keys() <= known or "nonsense" in options:
                yield Call(name, options, "a matrix")
        for options in INPUT_OPTIONS:
            if options.keys() <= known:
                yield from (Call(name, options, what) for what in INPUTS)


CALLS = list(_calls())


@cache
def _ends(index: int) -> tuple[Exception | None, Exception | None]:
    """How a call ends with torch, and with us."""
    call = CALLS[index]
    one, other = (_try(lib, *call[:2], INPUTS[call.what]) for lib in (torch.optim, stepwell))
    return one, other


@pytest.mark.parametrize("index", range(len(CALLS)), ids=map(str, CALLS))
def test_our_words_begin_with_torchs(index: int) -> None:
    one, other = _ends(index)
    if not _agree(one, other):
        rows = _rows(CALLS[index])
        assert rows, f"torch: {one!r}\nours: {other!r}"
        assert all(map(row, rows))


def test_every_exception_is_needed() -> None:
    """A row that allows what nobody needs is a mistake in ALLOWED, or on the page."""
    used = (_rows(call) for i, call in enumerate(CALLS) if not _agree(*_ends(i)))
    assert {where for rows in used for where in rows} == ALLOWED.keys()


# torch's messages that no call of a class can lead to, or that are met in other tests
UNMET = {
    "torch.jit.script not supported": "of a script",
    "`state_steps` argument must contain": "test_functional.py",
    "API has changed": "test_functional.py",
    "doesn't support per-parameter options": "test_lbfgs.py",
    "Expected exactly one param_group": "test_lbfgs.py",
    "Foreach is not supported for Muon": "a row of the page",
    "Complex parameters are not supported": "of functions that torch keeps to itself",
    "Param gradient must be a 2D matrix": "of functions that torch keeps to itself",
    "Input tensor gradient must be": "of functions that torch keeps to itself",
    "does not support differentiable=True": "of functions that torch keeps to itself",
    "Expected lr to be a float": "of a script",
    "Expected beta": "of a script",
    "Expected offset": "of itself",
    "should be defined when grad": "of itself",
    "grad should not be None": "of itself",
    "param_groups must be a list of dicts": "of itself",
    "Expected grad_scale and found_inf": "test_differences.py",
    "Grad scaling should occur outside": "test_differences.py",
    "`requires_grad` is not supported for `step`": "no step of ours is followed",
    "must be 1-element": "after a comparison of several numbers, which Python refuses",
    "as a Tensor is not supported": "a row of the page",
}


if INSTALLED < (2, 13):
    UNMET["dtype is needed to compute eps1"] = "of itself"


def _raised_by_torch() -> dict[tuple[str, int], str]:
    """The `raise` statements of the classes' modules, by file and line."""
    found = {}
    for name in CLASSES:
        path = inspect.getfile(inspect.unwrap(getattr(torch.optim, name).__init__))
        for node in ast.walk(ast.parse(Path(path).read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                found[path, node.lineno] = ast.unparse(node)
    return found


def test_every_message_of_torch_is_met() -> None:
    errors = [_ends(i)[0] for i in range(len(CALLS))]
    met = {_raised_at(error) for error in errors if error is not None}
    raised = _raised_by_torch()
    rest = [text for place, text in raised.items() if place not in met]
    assert [t for t in rest if not any(words in t for words in UNMET)] == []
    assert all(
        any(words in text for text in rest) for words in UNMET if "lbfgs" not in UNMET[words]
    )
