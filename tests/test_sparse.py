"""Sparse gradients: numbers, rows that are left alone, what is refused - and SparseAdam's shell.

The references are torch's classes, which are written apart from our formulas. Both round a few
times per step, so that a few dozen steps may part by as many ULP.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepwell
from benchmarks.sparse import Embedding, saved
from stepwell.language import unset

from .cases import Case, named, numbers
from .compare import assert_same_bits, assert_same_training, assert_training_within, backends
from .shell_cases import refused

# torch warns that it does not look at indices; we do
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

STEPS = 24
LIMIT = 64
FLOATS = (torch.float32, torch.float64)
# rows, rows of rows, rows in two dimensions, single numbers
SHAPES = ((50, 7), (9, 4, 3), (5, 6, 2), (40,))
SPARSE_DIMS = (1, 1, 2, 1)


def case(name: str, **options: Any) -> Case:
    words = ", ".join(f"{key}={value}" for key, value in options.items())
    return Case(f"{name}({words})", *(getattr(m, name) for m in (stepwell, torch.optim)), options)


SPARSE_ADAM = case("SparseAdam", lr=0.02)
CASES = (
    SPARSE_ADAM,
    # eps so large that a misplaced one would be seen
    case("SparseAdam", lr=0.02, betas=(0.8, 0.95), eps=1e-2),
    case("SparseAdam", lr=torch.tensor(0.02), maximize=True),
    case("SGD", lr=0.1),
    case("SGD", lr=0.1, momentum=0.9, nesterov=True),
    case("SGD", lr=0.1, maximize=True),
    case("Adagrad", lr=0.1),
    case("Adagrad", lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2, maximize=True),
)
IDLE = tuple(case for case in CASES if "momentum" not in case.options)


def sparse(
    shape: Sequence[int], step: int, dtype: torch.dtype, dims: int = 1, *, count: int | None = None
) -> Tensor:
    """A gradient whose rows repeat, now and then coalesced, or without any row."""
    draw = torch.Generator().manual_seed(17 * step + len(shape))
    count = (5, 0, 12, 1)[step % 4] if count is None else count
    indices = [torch.randint(0, max(size, 1), (count,), generator=draw) for size in shape[:dims]]
    values = numbers((count, *shape[dims:]), dtype, 31 * step)
    grad = torch.sparse_coo_tensor(torch.stack(indices), values, shape, check_invariants=True)
    return grad.coalesce() if step % 3 == 2 else grad


def parameters(dtype: torch.dtype, shapes: Sequence[Sequence[int]] = SHAPES) -> list[Any]:
    return [nn.Parameter(numbers(shape, dtype, i)) for i, shape in enumerate(shapes)]


def give(params: Sequence[Tensor], step: int) -> None:
    for i, (param, dims) in enumerate(zip(params, SPARSE_DIMS, strict=False)):
        # now one, now the other has none
        missing = step % 5 == i
        param.grad = None if missing else sparse(param.shape, step + i, param.dtype, dims)


def trained(
    make: Callable[..., Any], dtype: torch.dtype = torch.float32, steps: int = STEPS, **more: Any
) -> Any:
    params = parameters(dtype)
    optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], **more)
    for step in range(steps):
        give(params, step)
        optimizer.step()
    return optimizer


# Numbers


@pytest.mark.parametrize("dtype", **named(FLOATS))
@pytest.mark.parametrize("case", **named(CASES))
def test_numbers(case: Case, dtype: torch.dtype) -> None:
    ours, theirs = trained(case.make, dtype), trained(case.make_twin, dtype)
    if "momentum" in case.options:
        # torch's momentum is a sparse tensor here
        ours.state, theirs.state = {}, {}
    else:
        assert backends(ours) == {"cpu"}
    for state in theirs.state.values():
        state["step"] = torch.tensor(float(state["step"]))
    # torch computes the rate, a float32 tensor, in float32
    rounded = dtype is torch.float64 and isinstance(case.options["lr"], Tensor)
    assert_training_within(ours, theirs, 2**30 if rounded else LIMIT, case.name)


@pytest.mark.tiny
@pytest.mark.parametrize("case", **named(CASES[:1]))
def test_plain_numbers(case: Case) -> None:
    test_numbers(case, torch.float32)


@pytest.mark.parametrize("dtype", **named((torch.float32, torch.bfloat16, torch.float16)))
@pytest.mark.parametrize("case", **named(IDLE))
def test_compiled_code_does_what_the_reference_does(case: Case, dtype: torch.dtype) -> None:
    # few steps: what half precision rounds the other way once stays an ULP apart, or grows
    compiled, eager = (trained(case.make, dtype, 6, **more) for more in ({}, {"fused": False}))
    assert (backends(compiled), backends(eager)) == ({"cpu"}, {"eager"})
    assert_training_within(compiled, eager, 4, case.name)


def test_rows_that_are_longer_than_a_block() -> None:
    found = []
    for rule in (stepwell.SparseAdam, torch.optim.SparseAdam):
        param = nn.Parameter(numbers((6, 17_000), torch.float32, 0))
        optimizer = rule([param], lr=0.1)
        for step in range(2):
            param.grad = sparse((6, 17_000), 2, torch.float32, count=4 + step)
            optimizer.step()
        found.append(param.detach())
    torch.testing.assert_close(*found)


def test_complex_gradients() -> None:
    def walked(library: Any) -> Any:
        param = nn.Parameter(numbers((9, 3), torch.complex64, 0))
        optimizer = library.SGD([param], lr=0.1)
        for step in range(8):
            param.grad = sparse((9, 3), step, torch.complex64)
            if step % 2:
                param.grad = param.grad.conj()
            optimizer.step()
        return optimizer

    ours = walked(stepwell)
    assert backends(ours) == {"cpu"}
    assert_training_within(ours, walked(torch.optim), LIMIT, "complex rows")


def test_repetitions_are_added_up_before_the_update() -> None:
    """The closed form: in the first step of Adam only the sign of a gradient counts."""
    param = nn.Parameter(torch.zeros(4, 1, dtype=torch.float64))
    values = torch.tensor([[2.0], [1.0], [-3.0], [5.0], [-3.0]], dtype=torch.float64)
    given = torch.sparse_coo_tensor([[3, 1, 3, 3, 1]], values, (4, 1), check_invariants=True)
    param.grad = given
    optimizer = stepwell.SparseAdam([param], lr=0.5, eps=1e-30)
    optimizer.step()
    assert param.flatten().tolist() == pytest.approx([0, 0.5, 0, -0.5])
    expected = [0, -0.2, 0, 0.4]
    assert optimizer.state[param]["exp_avg"].flatten().tolist() == pytest.approx(expected)
    # the gradient is left as it was given
    assert param.grad is given
    assert torch.equal(given._values(), values)
    assert not given.is_coalesced()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("case", **named(CASES))
def test_a_gradient_that_says_it_is_coalesced_and_is_not(case: Case, fused: bool | None) -> None:
    """Told by its rows, in every step: they are added up as those of one that says the truth."""
    found = []
    for lies in (True, False):
        params = [nn.Parameter(numbers((6, *tail), torch.float32, 0)) for tail in ((3,), (2, 3))]
        optimizer = case.make(params, fused=fused)
        for step in range(3):
            order = [4, 1, 1, 4, 0] if step % 2 else [0, 1, 4, 4, 5]
            for param, dims in zip(params, (1, 2), strict=True):
                indices = torch.tensor([order, [1] * 5][:dims])
                values = numbers((5, 3), torch.float32, step)
                param.grad = torch.sparse_coo_tensor(
                    indices, values, param.shape, is_coalesced=lies, check_invariants=False
                )
            optimizer.step()
        found.append(optimizer)
    assert_same_training(*found, case.name)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("case", **named(IDLE))
def test_rows_that_are_absent_are_not_touched(case: Case, fused: bool | None) -> None:
    param = nn.Parameter(numbers((50, 7), torch.float32, 0))
    optimizer = case.make([param], fused=fused)
    optimizer.init_state()
    present = torch.zeros(50, dtype=torch.bool)
    present[[3, 8, 8, 49]] = True
    tensors = [param.detach()]
    tensors += [t for t in optimizer.state.get(param, {}).values() if t.shape == param.shape]
    for tensor in tensors:
        # whatever is computed from these is seen
        tensor[~present] = torch.nan
    before = [tensor.clone() for tensor in tensors]
    values = numbers((4, 7), torch.float32, 1)
    param.grad = torch.sparse_coo_tensor([[8, 3, 8, 49]], values, (50, 7), check_invariants=True)
    optimizer.step()
    for tensor, old in zip(tensors, before, strict=True):
        assert_same_bits(tensor[~present], old[~present], "absent rows")
        assert tensor[present].isfinite().all()
        assert not (tensor[present] == old[present]).all(1).any()


def test_a_gradient_without_rows_is_a_step() -> None:
    param = nn.Parameter(torch.ones(5, 2))
    optimizer = stepwell.SparseAdam([param])
    param.grad = sparse((5, 2), 0, torch.float32, count=0)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1
    assert torch.equal(param, torch.ones(5, 2))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0,)])
def test_empty_parameters(shape: tuple[int, ...]) -> None:
    param = nn.Parameter(torch.ones(shape))
    optimizer = stepwell.SparseAdam([param])
    for _ in range(2):
        param.grad = sparse(shape, 0, torch.float32, count=0)
        optimizer.step()
    assert optimizer.state[param]["step"] == 2


@pytest.mark.parametrize("fused", [None, False])
def test_the_whole_tensor_as_one_row(fused: bool | None) -> None:
    """A sparse tensor may have no sparse dimension: its one row is all of it."""
    param, twin = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    values = numbers((2, 3, 2), torch.float32, 0)
    none = torch.zeros(0, 2, dtype=torch.int64)
    param.grad = torch.sparse_coo_tensor(none, values, (3, 2), check_invariants=True)
    twin.grad = values.sum(0)
    stepwell.SGD([param], lr=0.5, fused=fused).step()
    torch.optim.SGD([twin], lr=0.5).step()
    torch.testing.assert_close(param, twin)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            param = nn.Parameter(numbers((5000, 33), torch.float32, 0))
            optimizer = stepwell.SparseAdam([param], lr=0.1)
            for step in range(3):
                param.grad = sparse((5000, 33), step, torch.float32, count=3000)
                optimizer.step()
            found.append(optimizer)
    finally:
        torch.set_num_threads(before)
    assert_same_training(*found, "threads")


def test_parameters_whose_rows_are_no_stretches_of_memory() -> None:
    def walked(library: Any) -> Any:
        param = nn.Parameter(numbers((7, 50), torch.float32, 0).t())
        optimizer = library.SparseAdam([param], lr=0.1)
        for step in range(6):
            param.grad = sparse((50, 7), step, torch.float32)
            optimizer.step()
        for state in optimizer.state.values():
            state["step"] = torch.as_tensor(float(state["step"]))
        return optimizer

    ours = walked(stepwell)
    assert backends(ours) == {"eager"}
    assert_training_within(ours, walked(torch.optim), LIMIT, "a transposed parameter")


def test_indices_and_values_that_lie_apart() -> None:
    indices = torch.tensor([[4, 0], [1, 0], [4, 0]]).t()[:1]
    values = numbers((2, 3), torch.float32, 0).t()
    results = []
    for rule in (stepwell.SGD, torch.optim.SGD):
        param = nn.Parameter(torch.ones(5, 2))
        param.grad = torch.sparse_coo_tensor(indices, values, (5, 2), check_invariants=True)
        rule([param], lr=0.5).step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


def test_gradients_that_change_their_layout() -> None:
    def walked(library: Any) -> Any:
        params = [nn.Parameter(numbers((9, 3), torch.float32, i)) for i in range(2)]
        optimizer = library.Adagrad(params, lr=0.1)
        for step in range(8):
            for i, param in enumerate(params):
                grad = sparse((9, 3), step, torch.float32)
                param.grad = grad.to_dense() if (step + i) % 3 == 0 else grad
            optimizer.step()
        return optimizer

    assert_training_within(walked(stepwell), walked(torch.optim), LIMIT, "layouts")


@pytest.mark.parametrize("name", ["SparseAdam", "SGD", "Adagrad"])
def test_an_embedding_trains_as_with_torch(name: str) -> None:
    results = []
    for library in (stepwell, torch.optim):
        torch.manual_seed(0)
        model = nn.Embedding(20, 4, sparse=True, padding_idx=0)
        optimizer = getattr(library, name)(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        for step in range(9):
            optimizer.zero_grad()
            words = torch.randint(0, 20, (6,), generator=torch.Generator().manual_seed(step))
            (model(words) ** 2).sum().backward()
            optimizer.step()
            scheduler.step()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("coalesced", [True, False])
def test_a_loss_scaler_inside_the_step(coalesced: bool) -> None:
    """The gradient is divided by the scale; one that overflowed is no step."""
    plain, scaled = (nn.Parameter(numbers((9, 3), torch.float32, 0)) for _ in range(2))
    ours = stepwell.SparseAdam([scaled], lr=0.1, fused=True)
    theirs = torch.optim.SparseAdam([plain], lr=0.1)
    ours.grad_scale = torch.tensor(8.0)
    for step, found in enumerate((0.0, 1.0, 0.0)):
        grad = sparse((9, 3), step, torch.float32, count=6)
        grad = grad.coalesce() if coalesced else grad
        scaled.grad, plain.grad = grad * 8, grad.clone()
        ours.found_inf = torch.tensor(found)
        ours.step()
        if not found:
            theirs.step()
            torch.testing.assert_close(scaled.grad.to_dense(), grad.to_dense())
    assert backends(ours) == {"cpu"}
    torch.testing.assert_close(scaled, plain)


# What is refused


OTHERS = ("Adadelta", "Adafactor", "Adam", "AdamW", "Adamax", "ASGD", "Muon", "NAdam", "RAdam")


@pytest.mark.parametrize("name", [*OTHERS, "RMSprop", "Rprop"])
def test_other_rules_say_what_to_use_instead(name: str) -> None:
    said = []
    for library in (stepwell, torch.optim):
        param = nn.Parameter(torch.ones(5, 2))
        param.grad = sparse((5, 2), 0, torch.float32)
        said.append(str(refused(getattr(library, name)([param]).step)))
        assert torch.equal(param, torch.ones(5, 2))
    ours, theirs = said
    # torch's AdamW calls itself Adam, and what its Muon runs into is no word about the gradient
    if name not in ("AdamW", "Muon"):
        assert ours.startswith(theirs)
    assert f"{name} does not support sparse gradients" in ours
    assert "SparseAdam" in ours
    assert "group 0, parameter 0" in ours


@pytest.mark.parametrize("later", [False, True])
def test_dense_gradients_are_refused(later: bool) -> None:
    params = parameters(torch.float32, [(5, 2), (4, 3)])
    optimizer = stepwell.SparseAdam(params)
    if later:
        for param in params:
            param.grad = sparse(param.shape, 0, torch.float32)
        optimizer.step()
        params[1].grad = None
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    params[0].grad = sparse((5, 2), 0, torch.float32)
    params[1].grad = torch.ones(4, 3)
    words = "SparseAdam does not support dense gradients, please consider Adam instead"
    said = str(refused(optimizer.step))
    assert said.startswith(words)
    assert "group 0, parameter 1" in said
    after = optimizer.state_dict()
    assert str(after) == str(before)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("index", [[[5], [0]], [[-1], [0]], [[0], [2]], [[0], [-(2**62)]]])
@pytest.mark.parametrize("case", **named(CASES[:5]))
def test_rows_that_do_not_exist(
    case: Case, index: list[list[int]], later: bool, fused: bool | None
) -> None:
    params = parameters(torch.float32, [(5, 2, 3), (5, 2, 3)])
    optimizer = case.make(params, fused=fused)
    if later:
        for param in params:
            param.grad = sparse((5, 2, 3), 0, torch.float32, 2)
        optimizer.step()
    before = [param.detach().clone() for param in params]
    params[0].grad = sparse((5, 2, 3), 0, torch.float32, 2)
    params[1].grad = torch.sparse_coo_tensor(
        index, torch.ones(1, 3), (5, 2, 3), check_invariants=False
    )
    said = str(refused(optimizer.step))
    assert f"index {next(i for [i] in index if i)} in dimension" in said
    assert said.startswith(f"{case.rule.__name__}: the gradient of group 0, parameter 1 has index")
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)


def test_parameters_that_are_sparse_or_complex() -> None:
    sparse_param = torch.ones(3, 2).to_sparse().requires_grad_()
    for param in (sparse_param, torch.ones(3, dtype=torch.complex64, requires_grad=True)):
        given = [torch.ones(2, requires_grad=True), param]
        theirs = refused(lambda given=given: torch.optim.SparseAdam(given))
        ours = refused(lambda given=given: stepwell.SparseAdam(given))
        assert type(ours) is type(theirs) is ValueError
        assert str(ours).startswith(str(theirs))
        optimizer = stepwell.SparseAdam([torch.ones(2, requires_grad=True)])
        said = str(refused(lambda o=optimizer, p=param: o.add_param_group({"params": p})))
        assert "at indices [[1, 0]]" in said
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": -1.0}, {"eps": 0.0}, {"betas": (1.0, 0)}])
def test_hyperparameters_in_torchs_words(options: dict[str, Any]) -> None:
    theirs = refused(lambda: torch.optim.SparseAdam([torch.ones(2)], **options))
    ours = refused(lambda: stepwell.SparseAdam([torch.ones(2)], **options))
    assert type(ours) is type(theirs)
    assert str(ours).startswith(str(theirs))


def test_a_schedule_may_begin_and_end_at_a_rate_of_zero() -> None:
    optimizer = stepwell.SparseAdam([torch.ones(2, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step % 3)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    optimizer.param_groups[0]["lr"] = 0.0
    stepwell.SparseAdam([torch.ones(2)], lr=0.1).load_state_dict(optimizer.state_dict())


def test_a_rule_for_sparse_gradients_has_state_from_the_start() -> None:
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        state.last = grad
        return param - grad

    body = {"__annotations__": {}, "last": unset(), "update": staticmethod(update)}
    with pytest.raises(TypeError, match=r"Own\.last: with sparse_only=True"):
        type("Own", (stepwell.Optimizer,), {**body, "sparse_only": True})
    assert type("Own", (stepwell.Optimizer,), body)


# State


def _step(optimizer: Any, step: int) -> None:
    give([p for group in optimizer.param_groups for p in group["params"]], step)
    optimizer.step()


def test_the_count_of_steps() -> None:
    ours, theirs = (trained(make, steps=3) for make in (SPARSE_ADAM.make, SPARSE_ADAM.make_twin))
    for optimizer, kind in ((ours, Tensor), (theirs, int)):
        assert all(isinstance(state["step"], kind) for state in optimizer.state.values())
        saved = optimizer.state_dict()["state"].values()
        assert [type(entry["step"]) for entry in saved] == [int] * 4


@pytest.mark.parametrize("dtype", **named(FLOATS))
@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0)])
def test_state_dicts_go_both_ways_and_on_exactly(
    source: int, target: int, dtype: torch.dtype
) -> None:
    """The library that takes over goes on to the bit as if it had been there from the start."""
    makes = (SPARSE_ADAM.make, SPARSE_ADAM.make_twin)
    saved = trained(makes[source], dtype, 7).state_dict()
    assert all(type(entry["step"]) is int for entry in saved["state"].values())
    entries = [(k, list(v)) for k, v in saved["state"].items()]
    own = trained(makes[target], dtype, 7)
    assert entries == [(k, list(v)) for k, v in own.state_dict()["state"].items()]

    taken = trained(makes[target], dtype, 0)
    taken.load_state_dict(copy.deepcopy(saved))
    straight = trained(makes[source], dtype, 7)
    for ours, theirs in ((taken, straight), (own, own)):
        if ours is not theirs:
            pairs = zip(*(o.param_groups for o in (ours, theirs)), strict=True)
            for one, other in pairs:
                for p, q in zip(one["params"], other["params"], strict=True):
                    p.data.copy_(q.data)
    for step in range(7, 19):
        _step(taken, step)
        _step(straight, step)
    for optimizer in (taken, straight):
        for state in optimizer.state.values():
            state["step"] = torch.tensor(float(state["step"]))
    # each library rounds in its own way
    assert_training_within(taken, straight, 32, "after the change")


def test_torch_goes_on_as_from_its_own_state_dict() -> None:
    """What we save is what torch would have saved, so that its next steps are the same bits."""
    ours = trained(SPARSE_ADAM.make, torch.float32, 7)
    results = []
    for count in (int, float):
        saved = copy.deepcopy(ours.state_dict())
        for entry in saved["state"].values():
            entry["step"] = count(entry["step"])
        theirs = trained(SPARSE_ADAM.make_twin, torch.float32, 0)
        theirs.load_state_dict(saved)
        _step(theirs, 7)
        results.append([p for group in theirs.param_groups for p in group["params"]])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one.detach(), other.detach(), "counts as ints")


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on(way: Callable[[Any], Any]) -> None:
    optimizer = trained(SPARSE_ADAM.make, torch.float32, 5)
    copied = way(optimizer)
    for step in range(5, 9):
        _step(optimizer, step)
        _step(copied, step)
    assert_same_training(copied, optimizer, "a copy")


def test_loaded_state_goes_on_to_the_bit() -> None:
    straight = trained(SPARSE_ADAM.make, torch.float32, 9)
    half = trained(SPARSE_ADAM.make, torch.float32, 5)
    params = [p for group in half.param_groups for p in group["params"]]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    resumed = stepwell.SparseAdam(groups)
    resumed.load_state_dict(pickle.loads(pickle.dumps(half.state_dict())))
    for step in range(5, 9):
        _step(resumed, step)
    assert_same_training(resumed, straight, "resumed")


# The benchmark


def test_the_benchmark_looks_at_numbers() -> None:
    raced = Embedding("SparseAdam", 100, 10).measure()
    assert not raced.misses()
    assert raced._replace(apart=float("nan")).misses() == ["nan away from torch"]
    assert saved(raced)["work"] == "SparseAdam sparse 100 x 64, 10 rows"
