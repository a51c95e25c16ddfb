"""Is every curve its formula, do curves join as they say, and does parse run nothing?"""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from pathlib import Path

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell import lr_scheduler
from stepwell.lr_scheduler import (
    Curve,
    constant,
    cosine,
    cosine_restarts,
    cosine_wave,
    cyclic,
    exponential,
    inverse_sqrt,
    linear,
    multi_step,
    one_cycle,
    parse,
    polynomial,
    rex,
    step,
    warmup,
    warmup_stable_decay,
)

pytestmark = pytest.mark.tiny

PI = mpmath.pi


def half_wave(share):
    return (1 + mpmath.cos(PI * share)) / 2


def down(end, value):
    return end + (1 - mpmath.mpf(end)) * value


def restarted(t):
    length = 5
    while t >= length:
        t, length = t - length, 2 * length
    return down(0.1, half_wave(mpmath.mpf(t) / length))


def up_and_down(t):
    within = mpmath.mpf(t) % 10
    return within / 3 if within <= 3 else (10 - within) / 7


def once(t):
    if t <= 29:
        return down(mpmath.mpf(1) / 25, 1 - half_wave(mpmath.mpf(t) / 29))
    share = min((mpmath.mpf(t) - 29) / 70, 1)
    return down(mpmath.mpf(1) / 250_000, half_wave(share))


# each with its formula, as its docstring has it, on numbers of 50 digits
FORMULAS = [
    (constant(0.3), lambda t: mpmath.mpf(0.3)),
    (linear(0.25, 2, 40), lambda t: 0.25 + 1.75 * mpmath.mpf(min(t, 40)) / 40),
    (warmup(50), lambda t: mpmath.mpf(min(t, 50) + 1) / 51),
    (cosine(70, end=0.1), lambda t: down(0.1, half_wave(mpmath.mpf(min(t, 70)) / 70))),
    (cosine_wave(30, end=0.1), lambda t: down(0.1, half_wave(mpmath.mpf(t) / 30))),
    (cosine_restarts(5, growth=2, end=0.1), restarted),
    (exponential(0.9), lambda t: mpmath.mpf(0.9) ** t),
    (step(7, gamma=0.5), lambda t: mpmath.mpf(0.5) ** (t // 7)),
    (
        multi_step([0, 3, 3, 50], gamma=0.5),
        lambda t: mpmath.mpf(0.5) ** sum(m <= t for m in (0, 3, 3, 50)),
    ),
    (
        polynomial(60, power=2.5, end=0.2),
        lambda t: down(0.2, (1 - mpmath.mpf(min(t, 60)) / 60) ** 2.5),
    ),
    (inverse_sqrt(20), lambda t: mpmath.sqrt(20 / mpmath.mpf(20 + t))),
    (
        rex(80, end=0.1),
        lambda t: down(0.1, (1 - mpmath.mpf(min(t, 80)) / 80) / (1 - mpmath.mpf(min(t, 80)) / 160)),
    ),
    (cyclic(3, 7), up_and_down),
    (
        cyclic(3, 7, low=0.25, mode="triangular2"),
        lambda t: down(0.25, up_and_down(t) / mpmath.mpf(2) ** (t // 10)),
    ),
    (cyclic(3, 7, mode="exp_range", gamma=0.9), lambda t: up_and_down(t) * mpmath.mpf(0.9) ** t),
    (one_cycle(100), once),
]
CURVES = [curve for curve, _ in FORMULAS]


@pytest.mark.parametrize(("curve", "formula"), FORMULAS, ids=map(repr, CURVES))
def test_a_curve_is_its_formula(curve, formula):
    mpmath.mp.dps = 50
    for t in range(150):
        # a handful of roundings of numbers of at most 2
        assert curve(t) == pytest.approx(float(formula(t)), rel=1e-13, abs=1e-15)


def test_every_curve_has_its_formula_here():
    made = {type(curve).__name__ for curve in CURVES}
    exported = {name for name in vars(lr_scheduler) if name.islower() and name[0] != "_"}
    kinds = {name for name in exported if isinstance(getattr(lr_scheduler, name), type)}
    assert made == {k for k in kinds if issubclass(getattr(lr_scheduler, k), Curve)}


@pytest.mark.parametrize(
    "make",
    [
        *(warmup, cosine, polynomial, rex, one_cycle, partial(linear, 0, 1)),
        partial(warmup_stable_decay, level=5, decay=5),
        *(partial(constant, 1.0), partial(exponential, 0.9)),
        lambda share: parse(f"warmup({share}) >> cosine(10)"),
    ],
)
def test_a_share_of_the_steps_is_no_length(make):
    words = (
        r"^Invalid steps value: 0\.1 \((\w+): steps must be a number in \[1, inf\)( or None)?\); "
    )
    words += r"steps are counted, not a ratio: \1\(steps=0\.1 \* total_steps\)$"
    with pytest.raises(ValueError, match=words):
        make(0.1)
    with pytest.raises(ValueError, match=r"must be a number in \[1, inf\)\)$"):
        warmup(0)
    assert warmup(1)(0) == 0.5


@pytest.mark.parametrize("curve", CURVES, ids=repr)
def test_ends_are_exact_and_kept(curve):
    assert curve(10**9) == curve(10**9 + 1000) or curve.steps is None
    if curve.steps is not None:
        assert curve(curve.steps) == curve(curve.steps + 0.5) == curve(10**300)
    assert math.isfinite(curve(10**400 if curve.steps else 10**300))


@pytest.mark.parametrize("shape", ["cos", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 101])
def test_one_cycle_ends_where_it_says_or_is_refused(steps, shape):
    for share in range(101):
        make = partial(one_cycle, steps, rise=share / 100, shape=shape, three_phase=True)
        # the way up and back ends at step 2 rise steps - 2
        if 2 * share * steps < 100 * (steps + 1):
            assert make()(steps - 1) == make()(steps) == make().end
        else:
            with pytest.raises(ValueError, match="Invalid rise value"):
                make()


@pytest.mark.parametrize("value", [-1, -1e-300, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("curve", [*CURVES, warmup(3) >> cosine(4), cosine(4) * 2], ids=repr)
def test_steps_that_are_none_are_refused(curve, value):
    with pytest.raises(ValueError, match="Invalid step value"):
        curve(value)


curves = st.recursive(
    st.sampled_from([curve for curve in CURVES if curve.steps is not None]),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a >> b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(lambda a, x: x * a, inner, st.floats(0, 10)),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(curve=curves, t=st.integers(0, 500))
def test_a_repr_makes_the_curve_again(curve, t):
    again = eval(repr(curve), vars(lr_scheduler))
    assert again == curve == parse(repr(curve)) == pickle.loads(pickle.dumps(curve))
    assert hash(again) == hash(copy.deepcopy(curve))
    assert again(t) == curve(t)


@settings(deadline=None)
@given(first=curves, second=curves, t=st.integers(0, 500))
def test_then_and_times(first, second, t):
    assert (first >> second)(first.steps + t) == second(t)
    assert (first >> second).steps == first.steps + second.steps
    if t < first.steps:
        assert (first >> second)(t) == first(t)
    assert (first * second)(t) == first(t) * second(t)
    assert (first * 0.3)(t) == (0.3 * first)(t) == first(t) * 0.3


def test_then_is_associative_and_needs_an_end():
    a, b, c = warmup(3), cosine(4), linear(1, 0, 5)
    assert (a >> b) >> c == a >> (b >> c)
    assert (exponential(0.9, steps=4) >> a).steps == 7
    with pytest.raises(ValueError, match=r"\(0.9\) >> warmup\(3\): the first has no end"):
        exponential(0.9) >> a
    assert warmup_stable_decay(3, 4, 5) == warmup(3) >> constant(steps=4) >> linear(1, 0, 5)
    assert warmup_stable_decay(3, 4, rex(5))(7) == 1


def test_growth_without_bounds_is_infinite_and_no_crash():
    assert exponential(1.5)(10**6) == math.inf
    assert step(1, gamma=2)(10**400) == math.inf
    assert exponential(0.5)(10**400) == 0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: cosine(0), ValueError, r"steps value: 0 \(cosine: .*\[1, inf\)"),
        (lambda: cosine(-3), ValueError, "steps value: -3"),
        (lambda: cosine(10**400), ValueError, "steps value: 1000"),
        (lambda: step(10**400), ValueError, "step_size value: 1000"),
        (lambda: cosine(True), TypeError, "steps"),
        (lambda: cosine("5"), TypeError, "steps"),
        (lambda: cosine(5, end=-0.1), ValueError, "end value: -0.1"),
        (lambda: exponential(math.nan), ValueError, "gamma value: nan"),
        (lambda: linear(0, math.inf, 5), ValueError, "end value: inf"),
        (lambda: multi_step([5, 3]), ValueError, r"milestones.*ascending order: \[3, 5\]"),
        (lambda: multi_step([-1, 3]), ValueError, "milestones value: -1"),
        (lambda: multi_step(3), TypeError, "milestones"),
        (lambda: cyclic(3, mode="square"), ValueError, "mode"),
        (lambda: one_cycle(5, rise=1.5), ValueError, "rise"),
        (
            lambda: one_cycle(100, rise=0.505, three_phase=True),
            ValueError,
            r"Invalid rise value: 0.505 \(one_cycle: .* of 100 steps in all, .* in \[0, 0.505\)",
        ),
        (lambda: cosine(5) * -1, ValueError, "factor"),
        (lambda: cosine(5) * "2", TypeError, "multiply"),
        (lambda: cosine(5) >> 3, TypeError, "unsupported operand"),
    ],
)
def test_refusals(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cosin(5)", "no curve 'cosin'; did you mean 'cosine'"),
        ("frobnicate(5)", "there are constant, cosine"),
        ("cosine", "not allowed"),
        ("5", "is no curve"),
        ("", "is no curve"),
        ("cosine(5", "never closed"),
        ("cosine(5) + cosine(4)", "not allowed"),
        ("3 * 4", "not allowed"),
        ("cosine(2**9)", "not allowed"),
        ("cosine(*[5])", "not allowed"),
        ("cosine(**{})", "not allowed"),
        ("cosine(steps=1, steps=2)", "not allowed"),
        ("cosine(steps=open('x'))", "no curve 'open'"),
        ("__import__('os').system('true')", "not allowed"),
        ("(lambda: cosine(5))()", "not allowed"),
        ("cosine(5).steps", "not allowed"),
        ("cosine(5) if 1 else cosine(4)", "not allowed"),
        ("cosine(0)", "steps value: 0"),
        (f"cosine(1{'0' * 400})", "steps value: 1000"),
        ("warmup(5) >> " * 3000 + "cosine(5)", "is no curve"),
        ("(" * 5000, "is no curve"),
    ],
)
def test_parse_refuses_all_else(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_parse():
    whole = parse(" 0.5 * (warmup(500) >> cosine(9_500, end=1e-2)) * multi_step([3, 5]) ")
    assert whole == 0.5 * (warmup(500) >> cosine(9500, end=0.01)) * multi_step((3, 5))
    assert parse("cyclic(3, None, mode='triangular2')") == cyclic(3, mode="triangular2")


def test_the_page_of_schedules_shows_every_curve():
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "schedules.md").read_text()
    for curve in [*CURVES, warmup_stable_decay]:
        name = getattr(curve, "__name__", type(curve).__name__)
        assert f"| `{name}(" in page
        assert (docs / "pictures" / f"{name}.png").is_file()
