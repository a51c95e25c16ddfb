"""Do the functions of stepwell.functional do what those of torch.optim.functional do?

Torch's classes call torch's functions. Here they call ours, with the arguments that torch gives:
the class then has to train as our class does, to the bit, and as torch's does, within rounding.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import stepwell
from stepwell import functional

from .cases import CASES, PLAIN, REQUESTS, Case, named, parameters, train
from .compare import assert_same_training, assert_training_within
from .test_parity import TASKS, Task, _assert_agree, trained

SHAPES = ((7,), (10, 6), ())
FUNCTIONS = {
    name: next(c for c in vars(stepwell).values() if getattr(c, "__name__", "").lower() == plain)
    for name in functional.__all__
    for plain in [name.replace("_", "")]
}
# where torch's class looks up its function, if that is not a module of the function's name
PLACES = {"adafactor": "_adafactor", "muon": "_muon", "sparse_adam": "_functional"}


def _put_in_place(monkeypatch: pytest.MonkeyPatch, rule: type[Any]) -> list[Mapping[str, Any]]:
    """Let torch's class of this name step with our function; the keywords of its calls."""
    name = next(name for name, one in FUNCTIONS.items() if one is rule)
    calls = []

    def function(*args: Any, **kwargs: Any) -> None:
        calls.append(kwargs)
        if name == "adamw":
            # torch's class calls adam
            assert kwargs.pop("decoupled_weight_decay")
        getattr(functional, name)(*args, **kwargs)

    place = "adam" if name == "adamw" else name
    module = importlib.import_module(f"torch.optim.{PLACES.get(place, place)}")
    monkeypatch.setattr(module, place, function)
    return calls


def test_each_of_torchs_functions_is_here() -> None:
    theirs = getattr(torch.optim, "functional", None)
    assert theirs is None or theirs.__all__ == functional.__all__
    assert len(functional.__all__) == 14
    for name, rule in FUNCTIONS.items():
        function = getattr(functional, name)
        assert function.__name__ == name
        assert f"`stepwell.{rule.__name__}`" in (inspect.getdoc(function) or "")


@pytest.mark.parametrize("case", **named(CASES))
def test_numbers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = train(case.make_twin, parameters(SHAPES, torch.float32), 3)
    ours = train(case.make, parameters(SHAPES, torch.float32), 3)
    calls = _put_in_place(monkeypatch, case.rule)
    found = train(case.make_twin, parameters(SHAPES, torch.float32), 3)
    assert len(calls) == 3
    assert_training_within(found, theirs, 64, case.name)
    assert_same_training(found, ours, case.name)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("case", **named(PLAIN))
def test_every_back_end(case: Case, request_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = REQUESTS[request_]
    fields = inspect.signature(case.twin).parameters if case.twin else {}
    options = {name: value for name, value in options.items() if name in fields}
    ours = train(lambda p: case.make(p, **options), parameters(SHAPES, torch.float64), 3)
    _put_in_place(monkeypatch, case.rule)
    found = train(lambda p: case.make_twin(p, **options), parameters(SHAPES, torch.float64), 3)
    assert_same_training(found, ours, case.name)


OTHERS = [task for task in TASKS if task.name in ("Muon", "SparseAdam")]


@pytest.mark.parametrize("task", **named(OTHERS))
def test_matrices_and_sparse_gradients(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = (trained(task, library, 3) for library in (torch.optim, stepwell))
    calls = _put_in_place(monkeypatch, getattr(stepwell, task.name))
    found = trained(task, torch.optim, 3)
    assert len(calls) == 3
    _assert_agree(task, found, theirs, "beside torch's")
    _assert_agree(task, found, ours, "beside ours")


# What a call does, and what it leaves alone

ADAMW: dict[str, Any] = {
    "amsgrad": False,
    "beta1": 0.9,
    "beta2": 0.99,
    "lr": 0.1,
    "weight_decay": 0.0,
    "eps": 1e-8,
    "maximize": False,
}
SGD: dict[str, Any] = {
    "weight_decay": 0.0,
    "momentum": 0.9,
    "lr": 0.5,
    "dampening": 0.0,
    "nesterov": False,
    "maximize": False,
}


def _lists(count: int = 2) -> list[list[Tensor]]:
    """Return the lists that adamw takes at the first step."""
    made: list[list[Tensor]] = [
        [torch.full((3,), v) for _ in range(count)] for v in (1.0, 0.5, 0.0, 0.0)
    ]
    return [*made, [], [torch.tensor(0.0) for _ in range(count)]]


def test_tensors_stay_where_they_are_and_nothing_else_changes() -> None:
    lists = _lists()
    params = lists[0] = [torch.nn.Parameter(param) for param in lists[0]]
    params[0].grad = held = torch.ones(3)
    before = [list(values) for values in lists]
    seen: list[Any] = []
    handle = stepwell.optimizer.register_optimizer_step_post_hook(lambda *args: seen.append(args))
    functional.adamw(*lists, **ADAMW)
    handle.remove()
    assert [[id(t) for t in values] for values in lists] == [[id(t) for t in v] for v in before]
    torch.testing.assert_close([p.detach() for p in params], [torch.full((3,), 0.9)] * 2)
    assert [step.item() for step in lists[-1]] == [1, 1]
    assert params[0].grad is held
    assert params[1].grad is None
    assert not seen


def test_a_first_momentum_is_put_into_the_list() -> None:
    params, grads, buffers = [torch.ones(2)], [torch.full((2,), 0.5)], [None]
    functional.sgd(params, grads, buffers, **SGD)
    assert torch.equal(buffers[0], grads[0])  # type: ignore[arg-type]
    assert buffers[0] is not grads[0]
    functional.sgd(params, grads, buffers, **SGD)
    assert torch.equal(params[0], torch.full((2,), 1 - 0.25 - 0.475))


def test_a_parameter_that_is_there_twice_moves_twice() -> None:
    param = torch.ones(2)
    functional.sgd([param, param], [torch.ones(2), torch.ones(2)], [None, None], **SGD)
    assert torch.equal(param, torch.zeros(2))


def test_no_parameters() -> None:
    functional.adamw([], [], [], [], [], [], **ADAMW)


def test_a_gradient_of_another_precision() -> None:
    param, grad = torch.ones(3), torch.full((3,), 0.5, dtype=torch.bfloat16)
    functional.sgd([param], [grad], [], **{**SGD, "momentum": 0.0})
    assert torch.equal(param, torch.full((3,), 0.75))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_what_a_scaler_asks_for(found: float) -> None:
    lists = _lists()
    lists[1] = [8 * grad for grad in lists[1]]
    scaling = {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(found)}
    functional.adamw(*lists, fused=True, **scaling, **ADAMW)
    expected = _lists()
    if not found:
        functional.adamw(*expected, **ADAMW)
    torch.testing.assert_close(lists[0], expected[0])
    assert [s.item() for s in lists[-1]] == [1 - found] * 2


def test_a_gradient_flows_through_a_differentiable_step() -> None:
    leaf, grad = (torch.ones(3, requires_grad=True) for _ in range(2))
    lists = _lists(1)
    param = leaf.clone()
    lists[0], lists[1] = [param], [grad]
    for _ in range(2):
        functional.adamw(*lists, differentiable=True, **{**ADAMW, "weight_decay": 0.5})
    param.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.full((3,), 0.95**2))
    assert grad.grad is not None
    with pytest.raises(RuntimeError, match=r"a leaf Variable that requires grad is being used"):
        functional.adamw([leaf], *_lists(1)[1:], differentiable=True, **ADAMW)


def test_a_step_of_sparse_adam_is_counted_by_the_caller() -> None:
    grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2), check_invariants=True)
    keywords = {key: ADAMW[key] for key in ("beta1", "beta2", "lr", "eps", "maximize")}
    params, moments = [torch.ones(3, 2)], [[torch.zeros(3, 2)] for _ in range(2)]
    # the count of the step lies where counts lie, whatever the default device
    with torch.device("meta"):
        functional.sparse_adam(params, [grad], *moments, [1], **keywords)
    torch.testing.assert_close(params[0], torch.tensor([[1.0, 1.0], [0.9, 0.9], [1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"sparse_adam: state_steps must count the step that is"):
        functional.sparse_adam(params, [grad], *moments, [0], **keywords)


# What is refused

WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a rate": (ValueError, "Invalid learning rate: -1", {"lr": -1}),
    "a missing rate": (TypeError, r"adamw\(\) missing a required .*argument: 'lr'", {"lr": None}),
    "a foreign keyword": (TypeError, r"adamw\(\) got an unexpected .*'rate'", {"rate": 1}),
    "counts": (
        RuntimeError,
        "API has changed, `state_steps` argument must contain a list of singleton tensors",
        {"state_steps": [0, 0]},
    ),
    "a short list": (
        ValueError,
        "adamw: exp_avgs must have one item for each of the 2 params, got 1",
        {"exp_avgs": [torch.zeros(3)]},
    ),
    "no list": (ValueError, "adamw: max_exp_avg_sqs is empty", {"amsgrad": True}),
    "a generator": (
        TypeError,
        "adamw: grads must be a list of Tensors, got generator",
        {"grads": (torch.ones(3) for _ in range(2))},
    ),
    "too few gradients": (ValueError, "adamw: grads must have one gradient", {"grads": []}),
    "no gradient": (
        TypeError,
        r"adamw: grads\[1\] must be a Tensor",
        {"grads": [torch.ones(3), None]},
    ),
    "a gradient's shape": (
        RuntimeError,
        r"adamw: grads\[0\] must be like its parameter",
        {"grads": [torch.ones(4), torch.ones(3)]},
    ),
    "a moment's shape": (
        ValueError,
        r"AdamW: state\['exp_avg'\] of group 0, parameter 1",
        {"exp_avgs": [torch.zeros(3), torch.zeros(2)]},
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_before_anything_changes(what: str) -> None:
    kind, message, wrong = WRONG[what]
    names = list(inspect.signature(functional.adamw).parameters)[:6]
    arguments: dict[str, Any] = {**dict(zip(names, _lists(), strict=True)), **ADAMW, **wrong}
    if wrong.get("lr", 0) is None:
        del arguments["lr"]
    with pytest.raises(kind, match=message):
        functional.adamw(**arguments)
    assert torch.equal(arguments["params"][0], torch.ones(3))
