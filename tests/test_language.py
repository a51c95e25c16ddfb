"""Does the language say what a rule means, refuse what has no meaning, and compose?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import nn

import stepwell
from stepwell import language
from stepwell.language import (
    Average,
    ClipNorm,
    ClipValue,
    Decay,
    DecoupledDecay,
    Formula,
    Message,
    NonNegative,
    Positive,
    Program,
    Range,
    Real,
    Scale,
    Share,
    Switch,
    Transform,
    amax,
    atan2,
    clamp,
    compose,
    exp,
    floor,
    full,
    isfinite,
    lerp,
    log,
    maximum,
    mean,
    minimum,
    norm,
    rsqrt,
    sign,
    sqrt,
    square,
    trace,
    unset,
    where,
    zeros,
)
from stepwell.language import sum as total
from stepwell.language.fields import Field, fields_of, near_miss, slots_of

from .cases import NATIVE, REQUESTS, named, numbers, parameters, set_grads, train
from .compare import assert_same_bits, assert_training_within, backends

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

ULPS = 8
"""Composed by hand, a gradient is rounded between the parts: see test_backends.py for the rest."""

Update = Callable[[Any, Any, Any, Any], Any]


class Plain:
    """Hyperparameters and state of every kind, for formulas of this page."""

    lr: NonNegative = 0.1
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    momentum: Switch = 0
    shift: Real | None = None
    power: Literal["one", "two"] = "one"
    count: int = 3
    amsgrad: bool = False

    exp_avg = zeros()
    buffer = unset(when="momentum")
    largest = zeros(when="amsgrad")
    rate = full("lr", scalar=True)


def _formula(update: Update) -> Formula:
    return Formula("Mine", fields_of(Plain), slots_of(Plain), update)


def _traced(update: Update, absent: frozenset[str] = frozenset(), **group: Any) -> Program:
    formula = _formula(update)
    defaults = {name: field.default for name, field in formula.fields.items()}
    return trace(formula, {**defaults, **group}, absent)


def _ops(program: Program) -> list[str]:
    return [node.op for node in program.nodes if node.args]


# Tracing


@pytest.mark.tiny
@pytest.mark.parametrize(
    "update",
    [
        lambda p, g, s, h: p if g > 0 else -p,
        lambda p, g, s, h: p - (h.lr if h.lr > 0.5 else 1),
        lambda p, g, s, h: p if s.step == 1 else -p,
        lambda p, g, s, h: where((g > 0) and (p > 0), p, -p),
        lambda p, g, s, h: where((g > 0) or (p > 0), p, -p),
        lambda p, g, s, h: where(not g > 0, p, -p),
        lambda p, g, s, h: p - float(h.lr),
        lambda p, g, s, h: p - int(h.lr),
        lambda p, g, s, h: p - math.sqrt(h.lr),
        lambda p, g, s, h: max(p, g),
        lambda p, g, s, h: p if norm(g) > 1 else -p,
    ],
)
def test_branching_on_a_traced_value_is_refused_with_the_remedy(update: Update) -> None:
    with pytest.raises(
        TypeError, match=r"Mine\.update: .* use where\(condition, a, b\), & instead"
    ):
        _traced(update)


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("update", "said"),
    [
        (lambda p, g, s, h: p - s.exp_av, "state.exp_av, .* did you mean state.exp_avg?"),
        (lambda p, g, s, h: p - s.expavg, "did you mean state.exp_avg?"),
        (lambda p, g, s, h: p - s.nothing_like_it, "declared are: step, exp_avg, rate"),
        (lambda p, g, s, h: p - h.momentun, "group.momentun, .* did you mean group.momentum?"),
        (lambda p, g, s, h: p - h.Lr, "did you mean group.lr?"),
        (lambda p, g, s, h: p - h.x, "declared are: lr, betas, momentum"),
        # what exists only with a flag that is off
        (lambda p, g, s, h: p - s.largest, "state.largest, which is not declared here"),
        (lambda p, g, s, h: p - s.buffer, "state.buffer, which is not declared here"),
    ],
)
def test_what_is_not_declared_is_refused_with_the_near_miss(update: Update, said: str) -> None:
    with pytest.raises(AttributeError, match=said):
        _traced(update)


def _sets(name: str, value: Any) -> Update:
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        setattr(state, name, value(grad) if callable(value) else value)
        return param

    return update


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("update", "error", "said"),
    [
        (_sets("exp_avgs", 0.0), AttributeError, "did you mean state.exp_avg"),
        (_sets("exp_avg", None), TypeError, "must return the new parameter, got None"),
        (_sets("exp_avg", lambda g: g > 0), TypeError, "got %"),
        (lambda p, g, s, h: None, TypeError, "must return the new parameter, got None"),
        (lambda p, g, s, h: g > 0, TypeError, "must return the new parameter"),
        (lambda p, g, s, h: "x", TypeError, "must return the new parameter, got 'x'"),
        (lambda p, g, s, h: (p, g), TypeError, "must return the new parameter"),
        (lambda p, g, s, h: p + (g > 0), TypeError, r"use where\(condition, 1.0, 0.0\)"),
        (lambda p, g, s, h: where(g, p, 0.0), TypeError, "needs a comparison here"),
        (lambda p, g, s, h: where((g > 0) & p, p, 0.0), TypeError, "needs a comparison here"),
        (lambda p, g, s, h: p + torch.ones(3), TypeError, "got Tensor"),
        (lambda p, g, s, h: p + "1", TypeError, "got str"),
        (lambda p, g, s, h: p + h.power, TypeError, "got str"),
        (lambda p, g, s, h: p + h.betas, TypeError, "got tuple"),
        (lambda p, g, s, h: p + h.shift, TypeError, "got NoneType"),
        (lambda p, g, s, h: p[0], TypeError, "subscriptable"),
        (lambda p, g, s, h: sum(p), TypeError, "cannot be iterated over"),
        (lambda p, g, s, h: total(h.lr * 2), TypeError, "this is one number"),
        (lambda p, g, s, h: total(g, across="world"), ValueError, "across must be one of"),
    ],
)
def test_what_has_no_meaning_is_refused(update: Update, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        _traced(update)


def test_a_value_of_another_formula_is_refused() -> None:
    kept: list[Any] = []
    _traced(lambda p, g, s, h: kept.append(p) or p)
    with pytest.raises(TypeError, match="a value of another formula was used"):
        _traced(lambda p, g, s, h: p + kept[0])


@pytest.mark.tiny
def test_what_leads_to_nothing_is_dropped() -> None:
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        sqrt(grad * 3 + group.betas[0])
        state.exp_avg = exp(param)
        state.exp_avg = grad
        return param - group.lr * grad

    program = _traced(update)
    assert _ops(program) == ["mul", "sub"]
    assert program.numbers == ("lr",)
    # `step` is counted only by a rule that looks at it
    assert "step" not in program.slots


@pytest.mark.tiny
def test_constants_are_folded_and_equal_values_are_one() -> None:
    program = _traced(lambda p, g, s, h: p * (2 * 3 - 2.0**2) + g * 2 + g * 2)
    # Python has done that: 2.0; g * 2 is one node, added twice
    assert _ops(program) == ["mul", "mul", "add", "add"]
    assert sorted(n.value for n in program.nodes if n.op == "const") == [2.0]

    def symbols(param: Any, grad: Any, state: Any, group: Any) -> Any:
        two = 0 * param + 2  # an Expr, and no constant
        one = sqrt(grad) * 0 + 1
        return param + two / one

    assert "div" in _ops(_traced(symbols))


@pytest.mark.parametrize(
    ("fold", "value"),
    [
        (lambda one: one / 0, math.inf),
        (lambda one: -one / 0, -math.inf),
        (lambda one: one / -0.0, -math.inf),
        (lambda one: (one - 1) / 0, math.nan),
        (lambda one: (one - 1) ** -1, math.inf),
        (lambda one: (one * 10) ** 400, math.inf),
        (lambda one: -(one - 3), 2.0),
    ],
)
def test_constants_fold_as_floating_point_does(fold: Any, value: float) -> None:
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        return param * fold(param.graph.constant(1.0))

    [found] = [n.value for n in _traced(update).nodes if n.op == "const"]
    assert found == value or (math.isnan(found) and math.isnan(value))


def test_zero_and_minus_zero_are_two_constants() -> None:
    program = _traced(lambda p, g, s, h: where(g > 0.0, p * -0.0, p))
    assert [str(n.value) for n in program.nodes if n.op == "const"] == ["0.0", "-0.0"]


@pytest.mark.tiny
def test_a_square_is_a_product() -> None:
    assert _ops(_traced(lambda p, g, s, h: p - g**2)) == ["mul", "sub"]
    assert _ops(_traced(lambda p, g, s, h: p - square(g))) == ["mul", "sub"]
    assert _ops(_traced(lambda p, g, s, h: p - g**3)) == ["pow", "sub"]


@pytest.mark.tiny
def test_static_facts_choose_the_branch() -> None:
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        if group.amsgrad:
            grad = maximum(state.largest, grad)
        if group.momentum:
            grad = group.momentum * grad
        if group.power == "two":
            grad = grad * grad
        for _ in range(group.count):
            grad = -grad
        if group.shift is not None:
            grad = grad + group.shift
        return param - grad

    assert _ops(_traced(update, count=0)) == ["sub"]
    assert _ops(_traced(update, count=2)) == ["neg", "neg", "sub"]
    assert _ops(_traced(update, count=0, amsgrad=True)) == ["maximum", "sub"]
    assert _ops(_traced(update, count=0, momentum=0.5)) == ["mul", "sub"]
    assert _ops(_traced(update, count=0, power="two")) == ["mul", "sub"]
    assert _ops(_traced(update, count=0, shift=0.0)) == ["add", "sub"]


def test_equal_static_facts_share_a_program() -> None:
    formula = _formula(lambda p, g, s, h: p - (h.momentum if h.momentum else h.lr) * g)
    group = {name: field.default for name, field in formula.fields.items()}
    first = language.program_for(formula, group)
    assert language.program_for(formula, {**group, "lr": 7.0, "betas": (0.1, 0.2)}) is first
    with_momentum = language.program_for(formula, {**group, "momentum": 0.5})
    assert with_momentum is not first
    assert language.program_for(formula, {**group, "momentum": 0.7}) is with_momentum
    assert language.program_for(formula, {**group, "shift": 1.0}) is not first


def test_kinds_and_passes() -> None:
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        scale = norm(grad)
        return param - group.lr * grad / scale * mean(param * scale)

    program = _traced(update)
    kinds = {node.op: node.kind.name for node in program.nodes}
    assert (kinds["group"], kinds["param"], kinds["sum"]) == ("SCALAR", "ELEMENT", "REDUCED")
    passes = dict(zip(program.nodes, program.passes, strict=True))
    sums = [passes[node] for node in program.nodes if node.op == "sum"]
    assert (sums, passes[program.outputs["param"]]) == ([1, 2], 2)


def test_the_state_of_unset_slots() -> None:
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        state.buffer = grad if state.buffer is None else group.momentum * state.buffer + grad
        return param - state.buffer

    first = _traced(update, frozenset({"buffer"}), momentum=0.9)
    later = _traced(update, momentum=0.9)
    assert (_ops(first), _ops(later)) == (["sub"], ["mul", "add", "sub"])
    assert first.outputs["buffer"].op == "grad"


# What the functions do, on numbers, tensors and symbols alike


UNARY: dict[str, tuple[Any, Any]] = {
    "sqrt": (sqrt, torch.sqrt),
    "rsqrt": (rsqrt, torch.rsqrt),
    "square": (square, torch.square),
    "exp": (exp, torch.exp),
    "log": (log, torch.log),
    "floor": (floor, torch.floor),
    "sign": (sign, torch.sign),
    "abs": (abs, torch.abs),
    "neg": (lambda x: -x, torch.neg),
    "clamp": (lambda x: clamp(x, -1.0, 2.0), lambda x: torch.clamp(x, -1.0, 2.0)),
    "isfinite": (
        lambda x: where(isfinite(x), 1.0, 0.0),
        lambda x: torch.isfinite(x).to(x.dtype),
    ),
    "not": (lambda x: where(~(x > 1), 1.0, 0.0), lambda x: (~(x > 1)).to(x.dtype)),
    "cube": (lambda x: x**3, lambda x: x**3),
    "to the x": (lambda x: 2**x, lambda x: 2**x),
    "reversed": (lambda x: 1 - (2 / (3 + x)), lambda x: 1 - (2 / (3 + x))),
}
BINARY: dict[str, tuple[Any, Any]] = {
    "maximum": (maximum, torch.maximum),
    "minimum": (minimum, torch.minimum),
    "atan2": (atan2, torch.atan2),
    "pow": (lambda x, y: abs(x) ** y, lambda x, y: x.abs() ** y),
    "lerp": (lambda x, y: lerp(x, y, 0.25), lambda x, y: torch.lerp(x, y, 0.25)),
    "lt": (lambda x, y: where(x < y, x, 0.0), lambda x, y: torch.where(x < y, x, 0.0)),
    "le": (lambda x, y: where(x <= y, x, 0.0), lambda x, y: torch.where(x <= y, x, 0.0)),
    "gt": (lambda x, y: where(x > y, x, 0.0), lambda x, y: torch.where(x > y, x, 0.0)),
    "ge": (lambda x, y: where(x >= y, x, 0.0), lambda x, y: torch.where(x >= y, x, 0.0)),
    "eq": (lambda x, y: where(x == y, 1.0, 2.0), lambda x, y: (x != y).to(x.dtype) + 1),
    "ne": (lambda x, y: where(x != y, 1.0, 2.0), lambda x, y: (x == y).to(x.dtype) + 1),
    "and": (
        lambda x, y: where((x > 0) & (y > 0), 1.0, 0.0),
        lambda x, y: ((x > 0) & (y > 0)).to(x.dtype),
    ),
    "or": (
        lambda x, y: where((x > 0) | (y > 0), 1.0, 0.0),
        lambda x, y: ((x > 0) | (y > 0)).to(x.dtype),
    ),
}
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 30.0, 1e-30, torch.inf, -torch.inf, torch.nan]


def _applied(function: Any, first: torch.Tensor, second: torch.Tensor, **request: Any) -> Any:
    """The function on two tensors, through a rule's step: they are parameter and gradient."""

    class Applied(stepwell.Optimizer):
        @staticmethod
        def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
            return function(param, grad)

    param = nn.Parameter(first.clone())
    optimizer = Applied([param], **request)
    param.grad = second.clone()
    optimizer.step()
    assert backends(optimizer) == {
        NATIVE if request.get("fused") else "foreach" if request.get("foreach") else "eager"
    }
    return param.detach()


@pytest.mark.filterwarnings("ignore:Bitwise inversion '~' on bool:DeprecationWarning")
@pytest.mark.parametrize("dtype", **named((torch.float32, torch.float64)))
@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_functions(name: str, dtype: torch.dtype) -> None:
    """Each function is torch's, special values included, on every back-end and on floats."""
    if name in UNARY:
        ours, truth = UNARY[name]
        first = torch.tensor(SPECIAL, dtype=dtype)
        expected, second = truth(first), first
        on_floats = [ours(x) for x in SPECIAL] if name not in ("exp", "to the x", "rsqrt") else None

        def function(param: Any, grad: Any) -> Any:
            return ours(param)

    else:
        function, truth = BINARY[name]
        pairs = [(a, b) for a in SPECIAL for b in SPECIAL]
        first, second = (torch.tensor(column, dtype=dtype) for column in zip(*pairs, strict=True))
        expected = truth(first, second)
        on_floats = [function(x, y) for x, y in pairs] if name != "pow" else None
    for request in REQUESTS.values():
        found = _applied(function, first, second, **request)
        # exp, log, pow and atan2 are library functions, of a ULP or two
        torch.testing.assert_close(
            found, expected, equal_nan=True, rtol=4 * torch.finfo(dtype).eps, atol=0
        )
        same_sign = torch.signbit(found) == torch.signbit(expected)
        if name not in ("maximum", "minimum"):
            # which of 0 and -0 is the larger is left open
            assert bool((same_sign | expected.isnan()).all())
    if on_floats is not None and dtype is torch.float64:
        on_floats = torch.tensor([float(x) for x in on_floats], dtype=dtype)
        torch.testing.assert_close(on_floats, expected, equal_nan=True)


@pytest.mark.parametrize("request_", REQUESTS)
def test_what_a_number_has_chosen_is_no_memory_to_work_in(request_: str) -> None:
    class Chosen(stepwell.Optimizer):
        lr: NonNegative = 1.0

        @staticmethod
        def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
            return (where(group.lr > 0, grad, param) + 1) * 2 + grad

    [param] = parameters(((5,),), torch.float32)
    grad = numbers((5,), torch.float32, 1)
    param.grad = grad.clone()
    Chosen([param], **REQUESTS[request_]).step()
    torch.testing.assert_close(param.grad, grad, rtol=0, atol=0)
    torch.testing.assert_close(param.detach(), (grad + 1) * 2 + grad)


# Fields and ranges


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("range_", "inside", "outside", "said"),
    [
        (Range(0), [0, 0.0, -0.0, 1e300], [-1e-300, math.inf, math.nan, -math.inf], "[0, inf)"),
        (Range(0, open="("), [1e-300], [0, -0.0, math.nan], "(0, inf)"),
        (Range(0, 1, open=")"), [0, 0.999], [1, 1.0, math.nan], "[0, 1)"),
        (Range(0, 1), [0, 1], [-1, 1.001], "[0, 1]"),
        (Range(-1, 1, open="()"), [0], [-1, 1], "(-1, 1)"),
        (Range(), [-1e308, 1e308], [math.inf, -math.inf, math.nan], "(-inf, inf)"),
    ],
)
def test_ranges(range_: Range, inside: list[Any], outside: list[Any], said: str) -> None:
    assert all(value in range_ for value in inside)
    assert not any(value in range_ for value in outside)
    assert str(range_) == said


class Everything:
    """A field of every kind."""

    lr: NonNegative = 0.1
    rate: Positive = 0.1
    share: Share = 0.5
    offset: Real | None = None
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    momentum: Switch = 0.0
    flag: bool = False
    maybe: bool | None = None
    kind: Literal["a", "b"] = "a"
    count: int = 5
    spoken: language.NonNegative = 0.0
    plain: float = 1.0


def _field(name: str) -> Field:
    return fields_of(Everything)[name]


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("name", "good", "bad", "allowed"),
    [
        (
            "lr",
            [0, 1.5, torch.tensor(0.5), torch.tensor([2.0])],
            [-1, math.nan, math.inf],
            "in [0, inf)",
        ),
        ("rate", [1e-9], [0, -1], "in (0, inf)"),
        ("share", [0, 1], [1.01], "in [0, 1]"),
        ("offset", [None, -3.0], [math.nan, math.inf], "in (-inf, inf) or None"),
        ("flag", [True, False], [], "True or False"),
        ("maybe", [True, False, None], [], "True, False or None"),
        ("kind", ["a", "b"], ["c", None], "one of 'a', 'b'"),
        ("momentum", [0, 0.9, 2], [-0.1], "in [0, inf)"),
        ("plain", [-5.0, 3], [math.inf], "in (-inf, inf)"),
        (
            "betas",
            [(0, 0.9), [0.5, 0.5], (torch.tensor(0.9),) * 2],
            [(0.9,), (0.9, 1.0), (0.1, 0.2, 0.3)],
            "(in [0, 1), in [0, 1))",
        ),
    ],
)
def test_fields(name: str, good: list[Any], bad: list[Any], allowed: str) -> None:
    field = _field(name)
    for value in good:
        field.check(value, "Mine")
    for value in bad:
        with pytest.raises(ValueError, match=r"\(Mine, group 3: "):
            field.check(value, "Mine", "group 3")
    assert field.allowed == allowed


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "1"),
        ("lr", None),
        ("lr", True),
        ("lr", 1j),
        ("lr", [0.1]),
        ("flag", 2),
        ("flag", None),
        ("flag", "yes"),
        ("maybe", 0.0),
        ("count", 1.0),
        ("count", True),
        ("betas", 0.9),
        ("betas", "ab"),
        ("betas", ("a", "b")),
        ("betas", None),
        ("betas", torch.tensor([0.9, 0.99])),
        ("betas", {0.9: 1, 0.99: 2}),
    ],
)
def test_what_is_no_number_at_all(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=r"^Invalid .*\(Mine: "):
        _field(name).check(value, "Mine")


@pytest.mark.tiny
def test_the_static_part_of_a_value() -> None:
    assert _field("lr").static(0.5) is ...
    assert (_field("momentum").static(0.0), _field("momentum").static(0.9)) == (0, ...)
    assert _field("momentum").static(torch.tensor(0.0)) == 0
    assert (_field("offset").static(None), _field("offset").static(1.0)) == (None, ...)
    assert (_field("flag").static(True), _field("kind").static("b")) == (True, "b")
    assert (_field("count").static(7), _field("betas").static((0.1, 0.2))) == (7, (..., ...))


class NoDefault:
    lr: NonNegative


class BadHint:
    lr: dict[str, float] = {}  # noqa: RUF012


class BadDefault:
    lr: NonNegative = -1.0


class Unreadable:
    lr: NotImported = 1.0  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("cls", "error", "said"),
    [
        (NoDefault, TypeError, "NoDefault.lr: a hyperparameter needs a default"),
        (BadHint, TypeError, "BadHint.lr: a hyperparameter is a float"),
        (BadDefault, ValueError, r"Invalid learning rate: -1.0 \(BadDefault, default: lr must be"),
        (Unreadable, TypeError, "Unreadable: an annotation cannot be read.*NotImported"),
    ],
)
def test_bad_declarations(cls: type, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        fields_of(cls)


@pytest.mark.tiny
def test_a_message_of_ones_own() -> None:
    class Spoken:
        etas: language.fields.Annotated[float, Range(0), Message("Etas: {value}!")] = 1.0  # type: ignore[name-defined]

    with pytest.raises(
        ValueError, match=r"^Etas: -1! \(Mine: etas must be a number in \[0, inf\)\)"
    ):
        fields_of(Spoken)["etas"].check(-1, "Mine")


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("weightdecay", "weight_decay"),
        ("weight_deacy", "weight_decay"),
        ("Weight-Decay", "weight_decay"),
        ("beta", "betas"),
        ("lrr", "lr"),
        ("learning_rate", "lr"),
        ("epsilon", "eps"),
        ("epochs", None),
        ("rl", None),
        ("weight_decay", None),
        ("name", None),
        ("lr_scale", None),
        ("initial_lr", None),
        ("max_lr", None),
    ],
)
def test_near_misses(key: str, meant: str | None) -> None:
    assert near_miss(key, ["lr", "betas", "eps", "weight_decay", "amsgrad"]) == meant


# State


class Stateful(stepwell.Optimizer):
    """A slot of every kind."""

    lr: NonNegative = 0.25
    flag: bool = False

    zero = zeros()
    ones = full(1.0)
    rates = full("lr")
    start = full("param")
    number = full("lr", scalar=True)
    narrow = zeros(over=-1)
    flagged = zeros(when="flag")
    late = unset()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        state.late = grad if state.late is None else state.late + grad
        state.number = state.number * 2
        state.narrow = state.narrow + mean(grad, dim=-1)
        if group.flag:
            state.flagged = state.flagged + 1
        return param - state.zero - state.ones - state.rates - 0 * state.start


def test_slots_start_as_they_say() -> None:
    [param] = parameters(((2, 3),), torch.float32)
    start = param.detach().clone()
    optimizer = train(lambda p: Stateful(p, flag=True), [param], 2)
    state = optimizer.state[param]
    assert list(state) == ["zero", "ones", "rates", "start", "number", "narrow", "flagged", "late"]
    assert (state["zero"] == 0).all()
    assert (state["ones"] == 1).all()
    assert (state["rates"] == 0.25).all()
    assert (state["flagged"] == 2).all()
    assert_same_bits(state["start"], start, "start")
    assert (state["number"].shape, float(state["number"])) == ((), 1.0)
    assert state["narrow"].shape == (2, 1)
    plain = train(Stateful, parameters(((2, 3),), torch.float32), 1)
    assert "flagged" not in next(iter(plain.state.values()))


@pytest.mark.parametrize("request_", REQUESTS)
def test_scalar_state_that_overflows_is_infinite(request_: str) -> None:
    class Growing(stepwell.Optimizer):
        size = full(1e30, scalar=True)

        @staticmethod
        def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
            state.size = state.size * 1e20
            return param - grad / state.size

    optimizer = train(
        lambda p: Growing(p, **REQUESTS[request_]), parameters(((3,),), torch.float32), 2
    )
    assert backends(optimizer) == {request_}
    [state] = optimizer.state.values()
    assert float(state["size"]) == math.inf


# Transforms


def _by_hand(
    rule: Any,
    options: dict[str, Any],
    before: Callable[[Any], None] = lambda params: None,
    after: Callable[[Any, Any], None] = lambda params, old: None,
    request: dict[str, Any] | None = None,
) -> Any:
    """Three steps with something done to the gradients before, and to the parameters after."""
    params = parameters(((4, 6), (7,), (30, 50)), torch.float32)
    optimizer = rule(params, **options, **(request or {}))
    for step in range(3):
        set_grads(params, step)
        before(params)
        old = [param.detach().clone() for param in params]
        optimizer.step()
        after(params, old)
    return optimizer


def _each_grad(function: Any) -> Callable[[Any], None]:
    def change(params: Any) -> None:
        for param in params:
            param.grad = function(param.grad, param.detach())

    return change


def _decayed(params: Any, old: Any) -> None:
    with torch.no_grad():
        for param, before in zip(params, old, strict=True):
            param -= 0.05 * 0.5 * before


def _clip_norm(params: Any) -> None:
    nn.utils.clip_grad_norm_(params, 0.75)


TRANSFORMS: dict[str, tuple[tuple[type[Transform], ...], dict[str, Any], dict[str, Any]]] = {
    "scale": (
        (Scale,),
        {"grad_factor": 0.25},
        {"before": _each_grad(lambda g, p: g * 0.25)},
    ),
    "clip value": (
        (ClipValue,),
        {"clip_value": 0.5},
        {"before": _each_grad(lambda g, p: g.clamp(-0.5, 0.5))},
    ),
    "clip norm": ((ClipNorm,), {"max_norm": 0.75}, {"before": _clip_norm}),
    "L2": (
        (language.L2,),
        {"l2": 0.5},
        {"before": _each_grad(lambda g, p: g + 0.5 * p)},
    ),
    "decoupled decay": ((DecoupledDecay,), {"decoupled_decay": 0.5}, {"after": _decayed}),
    "maximize": ((), {"maximize": True}, {"before": _each_grad(lambda g, p: -g)}),
    "scale, then clip": (
        (Scale, ClipValue),
        {"grad_factor": 4.0, "clip_value": 0.5},
        {"before": _each_grad(lambda g, p: (4 * g).clamp(-0.5, 0.5))},
    ),
    "clip, then scale": (
        (ClipValue, Scale),
        {"grad_factor": 4.0, "clip_value": 0.5},
        {"before": _each_grad(lambda g, p: 4 * g.clamp(-0.5, 0.5))},
    ),
    "scale, clip norm, decay": (
        (Scale, ClipNorm, DecoupledDecay),
        {"grad_factor": 3.0, "max_norm": 0.75, "decoupled_decay": 0.5},
        {
            "before": lambda params: (_each_grad(lambda g, p: 3 * g)(params), _clip_norm(params)),
            "after": _decayed,
        },
    ),
}
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (stepwell.SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW": (stepwell.AdamW, {"lr": 0.05, "eps": 1e-3}),
}


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_what_is_done_by_hand(name: str, rule: str, request_: str) -> None:
    transforms, settings, by_hand = TRANSFORMS[name]
    plain, options = RULES[rule]
    composed = stepwell.compose(plain, *transforms) if transforms else plain
    made = _by_hand(composed, {**options, **settings}, request=REQUESTS[request_])
    assert_training_within(made, _by_hand(plain, options, **by_hand), ULPS * 4, f"{rule}, {name}")
    if request_ == NATIVE:
        # all of it in one launch for all parameters
        assert [line.partition(":")[0] for line in made._held[0].describe()] == [NATIVE]


@pytest.mark.parametrize("request_", REQUESTS)
def test_an_average_of_the_parameters(request_: str) -> None:
    params = parameters(((4, 6), (7,)), torch.float32)
    averages = [param.detach().clone() for param in params]
    averaged = stepwell.compose(stepwell.AdamW, Average)
    optimizer = averaged(params, lr=0.05, average_decay=0.75, **REQUESTS[request_])
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
        for average, param in zip(averages, params, strict=True):
            # the first one is a copy
            average.lerp_(param.detach(), 0.25 if step else 1.0)
    assert backends(optimizer) == {request_}
    for param, average in zip(params, averages, strict=True):
        torch.testing.assert_close(optimizer.state[param]["average"], average)


def test_two_that_declare_the_same_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Scale: SGD.* has a 'grad_factor' already"):
        stepwell.compose(stepwell.SGD, Scale, Scale)

    class Greedy(Transform):
        lr: NonNegative = 1.0

    with pytest.raises(TypeError, match=r"Greedy: SGD.* has a 'lr' already"):
        stepwell.compose(stepwell.SGD, Greedy)


def test_a_transform_of_ones_own() -> None:
    class Centred(Transform):
        """Gradient centralization, Yong et al., arXiv:2004.01461."""

        @staticmethod
        def before(param: Any, grad: Any, state: Any, group: Any) -> Any:
            return grad - mean(grad)

    made = _by_hand(stepwell.compose(stepwell.SGD, Centred), {"lr": 0.1})
    hand = _by_hand(stepwell.SGD, {"lr": 0.1}, _each_grad(lambda g, p: g - g.mean()))
    assert backends(made) == {NATIVE}
    assert_training_within(made, hand, ULPS, "centred")


# Whether a rule can be left alone where the gradient is zero, and sparse gradients


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({}, True),
        ({"maximize": True}, True),
        ({"momentum": 0.9}, False),
        ({"weight_decay": 0.1}, False),
    ],
)
def test_is_idle(options: dict[str, Any], idle: bool) -> None:
    formula = stepwell.SGD.formula
    assert formula is not None
    assert language.program_for(formula, options).is_idle is idle


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("update", "idle"),
    [
        (lambda p, g, s, h: p - h.lr * sign(g) * abs(-g) / 3, True),
        (lambda p, g, s, h: p + sqrt(g * g) - 0 * g, True),
        (lambda p, g, s, h: p - h.lr * p * g, True),
        (lambda p, g, s, h: p, True),
        (lambda p, g, s, h: p - h.lr / (1 + g), False),
        (lambda p, g, s, h: p - h.lr, False),
        (lambda p, g, s, h: p - exp(g), False),
        (lambda p, g, s, h: p * 0.5 - g, False),
        (lambda p, g, s, h: g, False),
        (lambda p, g, s, h: p - g * s.step, True),
        (lambda p, g, s, h: p - g / norm(g), True),
        (lambda p, g, s, h: p - h.lr * norm(g), False),
        (lambda p, g, s, h: p - g * norm(p), False),
        (lambda p, g, s, h: p - g * mean(g), False),
        (lambda p, g, s, h: p - g * mean(g, dim=-1), False),
        (lambda p, g, s, h: p - g * amax(g), False),
        (_sets("exp_avg", lambda g: g * g), False),
    ],
)
def test_is_idle_in_words(update: Update, idle: bool) -> None:
    assert _traced(update).is_idle is idle


def test_adam_is_never_idle() -> None:
    for rule in (stepwell.Adam, stepwell.AdamW):
        assert rule.formula is not None
        assert not language.program_for(rule.formula, {}).is_idle


def _sparse(step: int, *, coalesced: bool) -> torch.Tensor:
    rows = [[5, 1, 1], [0, 5, 3], [1, 1, 1]][step % 3]
    values = numbers((3, 4), torch.float32, 20 + step)
    return (
        torch.sparse_coo_tensor([rows], values, (7, 4), is_coalesced=False)
        if not coalesced
        else torch.sparse_coo_tensor([rows], values, (7, 4)).coalesce()
    )


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.1, "maximize": True},
        {"foreach": True},
        {"foreach": False},
    ],
)
def test_sparse_gradients_of_sgd(options: dict[str, Any], coalesced: bool) -> None:
    results = []
    for package in (stepwell, torch.optim):
        param = nn.Parameter(numbers((7, 4), torch.float32, 1))
        other = nn.Parameter(numbers((5,), torch.float32, 2))
        optimizer = package.SGD([param, other], lr=0.1, **options)
        for step in range(4):
            param.grad = _sparse(step, coalesced=coalesced)
            other.grad = numbers((5,), torch.float32, 30 + step)
            optimizer.step()
        buffer = optimizer.state.get(param, {}).get("momentum_buffer")
        results.append(
            (param.detach(), other.detach(), None if buffer is None else buffer.to_dense())
        )
    for one, other_one in zip(*results, strict=True):
        torch.testing.assert_close(one, other_one)


def test_rows_without_a_gradient_are_not_touched() -> None:
    param = nn.Parameter(numbers((7, 4), torch.float32, 1))
    before = param.detach().clone()
    # what is computed from such a row would be NaN
    with torch.no_grad():
        param[2] = torch.nan
    optimizer = stepwell.SGD([param], lr=0.1)
    param.grad = _sparse(0, coalesced=False)
    optimizer.step()
    untouched = [0, 3, 4, 6]
    assert_same_bits(param.detach()[untouched], before[untouched], "rows without a gradient")
    assert not torch.equal(param.detach()[1], before[1])


def test_an_embedding_trains_like_a_dense_one() -> None:
    results = []
    for sparse in (True, False):
        embedding = nn.Embedding(9, 4, sparse=sparse)
        embedding.weight.data = numbers((9, 4), torch.float32, 1)
        optimizer = stepwell.SGD(embedding.parameters(), lr=0.5)
        for words in ([0, 3, 3], [8, 0, 1]):
            optimizer.zero_grad()
            (embedding(torch.tensor(words)) ** 2).sum().backward()
            optimizer.step()
        results.append(optimizer)
    assert_training_within(*results, 2, "an embedding")


@pytest.mark.parametrize("rule", ["Adam", "AdamW"])
def test_adam_refuses_sparse_gradients_in_torchs_words(rule: str) -> None:
    said = "does not support sparse gradients, please consider SparseAdam instead"
    params = parameters(((3,), (7, 4)), torch.float32)
    optimizer = getattr(stepwell, rule)(params)
    twin = getattr(torch.optim, rule)(parameters(((3,), (7, 4)), torch.float32))
    before = [param.detach().clone() for param in params]
    for some in (optimizer, twin):
        group = some.param_groups[0]["params"]
        group[0].grad, group[1].grad = torch.ones(3), _sparse(0, coalesced=True)
        with pytest.raises(RuntimeError, match=said):
            some.step()
    # refused before the first parameter was touched
    for param, old in zip(params, before, strict=True):
        assert_same_bits(param, old, "a refused step")
    assert not optimizer.state


# Composition of formulas, below the shell


@pytest.mark.tiny
def test_compose_nests_the_first_outermost() -> None:
    class Doubled(Transform):
        @staticmethod
        def before(param: Any, grad: Any, state: Any, group: Any) -> Any:
            return grad * 2

        @staticmethod
        def after(param: Any, new_param: Any, state: Any, group: Any) -> Any:
            return new_param * 2

    class Raised(Transform):
        @staticmethod
        def before(param: Any, grad: Any, state: Any, group: Any) -> Any:
            return grad + 1

        @staticmethod
        def after(param: Any, new_param: Any, state: Any, group: Any) -> Any:
            return new_param + 1

    rule = _formula(lambda p, g, s, h: g)
    assert compose(rule, [Doubled, Raised]).update(None, 10, None, None) == ((10 * 2 + 1) + 1) * 2
    assert compose(rule, [Raised, Doubled]).update(None, 10, None, None) == ((10 + 1) * 2) * 2 + 1


def test_an_order_of_amax_is_not_needed() -> None:
    """A reduction over elements and one along a dimension can be asked for together."""

    class Mixed(stepwell.Optimizer):
        @staticmethod
        def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
            return param - grad / amax(abs(grad), dim=-1) * amax(abs(param))

    params = parameters(((3, 4),), torch.float32)
    before = params[0].detach().clone()
    train(Mixed, params, 1)
    grad = params[0].grad
    assert grad is not None
    expected = before - grad / grad.abs().amax(-1, keepdim=True) * before.abs().amax()
    torch.testing.assert_close(params[0].detach(), expected)


class Branching(stepwell.Optimizer):
    """Asks for totals in an order that depends on a flag."""

    flag: bool = False
    across: Literal["group", "all"] = "all"

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        size = norm(grad, across=group.across) if group.flag else 0.0
        return param - size - total(grad, across=group.across)


def _branching(across: str, **request: Any) -> tuple[Any, list[nn.Parameter]]:
    params = parameters(((3, 4), (5,)), torch.float64)
    groups = [{"params": [params[0]], "flag": True}, {"params": [params[1]]}]
    set_grads(params, 0)
    return Branching(groups, across=across, **request), params


@pytest.mark.parametrize("request_", REQUESTS)
def test_totals_that_cannot_be_added_up_are_refused(request_: str) -> None:
    optimizer, params = _branching("all", **REQUESTS[request_])
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match="its groups ask for different totals with across='all'"):
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert_same_bits(param, old, "a refused step")


@pytest.mark.parametrize("request_", REQUESTS)
def test_each_group_may_have_totals_of_its_own(request_: str) -> None:
    optimizer, params = _branching("group", **REQUESTS[request_])
    before = [param.detach().clone() for param in params]
    optimizer.step()
    for param, old, flag in zip(params, before, (True, False), strict=True):
        assert param.grad is not None
        expected = old - param.grad.norm() * flag - param.grad.sum()
        torch.testing.assert_close(param.detach(), expected)


class Rows(stepwell.Optimizer):
    """A mean over each row, or over the last but one dimension."""

    rows = zeros(over=-1)
    columns = zeros(over=-2)

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        state.rows = state.rows + mean(grad, dim=-1)
        state.columns = state.columns + mean(grad, dim=-2)
        return param - state.rows * state.columns


def test_state_over_a_dimension_that_is_not_there_is_refused() -> None:
    params = parameters(((3, 4), (5,)), torch.float32)
    optimizer = Rows(params)
    set_grads(params, 0)
    said = r"Rows goes along dimension -2, which .* \(group 0, parameter 1 has shape \(5,\)\)"
    with pytest.raises(RuntimeError, match=said):
        optimizer.step()
    assert not any(optimizer.state.values())


def test_the_last_dimension_of_a_single_number() -> None:
    class Last(stepwell.Optimizer):
        rows = zeros(over=-1)

        @staticmethod
        def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
            state.rows = state.rows + mean(grad, dim=-1)
            return param - state.rows

    params = parameters(((), (4,), (2, 3)), torch.float64)
    before = [param.detach().clone() for param in params]
    optimizer = train(Last, params, 1)
    assert [tuple(s["rows"].shape) for s in optimizer.state.values()] == [(), (1,), (2, 1)]
    for param, old in zip(params, before, strict=True):
        assert param.grad is not None
        torch.testing.assert_close(param.detach(), old - param.grad.mean(-1, keepdim=True))


def test_totals_need_a_step() -> None:
    with pytest.raises(RuntimeError, match="has a meaning only inside an optimizer's step"):
        norm(torch.ones(3), across="all")
    with pytest.raises(TypeError, match="reduces the elements of a tensor, got float"):
        norm(3.0)
