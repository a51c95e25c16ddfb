"""The test of the tests: does a comparison with torch notice every small mistake in a formula?

Each mutant is a formula of the package with one operator, number, order of arguments or condition
changed. A mutant that lives means that the comparison over five steps is blind to that place.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import stepwell
from stepwell import formulas

from .cases import named, parameters, set_grads, train

STEPS = 5
SHAPES = ((3, 5), (7,))

SOURCES: dict[str, Callable[..., Any]] = {
    "decay": formulas.decay,
    "adam": formulas.adam,
    "SGD": stepwell.SGD.update,
    "Adam": stepwell.Adam.update,
    "AdamW": stepwell.AdamW.update,
    "SparseAdam": stepwell.SparseAdam.update,
}
# which functions each rule is made of, and the hyperparameters under which all of it is run
USES = {
    "SGD": ("SGD",),
    "Adam": ("Adam", "decay", "adam"),
    "AdamW": ("AdamW", "decay", "adam"),
    "SparseAdam": ("SparseAdam", "adam"),
}
ADAM: tuple[dict[str, Any], ...] = (
    {"lr": 0.1, "betas": (0.8, 0.95), "eps": 0.03, "amsgrad": True},
    {"lr": 0.2, "betas": (0.5, 0.9), "eps": 0.01, "weight_decay": 0.3},
    {"lr": 0.05, "betas": (0.3, 0.6), "eps": 0.1, "weight_decay": 0},
)
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "SGD": (
        {"lr": 0.1},
        {"lr": 0.3, "weight_decay": 0.2},
        {"lr": 0.2, "momentum": 0.7, "dampening": 0.25, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.6, "nesterov": True},
    ),
    "Adam": (*ADAM, {**ADAM[1], "decoupled_weight_decay": True}),
    "AdamW": ADAM,
    "SparseAdam": tuple({k: setting[k] for k in ("lr", "betas", "eps")} for setting in ADAM),
}
# how each library is asked for its plain loop
LOOP = {"SparseAdam": ({"fused": False}, {})}

# Mutants that compute the same, with the reason.
EQUIVALENT = {
    # max(a, b) = max(b, a)
    "adam: second_moment = state.max_exp_avg_sq = maximum(second_moment, state.max_exp_avg_sq)",
    # two is as true as one
    "SparseAdam: return adam(param, grad, state, group, corrects_eps=2)",
}

SWAPS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
}


@dataclass(frozen=True)
class Mutant:
    """A changed function, by name, and what was changed in it."""

    function: str
    name: str
    tree: ast.FunctionDef


@cache
def _parsed(function: str) -> ast.FunctionDef:
    module = ast.parse(textwrap.dedent(inspect.getsource(SOURCES[function])))
    [definition] = module.body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list.clear()
    definition.returns = None
    for argument in definition.args.args:
        argument.annotation = None
    return definition


def _changes(node: ast.AST) -> Iterator[Callable[[Any], None]]:
    """What can be done to one node, each as a function that does it in place."""
    if isinstance(node, ast.BinOp):
        yield lambda n: setattr(n, "op", SWAPS[type(n.op)]())
        if not isinstance(node.op, (ast.Add, ast.Mult)):
            yield _swap_sides
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield lambda n: setattr(n, "value", n.value + 1)
    elif isinstance(node, ast.Call):
        for i in range(len(node.args) - 1):
            yield lambda n, i=i: _swap_items(n.args, i)
        if len(node.args) == 1:
            yield _call_of_nothing
    elif isinstance(node, ast.Tuple):
        yield lambda n: _swap_items(n.elts, 0)
    elif isinstance(node, ast.If):
        yield lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))


def _swap_sides(node: Any) -> None:
    node.left, node.right = node.right, node.left


def _swap_items(items: list[Any], i: int) -> None:
    items[i], items[i + 1] = items[i + 1], items[i]


def _call_of_nothing(node: Any) -> None:
    node.func = ast.Name("abs", ast.Load())


def _mutants() -> Iterator[Mutant]:
    for function in SOURCES:
        original = _parsed(function)
        for place, node in enumerate(ast.walk(original)):
            for change in _changes(node):
                tree = copy.deepcopy(original)
                changed = list(ast.walk(tree))[place]
                change(changed)
                yield Mutant(function, f"{function}: {_statement(tree, changed)}", tree)


def _statement(tree: ast.AST, node: ast.AST) -> str:
    """The first line of the innermost statement that a node is part of."""
    around = [
        part for part in ast.walk(tree) if isinstance(part, ast.stmt) and node in ast.walk(part)
    ]
    return ast.unparse(around[-1]).splitlines()[0]


def _rule(name: str, mutant: Mutant | None) -> type[Any]:
    """The rule, with the functions it uses compiled anew."""
    namespace: dict[str, Any] = {}
    for function in reversed(USES[name]):
        changed = mutant is not None and mutant.function == function
        tree = mutant.tree if mutant is not None and changed else _parsed(function)
        module = ast.fix_missing_locations(ast.Module([copy.deepcopy(tree)], []))
        scope = {**vars(inspect.getmodule(SOURCES[function])), **namespace}
        exec(compile(module, f"<{name}>", "exec"), scope)
        namespace[function] = scope[tree.name]
    # of gradients that have all rows, a rule for sparse ones makes the same
    body = {"update": staticmethod(namespace[name]), "sparse_only": False}
    return type("Mutant", (getattr(stepwell, name),), body)


@cache
def _truth(name: str, setting: int) -> list[torch.Tensor]:
    twin = getattr(torch.optim, name)
    params = _params()
    optimizer = twin(params, **_loop(name)[1], **SETTINGS[name][setting])
    for step in range(STEPS):
        set_grads(params, step)
        for param in params if getattr(stepwell, name).sparse_only else ():
            assert param.grad is not None
            param.grad = param.grad.to_sparse(1)
        optimizer.step()
    return [param.detach() for param in params]


def _loop(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return LOOP.get(name, ({"foreach": False}, {"foreach": False}))


def _params() -> list[torch.nn.Parameter]:
    return parameters(SHAPES, torch.float64)


def _compare(rule: type[Any], name: str) -> None:
    """Raise unless the rule does as torch does, under all settings."""
    for setting, options in enumerate(SETTINGS[name]):
        flags = {**_loop(name)[0], **options}
        trained = train(lambda p: rule(p, **flags), _params(), STEPS)  # noqa: B023
        for param, expected in zip(
            trained.param_groups[0]["params"], _truth(name, setting), strict=True
        ):
            torch.testing.assert_close(param.detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", USES)
def test_the_formula_itself_passes(name: str) -> None:
    _compare(_rule(name, None), name)


MUTANTS = tuple(_mutants())


@pytest.mark.parametrize("mutant", **named(MUTANTS))
def test_mutants_die(mutant: Mutant) -> None:
    survived = []
    for name, functions in USES.items():
        if mutant.function in functions:
            try:
                _compare(_rule(name, mutant), name)
                survived.append(name)
            except (ArithmeticError, AssertionError, AttributeError, TypeError, ValueError):
                continue
    if mutant.name in EQUIVALENT:
        assert survived, f"{mutant.name} is not equivalent"
    else:
        # what only one of the rules that share a function can show is enough
        users = [name for name, functions in USES.items() if mutant.function in functions]
        assert survived != users, f"no test would notice {mutant.name}"


def test_there_are_mutants_of_every_function() -> None:
    counts = {name: sum(m.function == name for m in MUTANTS) for name in SOURCES}
    assert all(counts.values())
    assert {mutant.name for mutant in MUTANTS} >= EQUIVALENT
