"""Does LBFGS take the steps of torch's, lose nothing, and survive what is not finite?

Tolerances. In float64 two runs of the same iteration part by some roundings of 1e-16 per step,
which an ill-conditioned loss multiplies by its condition number: 1e-7 after tens of steps.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lbfgs import DESCENTS, descents_table, saved
from stepwell.groups import freeze, unfreeze
from stepwell.optimizers.lbfgs import LBFGS
from stepwell.quasi_newton.history import History
from stepwell.quasi_newton.line_search import ARMIJO, CURVATURE, TRIALS, strong_wolfe
from stepwell.quasi_newton.objective import Line, Objective, Point

from .shell_cases import assert_same, refused, snapshot

WOLFE = {"line_search_fn": "strong_wolfe"}
SEARCHES: dict[str, dict[str, Any]] = {"no search": {}, "strong Wolfe": WOLFE}
each_search = pytest.mark.parametrize("search", SEARCHES.values(), ids=[*SEARCHES])
CLOSE = {"rtol": 1e-7, "atol": 1e-9}

Problem = tuple[list[nn.Parameter], Callable[[], Tensor]]


def rosenbrock(dtype: torch.dtype = torch.float64) -> Problem:
    param = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=dtype))
    return [param], lambda: 100 * (param[1] - param[0] ** 2) ** 2 + (1 - param[0]) ** 2


def quadratic(dtype: torch.dtype = torch.float64, condition: float = 1e4, seed: int = 0) -> Problem:
    """Half x A x - b x in 100 dimensions, less its minimum."""
    draw, kind = torch.Generator().manual_seed(seed), torch.float64
    axes, _ = torch.linalg.qr(torch.randn(100, 100, generator=draw, dtype=kind))
    matrix = (axes * torch.logspace(0, math.log10(condition), 100, dtype=kind)) @ axes.T
    b = torch.randn(100, generator=draw, dtype=kind)
    least = float(-0.5 * b @ torch.linalg.solve(matrix, b))
    matrix, b = matrix.to(dtype), b.to(dtype)
    params = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (60, 40)]

    def loss() -> Tensor:
        x = torch.cat(params)
        return 0.5 * x @ (matrix @ x) - b @ x - least

    return params, loss


@functools.cache
def tumours() -> Any:
    return load_breast_cancer(return_X_y=True)


def cancer(dtype: torch.dtype = torch.float64) -> Problem:
    """Logistic regression of 569 tumours on 30 measures of each, with a little weight decay."""
    inputs, labels = map(torch.tensor, tumours())
    inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).to(dtype)
    weight = nn.Parameter(torch.zeros(30, dtype=dtype))
    bias = nn.Parameter(torch.zeros((), dtype=dtype))

    def loss() -> Tensor:
        fit = nn.functional.binary_cross_entropy_with_logits(
            inputs @ weight + bias, labels.to(dtype)
        )
        return fit + 5e-5 * weight.square().sum()

    return [weight, bias], loss


PROBLEMS = {"Rosenbrock": rosenbrock, "quadratic": quadratic, "logistic": cancer}
each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=[*PROBLEMS])


def closure_of(optimizer: Any, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def trained(make: Any, problem: Problem, steps: int, **options: Any) -> Any:
    params, loss = problem
    optimizer = make(params, **options)
    closure = closure_of(optimizer, loss)
    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


def values(optimizer: Any) -> list[Tensor]:
    return [param.detach().clone() for param in optimizer.param_groups[0]["params"]]


def state_of(optimizer: Any) -> dict[str, Any]:
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


def numbers(entry: Any) -> Tensor:
    """An entry of the state as one tensor."""
    if isinstance(entry, list):
        return torch.cat([torch.as_tensor(item).reshape(-1) for item in entry] or [torch.ones(0)])
    return torch.as_tensor(entry, dtype=torch.float64)


# torch as the twin


def test_signature_and_defaults_are_those_of_torch() -> None:
    for name in ("__init__", "step"):
        ours, theirs = (
            inspect.signature(getattr(cls, name)).parameters for cls in (LBFGS, torch.optim.LBFGS)
        )
        expected = [(p.name, p.kind, p.default) for p in theirs.values()]
        if name == "__init__" and "maximize" not in theirs:
            # torch has it from 2.14 on
            expected.append(("maximize", inspect.Parameter.KEYWORD_ONLY, False))
        assert [(p.name, p.kind, p.default) for p in ours.values()] == expected
    one, other = (make(rosenbrock()[0], max_iter=9) for make in (LBFGS, torch.optim.LBFGS))
    assert one.defaults == {**other.defaults, "maximize": False}
    assert one.defaults["max_eval"] == 11
    apart = ("params", "maximize")
    groups = [{k: v for k, v in o.param_groups[0].items() if k not in apart} for o in (one, other)]
    assert groups[0] == groups[1]


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one iteration a step": {"max_iter": 1},
    "no iteration": {"max_iter": 0},
    "few evaluations": {"max_eval": 3},
    "one evaluation": {"max_eval": 1},
    "a short history": {"history_size": 3, "max_iter": 7},
    "a history of one": {"history_size": 1, "max_iter": 7},
    "a small rate": {"lr": 0.3},
    "a tensor for a rate": {"lr": torch.tensor(0.5, dtype=torch.float64)},
    "a large change ends a step": {"tolerance_change": 1e-2},
    "a large gradient ends a step": {"tolerance_grad": 0.3},
}


# in exact arithmetic; for longer, these losses tell apart what rounding alone made different
ALIKE: dict[str, tuple[Callable[[], Problem], int]] = {
    "Rosenbrock": (rosenbrock, 2),
    "quadratic": (lambda: quadratic(condition=100.0), 2),
    "logistic": (cancer, 2),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=[*OPTIONS])
@pytest.mark.parametrize(("problem", "steps"), ALIKE.values(), ids=[*ALIKE])
@each_search
def test_every_step_is_that_of_torch(
    problem: Callable[[], Problem], steps: int, options: dict[str, Any], search: dict[str, Any]
) -> None:
    if search and 1 in (options.get("max_iter"), options.get("max_eval")):
        pytest.skip("torch's search has a budget of one evaluation, and never moves")
    runs = []
    for make in (LBFGS, torch.optim.LBFGS):
        params, loss = problem()
        optimizer = make(params, **options, **search)
        closure = closure_of(optimizer, loss)
        said = [optimizer.step(closure).item() for _ in range(steps)]
        runs.append((optimizer, said, state_of(optimizer)))
    (ours, said, state), (theirs, expected, twin) = runs
    torch.testing.assert_close(said, expected, **CLOSE)
    torch.testing.assert_close(values(ours), values(theirs), **CLOSE)
    assert (state["n_iter"], state["func_evals"]) == (twin["n_iter"], twin["func_evals"])
    if twin["n_iter"]:
        assert state.keys() - {"inverse", "oldest", "resting"} == twin.keys() - {"al"}
        for key in ("old_dirs", "old_stps", "ro", "d", "prev_flat_grad", "H_diag", "prev_loss"):
            # a pair is a difference of gradients, which near the end are small
            torch.testing.assert_close(
                numbers(state[key]), numbers(twin[key]), rtol=1e-4, atol=1e-6
            )


def evaluations(make: Any, problem: Problem, target: float, **options: Any) -> int:
    """How many calls of the closure it takes to this loss."""
    params, loss = problem
    optimizer, losses = make(params, **options), [math.inf]

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        return value

    for _ in range(100):
        optimizer.step(closure)
        if min(losses) <= target:
            break
    return next(index for index, value in enumerate(losses) if value <= target)


@each_search
@pytest.mark.parametrize(("problem", "target"), [(rosenbrock, 1e-8), (cancer, 0.0426298)])
def test_no_more_evaluations_than_torch(
    problem: Callable[[], Problem], target: float, search: dict[str, Any]
) -> None:
    found, expected = (
        evaluations(make, problem(), target, **search) for make in (LBFGS, torch.optim.LBFGS)
    )
    assert found <= expected


@each_search
def test_no_more_evaluations_than_torch_where_the_condition_is_bad(search: dict[str, Any]) -> None:
    found, expected = (
        sum(evaluations(make, quadratic(seed=seed), 1e-2, **search) for seed in range(2))
        for make in (LBFGS, torch.optim.LBFGS)
    )
    # after 100 steps, runs whose roundings differ have little in common: chance decides by a few
    assert found <= 1.02 * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_search_ends_where_losses_differ_by_rounding_alone(dtype: torch.dtype) -> None:
    params, loss = cancer(dtype)
    never = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
    optimizer = trained(LBFGS, (params, loss), 20, **never, **WOLFE)
    before = state_of(optimizer)["func_evals"]
    optimizer.step(closure_of(optimizer, loss))
    # the start, and two searches of a few trials
    assert state_of(optimizer)["func_evals"] - before <= 10


# The search, by its conditions


class Track(nn.Module):
    """A loss of one number."""

    def __init__(self, loss: Callable[[Tensor], Tensor], at: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([at], dtype=torch.float64))
        self.loss = loss
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        self.x.grad = None
        value = self.loss(self.x).sum()
        value.backward()
        return value.detach()


TRACKS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "a parabola": (lambda x: (x - 3) ** 2, 0.0),
    "steep": (lambda x: 1e6 * (x - 3) ** 2, 0.0),
    "flat": (lambda x: 1e-3 * (x - 300) ** 2, 0.0),
    "quartic": (lambda x: (x - 2) ** 4, -1.0),
    "waves": (lambda x: torch.sin(3 * x) + 0.1 * x**2, 0.0),
    "a pole": (lambda x: 1 / (5 - x) ** 2 - x + torch.where(x > 4.9, torch.nan, 0.0), 0.0),
    "a logarithm": (lambda x: x - 3 * torch.log(x), 0.1),
    "a kink": (lambda x: (x**2 + 1e-4).sqrt() + 0.1 * x, -1.0),
    "an exponential": (lambda x: torch.exp(x) - 5 * x, -3.0),
}


@pytest.mark.parametrize("first", [1e-6, 1e-2, 1.0, 7.0, 1e3, 1e8])
@pytest.mark.parametrize("name", TRACKS)
def test_the_point_of_a_search_satisfies_the_strong_wolfe_conditions(
    name: str, first: float
) -> None:
    track = Track(*TRACKS[name])
    begin = track.x.detach().clone()
    with torch.no_grad():
        objective = Objective([track.x], track)
        _, loss, grad = objective.evaluate()
        direction = -grad / grad.abs()
        slope = float(grad @ direction)
        line = Line(objective, direction, Point(0.0, loss, slope, grad), 1e-12)
        found = strong_wolfe(line, first, 100)
        line.move(found.t)
    at = track.x.detach().clone().requires_grad_()
    torch.testing.assert_close(at.detach(), begin + found.t * direction)
    value = track.loss(at).sum()
    (grad_there,) = torch.autograd.grad(value, at)
    value = value.detach()
    assert found.t > 0
    # four roundings of the loss at the start are allowed for
    assert float(value) <= loss + ARMIJO * found.t * slope + 1e-15 * abs(loss)
    assert abs(float(grad_there @ direction)) <= -CURVATURE * slope
    assert track.calls <= 1 + TRIALS


# The history, against dense matrices


def pairs_of(count: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(count)
    root = torch.randn(size, size, generator=draw, dtype=torch.float64)
    steps = torch.randn(count, size, generator=draw, dtype=torch.float64)
    return steps.to(dtype), (steps @ (root @ root.T + torch.eye(size).double())).to(dtype)


def learnt(steps: Tensor, changes: Tensor, limit: int) -> tuple[History, float]:
    history, scale = History(steps[0], limit), 0.0
    for s, y in zip(steps, changes, strict=True):
        before = torch.ones_like(y)
        # as a direction twice as long, of which half was gone
        scale = history.learn(2 * s, 0.5, before, before + y) or scale
    return history, scale


def dense_inverse(steps: Tensor, changes: Tensor, scale: float) -> Tensor:
    """Nocedal and Wright (6.17), pair by pair."""
    unit = torch.eye(steps.shape[1], dtype=torch.float64)
    inverse = scale * unit
    for s, y in zip(steps.double(), changes.double(), strict=True):
        away = unit - torch.outer(s, y) / (s @ y)
        inverse = away @ inverse @ away.T + torch.outer(s, s) / (s @ y)
    return inverse


@pytest.mark.parametrize(("count", "limit"), [(1, 5), (4, 5), (5, 5), (6, 5), (13, 5), (9, 1)])
def test_a_direction_is_a_product_with_the_inverse_hessian(count: int, limit: int) -> None:
    steps, changes = pairs_of(count, 12)
    history, scale = learnt(steps, changes, limit)
    grad = torch.linspace(-1, 1, 12, dtype=torch.float64)
    inverse = dense_inverse(steps[-limit:], changes[-limit:], scale)
    # the condition number of these is about 1e3
    torch.testing.assert_close(
        history.direction(grad, scale, None), -inverse @ grad, rtol=1e-9, atol=1e-9
    )
    listed = history.listed()
    torch.testing.assert_close(torch.stack(listed["old_stps"]), steps[-limit:])
    torch.testing.assert_close(torch.stack(listed["old_dirs"]), changes[-limit:])


def test_a_direction_in_float32_is_as_exact_as_the_recursion() -> None:
    steps, changes = pairs_of(40, 60, torch.float32)
    history, scale = learnt(steps, changes, 50)
    grad = torch.linspace(-1, 1, 60)
    exact = -dense_inverse(steps, changes, scale) @ grad.double()
    found = history.direction(grad, scale, None).double()
    # 40 pairs, each with a few sums of 60 terms of relative size 6e-8
    assert float((found - exact).norm() / exact.norm()) < 1e-5


def test_the_history_grows_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, changes = pairs_of(20, 6)
    grad = torch.ones(6, dtype=torch.float64)
    expected = learnt(steps, changes, 13)
    monkeypatch.setattr("stepwell.quasi_newton.history.ROOM", 2 * 6)
    found = learnt(steps, changes, 13)
    assert History(steps[0], 13).rows.shape[1] == 1
    assert torch.equal(
        found[0].direction(grad, found[1], None), expected[0].direction(grad, found[1], None)
    )


class Operations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


@pytest.mark.tiny
def test_no_operation_per_pair() -> None:
    counts = []
    for pairs in (3, 90):
        history, scale = learnt(*pairs_of(pairs, 100), 100)
        grad = torch.ones(100, dtype=torch.float64)
        with Operations() as operations:
            history.learn(grad, 1.0, torch.zeros_like(grad), grad)
            history.direction(grad, scale, None)
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_pairs_without_curvature_are_not_learnt() -> None:
    s = torch.tensor([1.0, 0.0])
    for y in ([0.0, 1.0], [-1.0, 0.0], [1e-11, 0.0], [math.nan, 0.0], [math.inf, 0.0], [3e38, 0.0]):
        history = History(s, 4)
        assert history.learn(s, 1.0, torch.zeros(2), torch.tensor(y)) is None
        assert history.count == 0
        assert not history.inverse.any()


# What is not finite


def well(params: list[Any], wall: float) -> Callable[[], Tensor]:
    """A parabola around 1 that is no number beyond a wall."""

    def loss() -> Tensor:
        total = sum(((param - 1) ** 2).sum() for param in params)
        far = max(float(param.detach().abs().max()) for param in params) > wall
        return total * (math.nan if far else 1.0)

    return loss


@each_search
@pytest.mark.parametrize("wall", [4.5, 4.0001, 40.0])
@pytest.mark.parametrize("lr", [1.0, 100.0, 1e30])
def test_a_search_turns_back_where_the_loss_is_no_number(
    search: dict[str, Any], wall: float, lr: float
) -> None:
    params = [nn.Parameter(torch.full((3,), -4.0)), nn.Parameter(torch.tensor(0.5))]
    loss = well(params, wall)
    before = loss().item()
    optimizer = LBFGS(params, lr=lr, max_iter=30, max_eval=30, **search)
    # from a rate of 1e30, a search takes half of the budget
    for _ in range(6):
        optimizer.step(closure_of(optimizer, loss))
    assert all(bool(param.isfinite().all()) for param in params)
    if search:
        assert loss().item() < 1e-3 * before


@each_search
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_start_that_is_not_finite_is_reported(
    search: dict[str, Any], bad: float, what: str
) -> None:
    params, loss = rosenbrock()
    optimizer = LBFGS(params, **search)
    optimizer.step(closure_of(optimizer, loss))
    before = snapshot(optimizer)

    def closure() -> Tensor:
        params[0].grad = torch.tensor([bad if what == "gradient" else 1.0, 1.0]).double()
        return torch.tensor(bad if what == "loss" else 1.0)

    error = refused(lambda: optimizer.step(closure))
    assert type(error) is RuntimeError
    assert f"the {what} must be finite where a step starts" in str(error)
    assert_same(snapshot(optimizer), before)
    optimizer.step(closure_of(optimizer, loss))


@each_search
def test_a_direction_without_a_finite_point_is_reported_once(search: dict[str, Any]) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = LBFGS([param], **search)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        param.grad = torch.ones(3)
        return torch.tensor(1.0 if len(calls) == 1 else math.nan)

    with pytest.warns(RuntimeWarning, match="not finite anywhere along") as caught:
        optimizer.step(closure)
    assert caught[0].filename == __file__
    assert torch.equal(param.detach(), torch.ones(3))
    # once with the rate, and once more with a cautious one
    assert len(calls) <= 1 + 2 * TRIALS
    calls.clear()
    optimizer.step(closure)
    assert torch.equal(param.detach(), torch.ones(3))


def test_a_history_that_misleads_is_dropped_and_the_gradient_followed() -> None:
    params, loss = quadratic(condition=10.0)
    optimizer = trained(LBFGS, (params, loss), 1, **WOLFE)
    for spoilt in (math.nan, math.inf, 1e300, -1.0):
        history = optimizer._history
        history.inverse[: history.count, : history.count] = spoilt
        before = loss().item()
        optimizer.step(closure_of(optimizer, loss))
        assert loss().item() < before or loss().item() < 1e-9
        assert bool(history.rows[:, : history.count].isfinite().all())


def test_a_last_move_to_infinity_is_taken_back() -> None:
    param = nn.Parameter(torch.tensor([3e38]))
    optimizer = LBFGS([param], lr=3e38, max_iter=1)

    def closure() -> Tensor:
        param.grad = torch.full((1,), -1.0)
        return torch.tensor(0.0)

    with pytest.warns(RuntimeWarning, match="stay at the last finite point"):
        optimizer.step(closure)
    assert param.item() == pytest.approx(3e38)


def test_gradients_that_overflow_in_a_sum_are_followed() -> None:
    param = nn.Parameter(torch.full((4,), 2.0))
    optimizer = LBFGS([param], **WOLFE)

    def closure() -> Tensor:
        param.grad = 1e38 * param.detach()
        return 1e37 * param.detach().square().sum()

    optimizer.step(closure)
    assert float(param.detach().abs().max()) < 2.0


# Interruptions


@each_search
@pytest.mark.parametrize("when", [1, 2, 3, 5])
def test_a_closure_that_raises_leaves_the_best_point(search: dict[str, Any], when: int) -> None:
    params, loss = rosenbrock()
    optimizer = LBFGS(params, lr=5.0 if search else 1.0, **search)
    seen: dict[float, list[float]] = {}

    def closure() -> Tensor:
        if len(seen) == when - 1:
            raise KeyboardInterrupt
        value = closure_of(optimizer, loss)()
        seen[value.item()] = params[0].detach().tolist()
        return value

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    if search and when <= 3:
        # all of the first search
        assert params[0].detach().tolist() == seen.get(min(seen, default=0.0), [-1.2, 1.0])
    assert params[0].detach().tolist() in [[-1.2, 1.0], *seen.values()]
    assert state_of(optimizer).get("func_evals", 0) == (when - 1 if when > 1 else 0)
    for _ in range(8):
        optimizer.step(closure_of(optimizer, loss))
    assert loss().item() < 1e-6


def test_a_closure_must_be_there_and_return_the_loss() -> None:
    params, _ = rosenbrock()
    optimizer = LBFGS(params)
    assert type(refused(optimizer.step)) is TypeError
    assert "needs a closure" in str(refused(lambda: optimizer.step(None)))
    before = snapshot(optimizer)
    found = refused(lambda: optimizer.step(lambda: None))
    assert type(found) is TypeError
    assert "the closure must return the loss, got None" in str(found)
    assert_same(snapshot(optimizer), before)
    assert optimizer.step(lambda: 3.5) == 3.5


# Parameters of all kinds


KINDS: dict[str, tuple[Callable[[], list[Tensor]], float]] = {
    "matrices": (lambda: [torch.ones(3, 4), torch.ones(2)], 1e-8),
    "a number": (lambda: [torch.tensor(5.0)], 1e-8),
    "complex": (lambda: [torch.ones(3, dtype=torch.complex128), torch.ones(2)], 1e-8),
    "transposed": (lambda: [torch.ones(4, 3).T, torch.ones(2, 3, 4)[:, ::2]], 1e-8),
    "empty": (lambda: [torch.ones(0, 3), torch.ones(2), torch.ones(0)], 1e-8),
    # numbers around 1 and 2 are rounded by 2^-9 and 2^-12 of themselves
    "bfloat16": (lambda: [torch.ones(3, dtype=torch.bfloat16)], 1e-3),
    "float16": (lambda: [torch.ones(3, dtype=torch.float16), torch.ones(2)], 1e-4),
}


@each_search
@pytest.mark.parametrize(("make", "limit"), KINDS.values(), ids=[*KINDS])
def test_kinds_of_parameters(
    make: Callable[[], list[Tensor]], limit: float, search: dict[str, Any]
) -> None:
    params = [nn.Parameter(tensor) for tensor in make()]
    shapes = [(p.shape, p.dtype, p.stride()) for p in params]

    def loss() -> Tensor:
        parts = [torch.view_as_real(p) if p.is_complex() else p for p in params]
        scaled = [(1 + i) * (x.double() - 0.3 - i) for i, x in enumerate(parts)]
        return torch.stack([x.square().sum() for x in scaled]).sum()

    optimizer = LBFGS(params, **search)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, loss))
    assert loss().item() < limit
    assert [(p.shape, p.dtype, p.stride()) for p in params] == shapes


def test_complex_parameters_move_as_those_of_torch() -> None:
    runs = []
    for make in (LBFGS, torch.optim.LBFGS):
        param = nn.Parameter(torch.tensor([1 + 2j, -1.5j], dtype=torch.complex128))
        target = torch.tensor([3 - 1j, 0.5 + 1j])
        optimizer = make([param], max_iter=4)
        optimizer.step(closure_of(optimizer, lambda p=param, t=target: (p - t).abs().pow(3).sum()))
        runs.append(param.detach())
    torch.testing.assert_close(*runs)


def test_sparse_gradients_are_made_dense_and_absent_ones_are_zero() -> None:
    table, absent = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.ones(2))
    optimizer = LBFGS([table.weight, absent], **WOLFE)
    start = table.weight.detach().clone()
    rows = torch.tensor([1, 3])
    optimizer.step(closure_of(optimizer, lambda: (table(rows) - 2).square().sum()))
    moved = (table.weight.detach() - start).abs().sum(1) > 0
    assert moved.tolist() == [False, True, False, True, False]
    torch.testing.assert_close(table(rows).detach(), torch.full((2, 2), 2.0))
    assert torch.equal(absent.detach(), torch.ones(2))
    nothing = nn.Parameter(torch.ones(0))
    assert LBFGS([nothing]).step(lambda: torch.tensor(4.0)).item() == 4.0


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_moves_once() -> None:
    runs = []
    for times in (1, 2):
        params, loss = rosenbrock()
        optimizer = LBFGS(params * times)
        optimizer.step(closure_of(optimizer, loss))
        runs.append(params[0].detach())
    assert torch.equal(*runs)


@each_search
def test_frozen_parameters_rest_and_the_others_go_on_as_if_they_were_alone(
    search: dict[str, Any],
) -> None:
    """Before, while and after some are frozen: each time as torch's, made for those that learn."""
    options = {"lr": 1.0 if search else 0.05, "max_iter": 5, "history_size": 10, **search}
    params, loss = quadratic(condition=10.0)
    ours = LBFGS(params, **options)
    for learning in (params, params[:1], params, params[1:]):
        freeze(params)
        unfreeze(learning)
        start = [param.detach().clone() for param in params]
        trained(torch.optim.LBFGS, (learning, loss), 2, **options)
        expected = values(ours)
        with torch.no_grad():
            torch._foreach_copy_(params, start)
        closure = closure_of(ours, loss)
        for _ in range(2):
            ours.step(closure)
        for param, was, found in zip(params, start, expected, strict=True):
            assert torch.equal(param, was) != param.requires_grad
            torch.testing.assert_close(param.detach(), found, **CLOSE)


def test_frozen_parameters_rest_where_a_history_is_loaded_in_which_they_moved() -> None:
    params, loss = quadratic(condition=10.0)
    saved = trained(LBFGS, (params, loss), 2, max_iter=5, **WOLFE).state_dict()
    freeze(params[1:])
    start = [param.detach().clone() for param in params]
    resumed = LBFGS(params)
    resumed.load_state_dict(saved)
    before = loss().item()
    resumed.step(closure_of(resumed, loss))
    assert torch.equal(params[1], start[1])
    assert loss().item() < before


@pytest.mark.parametrize("rests", [(False, True), (True, False), (True, True)])
def test_who_rests_is_saved_with_the_history(rests: tuple[bool, bool]) -> None:
    """Frozen, or woken, on the other side of a load: to the bits of the run that goes on."""
    found = []
    for is_resumed in (False, True):
        params, loss = quadratic(condition=10.0)
        optimizer = LBFGS(params, max_iter=5, **WOLFE)
        for resting in rests:
            (freeze if resting else unfreeze)(params[1:])
            optimizer.step(closure_of(optimizer, loss))
            if is_resumed:
                # what the optimizer has been through since it was saved is forgotten
                saved = optimizer.state_dict()
                start = [param.detach().clone() for param in params]
                (unfreeze if resting else freeze)(params[1:])
                optimizer.step(closure_of(optimizer, loss))
                optimizer.load_state_dict(saved)
                with torch.no_grad():
                    torch._foreach_copy_(params, start)
        found.append((values(optimizer), optimizer.state_dict()["state"]))
    assert_same(*found)


def test_parameters_that_others_change_between_steps() -> None:
    params, loss = quadratic(condition=10.0)
    optimizer = trained(LBFGS, (params, loss), 1, max_iter=4, **WOLFE)
    with torch.no_grad():
        params[0].add_(3.0)
        params[1].zero_()
    closure = closure_of(optimizer, loss)
    for _ in range(20):
        optimizer.step(closure)
    assert loss().item() < 1e-9


# Refusals


def test_groups_are_refused_in_the_words_of_torch() -> None:
    one, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = lambda: [{"params": [one]}, {"params": [other]}]  # noqa: E731
    expected = refused(lambda: torch.optim.LBFGS(groups()))
    optimizer = LBFGS([one])
    doors = (lambda: LBFGS(groups()), lambda: optimizer.add_param_group({"params": [other]}))
    for door in doors:
        found = refused(door)
        assert type(found) is type(expected)
        assert str(found).startswith(str(expected))
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups.append(optimizer.param_groups[0])
    assert "Expected exactly one param_group, but got 2" in str(
        refused(lambda: optimizer.step(lambda: 1.0))
    )


BAD_VALUES = [
    ("lr", -1.0, "Invalid learning rate: -1.0"),
    ("lr", math.nan, "Invalid learning rate: nan"),
    ("max_iter", -1, "max_iter must be a whole number in"),
    ("max_iter", 2.5, "max_iter must be"),
    ("max_eval", -3, "max_eval must be"),
    ("tolerance_grad", math.nan, "tolerance_grad must be"),
    ("tolerance_change", math.nan, "tolerance_change must be a number in [-inf, inf]"),
    ("history_size", 0, "history_size must be"),
    ("line_search_fn", "weak_wolfe", "only 'strong_wolfe' is supported"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD_VALUES)
def test_values_that_are_refused(name: str, value: Any, words: str) -> None:
    param = nn.Parameter(torch.ones(2))
    assert words in str(refused(lambda: LBFGS([param], **{name: value})))
    optimizer = LBFGS([param])
    assert words in str(refused(lambda: optimizer.param_groups[0].update({name: value})))


def test_what_is_no_vector_of_reals_is_refused_at_the_door() -> None:
    whole = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    elsewhere = nn.Parameter(torch.ones(2, device="meta"))
    assert "must be floating point or complex" in str(refused(lambda: LBFGS([whole])))
    assert "on one device, got cpu and meta (LBFGS, group 0)" in str(
        refused(lambda: LBFGS([nn.Parameter(torch.ones(2)), elsewhere]))
    )


# Copies and checkpoints


def by_state_dict(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = [nn.Parameter(value) for value in values(optimizer)]
    twin = LBFGS(params, history_size=2)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


def by_pickle(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


WAYS = {"state_dict": by_state_dict, "pickle": by_pickle, "deepcopy": copy.deepcopy}


def loss_of(params: list[Tensor]) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        x = torch.cat([param.reshape(-1) for param in params])
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    return loss


def walk(optimizer: Any, steps: int) -> None:
    closure = closure_of(optimizer, loss_of(optimizer.param_groups[0]["params"]))
    for _ in range(steps):
        optimizer.step(closure)


def begun(make: Any = LBFGS, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    params = [nn.Parameter(torch.full(shape, 0.2, dtype=dtype)) for shape in ((2, 3), (4,))]
    return make(params, **{"max_iter": 5, **options})


@each_search
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("way", WAYS.values(), ids=[*WAYS])
def test_a_copy_goes_on_to_the_same_bits(way: Any, steps: int, search: dict[str, Any]) -> None:
    # five pairs at most: after four steps the oldest has left
    optimizer = begun(history_size=5, **search)
    walk(optimizer, steps)
    twin = way(optimizer)
    for trained_ in (optimizer, twin):
        walk(trained_, 3)
    assert_same(values(twin), values(optimizer))
    assert_same(twin.state_dict(), optimizer.state_dict())


def test_what_is_saved_does_not_change_and_has_no_spare_rows() -> None:
    optimizer = begun(max_iter=3)
    walk(optimizer, 1)
    saved, size = optimizer.state_dict(), len(pickle.dumps(optimizer.state_dict()))
    kept = copy.deepcopy(saved)
    walk(optimizer, 5)
    assert_same(saved["state"][0]["old_dirs"], kept["state"][0]["old_dirs"])
    assert_same(saved["state"], kept["state"])
    # 100 x 100 numbers of the inverse; two pairs, which are small
    assert size < 8 * 100 * 100 + 30_000
    assert optimizer.state_bytes() >= 2 * 100 * 10 * 8


@pytest.mark.parametrize("names", [(LBFGS, torch.optim.LBFGS), (torch.optim.LBFGS, LBFGS)])
@pytest.mark.parametrize("history_size", [3, 100])
def test_state_goes_from_one_package_to_the_other_and_training_goes_on(
    names: tuple[Any, Any], history_size: int
) -> None:
    source = begun(names[0], history_size=history_size)
    walk(source, 2)
    target = begun(names[1], history_size=history_size)
    for param, value in zip(target.param_groups[0]["params"], values(source), strict=True):
        param.data.copy_(value)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for optimizer in (source, target):
        walk(optimizer, 1)
    torch.testing.assert_close(values(target), values(source), rtol=1e-6, atol=1e-8)
    # and back, with what ours had kept beside torch's entries
    again = begun(names[0], history_size=history_size)
    for param, value in zip(again.param_groups[0]["params"], values(target), strict=True):
        param.data.copy_(value)
    again.load_state_dict(copy.deepcopy(target.state_dict()))
    for optimizer in (source, again):
        walk(optimizer, 1)
    torch.testing.assert_close(values(again), values(source), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("limit", [2, 30])
def test_another_history_size_keeps_the_newest_pairs(limit: int) -> None:
    runs = []
    for make in (LBFGS, torch.optim.LBFGS):
        optimizer = begun(make, history_size=6)
        walk(optimizer, 3)
        if make is torch.optim.LBFGS:
            # torch forgets one pair per iteration, and has room for so many numbers
            state = state_of(optimizer)
            state.update({key: state[key][-limit:] for key in ("old_dirs", "old_stps", "ro")})
            state.pop("al")
        optimizer.param_groups[0]["history_size"] = limit
        walk(optimizer, 1)
        runs.append(values(optimizer))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-8)


def test_parameters_may_take_another_precision() -> None:
    optimizer = begun(dtype=torch.float32, **WOLFE)
    walk(optimizer, 2)
    for param in optimizer.param_groups[0]["params"]:
        param.data = param.data.double()
    walk(optimizer, 2)
    assert state_of(optimizer)["d"].dtype is torch.float64
    assert state_of(optimizer)["old_dirs"][0].dtype is torch.float64


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "vectors too short": lambda s: s.update(d=s["d"][:3]),
    "a pair too short": lambda s: s["old_dirs"].__setitem__(0, s["old_dirs"][0][:3]),
    "a pair of one number": lambda s: s["old_stps"].__setitem__(0, torch.ones(1)),
    "lists of different lengths": lambda s: s["ro"].pop(),
    "no direction": lambda s: s.pop("d"),
    "no tensor": lambda s: s.update(prev_flat_grad="x"),
    "no count": lambda s: s.pop("n_iter"),
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=[*HOSTILE])
def test_state_that_does_not_fit_is_refused(spoil: Callable[[dict[str, Any]], Any]) -> None:
    saved = begun()
    walk(saved, 2)
    spoilt = copy.deepcopy(saved.state_dict())
    spoil(spoilt["state"][0])
    optimizer = begun()
    walk(optimizer, 1)
    before = snapshot(optimizer)
    assert "LBFGS: " in str(refused(lambda: optimizer.load_state_dict(spoilt)))
    assert_same(snapshot(optimizer), before)
    walk(optimizer, 1)


def test_a_history_is_of_parameters_in_one_order() -> None:
    def named(names: str) -> Any:
        return LBFGS([(name, nn.Parameter(torch.ones(2))) for name in names])

    saved = named("ab")
    walk(saved, 1)
    named("ab").load_state_dict(saved.state_dict())
    assert "in this order" in str(refused(lambda: named("ba").load_state_dict(saved.state_dict())))


# The benchmark


@each_search
def test_the_benchmark_counts_as_we_do(search: dict[str, Any]) -> None:
    name = next(name for name, options in SEARCHES.items() if options is search)
    row = next(d for d in DESCENTS if str(d) == f"LBFGS Rosenbrock, {name}")
    found = row.measure(rounds=1)
    for package, make in (("stepwell", LBFGS), ("torch", torch.optim.LBFGS)):
        expected = evaluations(make, rosenbrock(), row.target, **search)
        assert found.evaluations[package] == expected
        assert found.medians[package] > 0
    assert not any("evaluations" in missed for missed in found.misses())
    assert any(
        "evaluations" in m
        for m in replace(found, evaluations={"stepwell": 63, "torch": 62}).misses()
    )
    assert descents_table([found]).row_count == 1
    assert saved(found)["evaluations"] == found.evaluations


# The shell


def test_hooks_schedules_and_rates() -> None:
    optimizer = begun(lr=1.0, max_iter=2, max_eval=10)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for rate in (1.0, 0.5, 0.25):
        walk(optimizer, 1)
        schedule.step()
        assert state_of(optimizer)["t"] == rate
    assert calls == ["before", "after"] * 3


def test_a_rate_of_zero_moves_nothing() -> None:
    for search in SEARCHES.values():
        optimizer = begun(lr=0.0, **search)
        before = values(optimizer)
        walk(optimizer, 2)
        assert_same(values(optimizer), before)


def test_a_step_in_inference_mode_can_be_followed_by_one_outside() -> None:
    optimizer = begun(**WOLFE)
    with torch.inference_mode():
        walk(optimizer, 1)
    walk(optimizer, 1)
    assert not state_of(optimizer)["d"].is_inference()


def test_no_warning_in_a_plain_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = trained(LBFGS, rosenbrock(torch.float32), 30, **WOLFE)
    torch.testing.assert_close(values(optimizer)[0], torch.ones(2), rtol=1e-3, atol=1e-3)


def test_tolerances_below_zero_end_no_step_before_its_iterations() -> None:
    """Not even where there is no slope; torch divides by it, and goes on from NaN."""
    many = {"max_iter": 7, "max_eval": 1000}
    endless = {"tolerance_grad": -math.inf, "tolerance_change": -math.inf, **many}
    calls = {}
    for name, options in (("endless", endless), ("usual", many)):
        param = nn.Parameter(torch.tensor([2.0]))
        optimizer = LBFGS([param], lr=0.5, **options)
        optimizer.step(closure_of(optimizer, lambda p=param: (p * 1e-9).sum()))
        calls[name] = state_of(optimizer)["n_iter"]
    assert calls == {"endless": 7, "usual": 0}
    for search in (None, "strong_wolfe"):
        flat = nn.Parameter(torch.zeros(2))
        optimizer = LBFGS([flat], line_search_fn=search, **endless)
        optimizer.step(closure_of(optimizer, lambda p=flat: (p * p).sum()))
        assert torch.equal(flat, torch.zeros(2))


def test_a_state_without_iterations_is_loaded_as_it_is() -> None:
    optimizers = [LBFGS([nn.Parameter(torch.ones(2))], tolerance_grad=math.inf) for _ in range(2)]
    for optimizer in optimizers[:1]:
        (param,) = optimizer.param_groups[0]["params"]
        optimizer.step(closure_of(optimizer, lambda p=param: (p * p).sum()))
    one, other = optimizers
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
    assert one.state_dict()["state"] == {0: {"func_evals": 1, "n_iter": 0}}
