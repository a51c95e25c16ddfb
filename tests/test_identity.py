"""Is a list, or a dict, seen to hold the very same objects, in Python and compiled alike?"""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from stepwell.native import identity

A, B, NAN = torch.ones(1), torch.ones(1), float("nan")
PLAIN = identity.Checks(identity._same_items, identity._same_entries, identity._same_groups)


@pytest.fixture(params=["plain", "compiled"])
def checks(request: pytest.FixtureRequest) -> identity.Checks:
    return PLAIN if request.param == "plain" else identity._compiled()


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ([], [], True),
        ([A, B], [A, B], True),
        ([NAN, None], [NAN, None], True),
        ([A, B], [B, A], False),
        # equal, but another object
        ([A], [B], False),
        ([[]], [[]], False),
        ([A], [A, B], False),
        ([A, B], [A], False),
        ([], [A], False),
    ],
)
def test_lists(checks: identity.Checks, found: Any, expected: Any, same: bool) -> None:
    assert bool(checks.items(found, expected)) is same


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("found", "same"),
    [
        ({"a": A, "b": B}, True),
        (defaultdict(dict, {"a": A, "b": B}), True),
        ({"b": B, "a": A}, False),
        ({"a": B, "b": B}, False),
        ({"a": A, "c": B}, False),
        ({"a": A}, False),
        ({"a": A, "b": B, "c": B}, False),
        ({}, False),
    ],
)
def test_dicts(checks: identity.Checks, found: Any, same: bool) -> None:
    assert bool(checks.entries(found, ["a", "b"], [A, B])) is same


GROUP = {"params": [A, B], "lr": 0.1}
PAIR = [GROUP, {"params": []}]


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("found", "sizes", "members", "same"),
    [
        (PAIR, [2, 1], [[A, B], []], True),
        (list(PAIR), [2, 1], [[A, B], []], True),
        # equal, but another dict
        ([dict(GROUP), PAIR[1]], [2, 1], [[A, B], []], False),
        (PAIR[:1], [2, 1], [[A, B], []], False),
        (PAIR, [3, 1], [[A, B], []], False),
        (PAIR, [2, 1], [[B, A], []], False),
        (PAIR, [2, 1], [[A, B], [A]], False),
    ],
)
def test_groups(checks: identity.Checks, found: Any, sizes: Any, members: Any, same: bool) -> None:
    assert bool(checks.groups(found, PAIR, sizes, "params", members)) is same
    assert not checks.groups(found, PAIR, sizes, "param", members)


def test_what_has_become_something_else_differs_and_leaves_no_error_behind() -> None:
    compiled = identity._compiled()
    assert not compiled.items((A,), [A])
    assert not compiled.items(None, [A])
    assert not compiled.entries([A], ["a"], [A])
    assert not compiled.groups(None, PAIR, [2, 1], "params", [[A, B], []])
    assert not compiled.groups((GROUP,), [GROUP], [2], "params", [[A, B]])
    # an error that was left would surface in the next call that looks for one
    assert int("7") == 7


@pytest.mark.tiny
def test_a_container_with_an_order_of_its_own_is_asked_in_python() -> None:
    compiled = identity._compiled()
    assert identity.checks([[A], [B]], {}) is compiled
    assert identity.checks([[A]], defaultdict(dict)) is compiled
    assert identity.checks([[A], (B,)], {}) == PLAIN
    assert identity.checks([[A]], OrderedDict()) == PLAIN
    moved = OrderedDict(a=A, b=B)
    moved.move_to_end("a")
    assert PLAIN.entries(moved, ["b", "a"], [B, A])


EAGER = """
import sys, torch, stepwell
param = torch.nn.Parameter(torch.ones(2))
param.grad = torch.ones(2)
optimizer = stepwell.SGD([param], foreach=False)
for _ in range(2):
    optimizer.step()
assert not any(name.startswith("llvmlite") for name in sys.modules)
"""


def test_a_step_without_compiled_code_loads_no_compiler() -> None:
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", EAGER], check=True, cwd=root)
