"""Do the bits depend on anything but the numbers? Hypothesis looks for shapes and orders that tell.

The reference is each parameter alone: contiguous, in an optimizer of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from .cases import CASES, NATIVE, REQUESTS, Case, numbers, per_element
from .compare import assert_same_bits, assert_same_training, snapshot

# with TRITON_INTERPRET=1 these go through the kernels for GPUs
pytestmark = pytest.mark.interpret

# the same examples in every run, however slow the machine is
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple) | st.sampled_from(
    [(16_384,), (16_385,), (129, 257), (1, 1, 1), (2, 0, 3)]
)
# an order of memory that rows do not lie in has other code, whose last bits differ
cases = st.sampled_from(per_element(CASES))


@dataclass(frozen=True)
class Training:
    """Parameters, how they lie and are grouped, and which of them have a gradient at each step."""

    case: Case
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    orders: tuple[tuple[int, ...], ...]
    cuts: tuple[int, ...]
    present: tuple[tuple[bool, ...], ...]

    def params(self, *, permuted: bool) -> list[nn.Parameter]:
        """The parameters; `permuted` ones have their dimensions in another order of memory."""
        orders = self.orders if permuted else [tuple(range(len(s))) for s in self.shapes]
        return [
            nn.Parameter(_laid_out(numbers(shape, self.dtype, i), order))
            for i, (shape, order) in enumerate(zip(self.shapes, orders, strict=True))
        ]

    def set_grads(self, params: Sequence[Tensor], step: int, *, permuted: bool = False) -> None:
        """The gradients of a step; those that are absent are None."""
        for i, param in enumerate(params):
            param.grad = None
            if self.present[step][i]:
                drawn = numbers(self.shapes[i], self.dtype, 100 + 10 * step + i)
                # every second gradient lies as its parameter does, the others as they come
                lies = permuted and i % 2 == 0
                param.grad = _laid_out(drawn, self.orders[i]) if lies else drawn

    def groups(self, params: Sequence[Tensor]) -> list[dict[str, Any]]:
        """The parameters in groups."""
        return [{"params": list(params[a:b])} for a, b in pairwise((0, *self.cuts, len(params)))]

    @property
    def steps(self) -> range:
        """The steps."""
        return range(len(self.present))


def _laid_out(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The same tensor with its dimensions in this order of memory."""
    back = [order.index(d) for d in range(tensor.dim())]
    return tensor.permute(tuple(order)).contiguous().permute(back)


@st.composite
def trainings(draw: Any) -> Training:
    """Any training."""
    sizes = draw(st.lists(shapes, min_size=1, max_size=5).map(tuple))
    orders = tuple(tuple(draw(st.permutations(range(len(shape))))) for shape in sizes)
    cuts = draw(st.lists(st.integers(0, len(sizes)), max_size=2).map(sorted).map(tuple))
    row = st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)).map(tuple)
    present = draw(st.lists(row, min_size=1, max_size=4).map(tuple))
    return Training(draw(cases), draw(st.sampled_from(DTYPES)), sizes, orders, cuts, present)


@SETTINGS
@given(trainings(), st.sampled_from(sorted(REQUESTS)))
def test_each_parameter_is_as_if_it_were_alone(training: Training, request_: str) -> None:
    options = {} if request_ == NATIVE else REQUESTS[request_]
    together = training.params(permuted=True)
    one = training.case.make(training.groups(together), **options)
    alone = training.params(permuted=False)
    others = [training.case.make([param], **options) for param in alone]
    for step in training.steps:
        training.set_grads(together, step, permuted=True)
        training.set_grads(alone, step)
        one.step()
        for optimizer in others:
            optimizer.step()
    for i, (param, other, optimizer) in enumerate(zip(together, alone, others, strict=True)):
        what = f"{training.case.name}: parameter {i}"
        assert_same_bits(param, other, what)
        assert one.state.get(param, {}).keys() == optimizer.state.get(other, {}).keys()
        for name, value in optimizer.state.get(other, {}).items():
            assert_same_bits(one.state[param][name], value, f"{what} {name}")


@SETTINGS
@given(trainings(), st.data())
def test_save_and_load_at_any_step(training: Training, data: st.DataObject) -> None:
    stop = data.draw(st.integers(0, len(training.present)), label="saved after")
    params = training.params(permuted=True)
    optimizer = training.case.make(training.groups(params))
    saved: Any = None
    for step in training.steps:
        if step == stop:
            saved = _saved(params, optimizer)
        training.set_grads(params, step)
        optimizer.step()
    saved = _saved(params, optimizer) if saved is None else saved

    values, state_dict = saved
    resumed = training.params(permuted=True)
    for param, value in zip(resumed, values, strict=True):
        param.data.copy_(value)
    again = training.case.make(training.groups(resumed))
    again.load_state_dict(state_dict)
    for step in training.steps[stop:]:
        training.set_grads(resumed, step)
        again.step()
    assert_same_training(again, optimizer, f"{training.case.name}, saved after step {stop}")


def _saved(params: Sequence[Tensor], optimizer: Any) -> Any:
    return copy.deepcopy(([param.detach() for param in params], optimizer.state_dict()))


@SETTINGS
@given(trainings())
def test_a_copy_goes_the_same_way(training: Training) -> None:
    params = training.params(permuted=True)
    optimizer = training.case.make(training.groups(params))
    half = len(training.present) // 2
    for step in training.steps[:half]:
        training.set_grads(params, step)
        optimizer.step()
    copied = copy.deepcopy(optimizer)
    before = snapshot(copied)
    for step in training.steps[half:]:
        training.set_grads(params, step)
        optimizer.step()
    assert_same_training(copied, before, "a copy, while the original went on")
    twins = [param for group in copied.param_groups for param in group["params"]]
    for step in training.steps[half:]:
        training.set_grads(twins, step)
        copied.step()
    assert_same_training(copied, optimizer, f"a copy of {training.case.name}")
