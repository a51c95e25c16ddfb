"""The equations of a rule's docstring are those that its formula prints."""

import inspect
import re

import pytest

import stepwell
from stepwell import optimizers
from stepwell.language.equations import equations
from stepwell.language.fields import fields_of, slots_of
from stepwell.language.functions import lerp, sqrt, where
from stepwell.language.program import Formula

RULES = [r for r in vars(optimizers).values() if inspect.isclass(r) and r.formula is not None]


def shown(rule):
    """The equations of a docstring, block by block, without the remarks at the ends of lines."""
    blocks = [block.splitlines() for block in inspect.getdoc(rule).split("\n\n")]
    indented = [block for block in blocks if all(line.startswith("    ") for line in block)]
    return [[re.sub(r"   +\(.*\)$", "", line).strip() for line in block] for block in indented]


def printed(formula, ndim=2):
    """What the formula prints when everything that can be switched on by a number is on."""
    group = {n: 0.5 if f.zero_is_off else f.default for n, f in formula.fields.items()}
    return equations(formula, group, ndim)


@pytest.mark.tiny
@pytest.mark.parametrize("rule", RULES)
def test_docstring_equations_are_those_of_the_formula(rule):
    of_vectors = printed(rule.formula, ndim=1)
    of_matrices = printed(rule.formula)
    assert shown(rule) == [of_matrices, *([of_vectors] if of_vectors != of_matrices else [])]


@pytest.mark.tiny
def test_every_exported_rule_is_looked_at():
    assert {stepwell.SGD, stepwell.Adam, stepwell.RAdam} < set(RULES)


def formula_of(update, **attributes):
    cls = type("Rule", (), {"__annotations__": {}, **attributes})
    return Formula("Rule", fields_of(cls), slots_of(cls), update)


def with_a_name(param, grad, state, group):
    shifted = grad + 1
    return param - sqrt(shifted) / shifted


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (lambda p, g, s, h: p - (g - p), ["p <- p - (g - p)"]),
        (lambda p, g, s, h: p - g / (p * g), ["p <- p - g / (p g)"]),
        (lambda p, g, s, h: p - 3 * g * g, ["p <- p - 3 g^2"]),
        (lambda p, g, s, h: (p + g) ** 3, ["p <- (p + g)^3"]),
        (lambda p, g, s, h: p + -g, ["p <- p + -g"]),
        (lambda p, g, s, h: where(p > g, p, g), ["p <- where(p > g, p, g)"]),
        (lambda p, g, s, h: lerp(p, g, 0.5), ["p <- lerp(p, g, 0.5)"]),
        (lambda p, g, s, h: p - sqrt(g + 1) / (g + 1), ["p <- p - sqrt(g + 1) / (g + 1)"]),
        (with_a_name, ["shifted <- g + 1", "p <- p - sqrt(shifted) / shifted"]),
    ],
)
def test_operators_keep_their_order_in_print(update, expected):
    assert printed(formula_of(update)) == expected
