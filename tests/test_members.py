"""Is each parameter what it would be alone, whatever others do: come late, pause, leave, return?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stepwell.backends.foreach import _one_if_same

from .cases import PLAIN, REQUESTS, Case, _case, named, numbers
from .compare import assert_same_training, everything
from .rules import RULES, Prodigy

# with TRITON_INTERPRET=1 these go through the kernels for GPUs
pytestmark = pytest.mark.interpret

STEPS = 13
# the steps in which each parameter has a gradient; 2 is within RAdam's first steps and ASGD's t0
PRESENT: tuple[set[int], ...] = (
    {7, 8, 9, 12},  # late, with a pause; first, for what stands for others is the first one's
    set(range(STEPS)),
    {0, 1, 10, 11},  # returns when all others have long passed their first steps
    {*range(6)},  # leaves for good
)
# its parameters share one step size
TOGETHER = {Prodigy}
CASES = (*PLAIN, *(_case(rule, None) for rule in RULES if rule not in TOGETHER))


def _trained(case: Case, members: tuple[int, ...], request: dict[str, bool]) -> Any:
    params = {i: nn.Parameter(numbers((3, 2), torch.float32, 1 + i)) for i in members}
    optimizer = case.make(list(params.values()), **request)
    for step in range(STEPS):
        for i, param in params.items():
            grad = numbers((3, 2), torch.float32, 20 + 31 * step + i)
            param.grad = grad if step in PRESENT[i] else None
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("case", **named(CASES))
def test_members_do_not_see_each_other(case: Case, request_: str) -> None:
    request = REQUESTS[request_]
    together = everything(_trained(case, (0, 1, 2, 3), request))
    for i in range(len(PRESENT)):
        alone = {
            e._replace(index=i): t for e, t in everything(_trained(case, (i,), request)).items()
        }
        own = {entry: tensor for entry, tensor in together.items() if entry.index == i}
        assert_same_training(own, alone, f"{case.name} on {request_}")


@pytest.mark.parametrize(
    "different", [[float("nan"), 1.0], [1.0, float("nan")], [0.0, -0.0], [1.0, 2.0]]
)
def test_a_number_stands_for_a_list_only_if_all_are_the_same(different: list[float]) -> None:
    assert _one_if_same(different) is different
    for number in different:
        assert str(_one_if_same([number, number])) == str(number)
