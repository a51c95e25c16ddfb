"""Values per row, column and matrix in compiled code: against NumPy, and against `eager`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import stepwell
from stepwell.language import amax, epsilon, lerp, maximum, mean, norm, numel, sqrt, where, zeros
from stepwell.language import sum as total
from stepwell.language.program import program_for

from .cases import named, numbers, parameters, set_grads, train
from .compare import assert_same_training, assert_training_within, backends

# less than a vector register, more than one part of a matrix, many small matrices, rows or columns
# alone, nothing at all
MATRICES = ((3, 4), (1, 1), (600, 700), (4, 300, 500), (50, 2, 3, 3), (1, 5000), (5000, 1), (0, 3))


class Sinkhorn(stepwell.Optimizer):
    """Divides by the norms of rows, then of columns."""

    row = zeros(over=-1)
    column = zeros(over=-2)

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        state.row = norm(grad, dim=-1)
        grad = grad / state.row
        state.column = norm(grad, dim=-2)
        return param - grad / state.column


class Tangle(stepwell.Optimizer):
    """Every way from one kind of slice to another."""

    largest = zeros(over=-1)
    spread = zeros(over=-2)
    shared = zeros(over=-1)
    plain = zeros(over=-2)
    kept = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        largest = amax(abs(grad), dim=-1)
        old = state.largest
        state.largest = maximum(0.9 * old, largest)
        per_column = mean(grad, dim=-2) + state.spread
        # from rows and columns to one per matrix, and back
        per_matrix = mean(state.largest, dim=-2) + amax(per_column, dim=-1)
        is_large = largest > mean(largest, dim=-2)
        state.spread = per_column / (1 + per_matrix * per_matrix)
        # a sum of what is one per row is one number per parameter
        size = sqrt(total(largest * largest) / numel(largest)) + total(per_matrix)
        state.shared = per_matrix * size
        state.plain = 2.0
        state.kept = lerp(state.kept, per_column, 0.5)
        centred = grad - mean(grad, dim=-1) - where(is_large, old, 0.0)
        change = centred / (largest + epsilon(param)) * per_matrix / (1 + size)
        return param - 0.1 * change + total(change, dim=-1) / (1 + norm(change, dim=-2))


class FirstDimension(stepwell.Optimizer):
    """Dimensions counted from the front."""

    rows = zeros(over=0)

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        if param.ndim < 2:
            return param - grad
        state.rows = state.rows + mean(grad, dim=0)
        return param - state.rows / 2


RULES = (Sinkhorn, Tangle, FirstDimension)


def test_rows_then_columns_as_numpy_has_them() -> None:
    grads = [numbers(shape, torch.float64, i).numpy() for i, shape in enumerate(MATRICES)]
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in MATRICES]
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.from_numpy(grad)
    optimizer = Sinkhorn(params)
    optimizer.step()
    assert backends(optimizer) == {"cpu"}
    for param, grad in zip(params, grads, strict=True):
        rows = np.sqrt((grad * grad).sum(-1, keepdims=True))
        scaled = grad / rows
        columns = np.sqrt((scaled * scaled).sum(-2, keepdims=True))
        # sums in another order: a few roundings of float64
        np.testing.assert_allclose(param.detach().numpy(), -scaled / columns, rtol=1e-13)
        if grad.size:
            np.testing.assert_allclose(optimizer.state[param]["row"], rows, rtol=1e-13)
            np.testing.assert_allclose(optimizer.state[param]["column"], columns, rtol=1e-13)


@pytest.mark.parametrize("dtype", **named((torch.float32, torch.float64, torch.bfloat16)))
@pytest.mark.parametrize("rule", RULES)
def test_compiled_as_eager(rule: type[Any], dtype: torch.dtype) -> None:
    # three dimensions counted from the front are not the last two
    shapes = list(MATRICES[:3] if rule is FirstDimension else MATRICES)
    # compiled code does not go over the slices of a parameter without elements
    shapes = [shape for shape in shapes if rule is not Tangle or np.prod(shape)]
    eager = train(lambda p: rule(p, foreach=False), parameters(shapes, dtype), 3)
    compiled = train(rule, parameters(shapes, dtype), 3)
    assert (backends(eager), backends(compiled)) == ({"eager"}, {"cpu"})
    # eager rounds what it has summed to float32 at other places, and divides by it
    limit = 4 if dtype is torch.bfloat16 else 256
    assert_training_within(compiled, eager, limit, rule.__name__)


def test_other_dimensions_and_other_orders_of_memory_go_to_foreach() -> None:
    for shape, expected in (((4, 3), "cpu"), ((2, 4, 3), "foreach")):
        assert backends(train(FirstDimension, parameters((shape,), torch.float32), 1)) == {expected}
    turned = torch.nn.Parameter(numbers((4, 3), torch.float32, 0).T)
    straight = torch.nn.Parameter(turned.detach().clone(memory_format=torch.contiguous_format))
    one, other = train(Sinkhorn, [turned], 2), train(Sinkhorn, [straight], 2)
    assert (backends(one), backends(other)) == ({"foreach"}, {"cpu"})
    assert_training_within(one, other, 4, "a transposed parameter")


def test_dimensions_make_a_program_only_where_they_are_asked_for() -> None:
    adamw, adafactor = stepwell.AdamW.formula, stepwell.Adafactor.formula
    assert adamw
    assert adafactor
    assert program_for(adamw, {}, ndim=1) is program_for(adamw, {}, ndim=4)
    # matrices and convolutions share a program, and so a launch; vectors have another
    assert program_for(adafactor, {}, ndim=2) is program_for(adafactor, {}, ndim=4)
    assert program_for(adafactor, {}, ndim=0) is program_for(adafactor, {}, ndim=1)
    assert set(program_for(adafactor, {}, ndim=1).slots) == {"step", "variance"}
    assert set(program_for(adafactor, {}, ndim=2).slots) == {"step", "row_var", "col_var"}


@pytest.mark.parametrize("rule", [*RULES[:2], stepwell.Adafactor])
def test_threads_and_groups_change_nothing(rule: type[Any]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = train(rule, parameters(MATRICES, torch.float64), 2)
        torch.set_num_threads(1)
        params = parameters(MATRICES, torch.float64)
        apart = rule([{"params": params[:3]}, {"params": params[3:]}])
        for step in range(2):
            set_grads(params, step)
            apart.step()
    finally:
        torch.set_num_threads(before)
    assert_same_training(apart, together, rule.__name__)


def test_missing_gradients_leave_rows_and_columns_alone() -> None:
    params = parameters(((30, 40), (50, 60)), torch.float32)
    optimizer = train(stepwell.Adafactor, params, 2)
    before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    set_grads(params, 2)
    params[0].grad = None
    optimizer.step()
    assert backends(optimizer) == {"cpu"}
    for name, value in optimizer.state[params[0]].items():
        assert torch.equal(value, before[0][name])
        assert not torch.equal(optimizer.state[params[1]][name], before[1][name])


def test_clipping_by_a_global_norm_comes_first() -> None:
    clipped = stepwell.compose(stepwell.Adafactor, stepwell.language.ClipNorm)
    params, others = (parameters(((30, 40), (7,)), torch.float64) for _ in range(2))
    one, other = clipped(params, max_norm=0.5), stepwell.Adafactor(others)
    for step in range(3):
        for group in (params, others):
            set_grads(group, step)
        torch.nn.utils.clip_grad_norm_(others, 0.5)
        one.step()
        other.step()
    assert backends(one) == {"cpu"}
    assert_training_within(one, other, 64, "clipped")


def test_state_of_the_wrong_size_is_refused_by_the_formula() -> None:
    class Wide(stepwell.Optimizer):
        row = zeros(over=-1)

        @staticmethod
        def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
            state.row = grad
            return param

    optimizer = Wide(parameters(((3, 4),), torch.float32))
    set_grads(optimizer.param_groups[0]["params"], 0)
    with pytest.raises(TypeError, match=r"state\.row has size 1 in dimension -1, the value"):
        optimizer.step()


def test_complex_parameters_are_refused_in_words() -> None:
    params = [torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))]
    optimizer = stepwell.Adafactor(params)
    params[0].grad = torch.ones(2, 2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"Adafactor does not support complex .*AdamW"):
        optimizer.step()


def test_a_narrow_dtype_does_not_leak_its_epsilon_to_others() -> None:
    """As it does in torch's loop, where the first parameter's is taken for all."""
    wide = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    alone = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    narrow = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    for param in (wide, alone, narrow):
        param.grad = torch.full_like(param, 1e-3)
    stepwell.Adafactor([narrow, wide]).step()
    torch.optim.Adafactor([alone], foreach=False).step()
    torch.testing.assert_close(wide, alone, rtol=1e-14, atol=0)
