"""Are the steps of LBFGS the same whatever mode of torch, closure or scaler is around them?"""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepwell.optimizers.lbfgs import LBFGS

from .shell_cases import assert_same, refused, snapshot
from .test_lbfgs import closure_of, each_search, quadratic, rosenbrock, state_of, values
from .test_modes import AROUND


def walked(optimizer: Any, loss: Callable[[], Tensor], around: Any = nullcontext) -> Any:
    """Return values and state after two steps, a save, a load and another two steps."""
    closure = closure_of(optimizer, loss)
    with around():
        for _ in range(2):
            optimizer.step(closure)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(2):
            optimizer.step(closure)
    return values(optimizer), optimizer.state_dict()["state"]


@each_search
@pytest.mark.parametrize("around", AROUND.values(), ids=[*AROUND])
def test_what_is_around_a_step_changes_nothing(around: Any, search: dict[str, Any]) -> None:
    runs = []
    for context in (nullcontext, around):
        params, _ = quadratic(torch.float32)
        target = torch.linspace(-1, 1, 100)

        def loss(params: Any = params, target: Tensor = target) -> Tensor:
            # no product of matrices, which autocast would round
            return ((torch.cat(params) - target) ** 4).sum()

        runs.append(walked(LBFGS(params, max_iter=6, **search), loss, context))
    assert_same(runs[1], runs[0])


def test_numbers_that_torch_lists_as_floats_are_taken_as_they_are() -> None:
    params, loss = quadratic()
    optimizer = LBFGS(params, max_iter=6)
    optimizer.step(closure_of(optimizer, loss))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].pop("inverse")
    exact = copy.deepcopy(saved)
    saved["state"][0]["ro"] = [float(number) for number in saved["state"][0]["ro"]]
    found = []
    for given, around in ((exact, nullcontext()), (saved, torch.device("meta"))):
        with around:
            optimizer.load_state_dict(given)
        found.append(optimizer.state_dict()["state"])
    assert_same(*found)


@each_search
def test_autocast_sees_where_parameters_are(search: dict[str, Any]) -> None:
    """It keeps copies of weights, which are not where the weights have moved since."""
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    inputs, target = torch.randn(16, 4), torch.randn(16, 1)
    optimizer = LBFGS(net.parameters(), max_iter=8, **search)
    seen = []

    def loss() -> Tensor:
        seen.append(nn.functional.mse_loss(net(inputs).float(), target))
        return seen[-1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(closure_of(optimizer, loss))
    assert len({value.item() for value in seen}) > 3
    assert seen[-1] < seen[0]


@each_search
def test_parameters_made_in_inference_mode(search: dict[str, Any]) -> None:
    def run(mode: bool) -> list[Tensor]:
        with torch.inference_mode(mode):
            param = nn.Parameter(torch.full((3,), 4.0))
            optimizer = LBFGS([param], max_iter=4, **search)

            def closure() -> Tensor:
                param.grad = 2 * param.detach() - 2
                return (param.detach() - 1).square().sum()

            for _ in range(3):
                optimizer.step(closure)
        return values(optimizer)

    assert_same(run(True), run(False))


def test_state_made_in_inference_mode_serves_parameters_made_outside() -> None:
    with torch.inference_mode():
        params = [nn.Parameter(torch.tensor([-1.2, 1.0]))]
        optimizer = LBFGS(params, max_iter=3)

        def closure() -> Tensor:
            (param,) = params
            param.grad = param.detach().clone()
            return 0.5 * param.detach().square().sum()

        optimizer.step(closure)
    state = optimizer.state.pop(params[0])
    params[0] = nn.Parameter(torch.tensor([2.0, 1.0]))
    optimizer.param_groups[0]["params"] = params
    optimizer.state[params[0]] = state
    optimizer.step(closure)
    assert float(params[0].detach().abs().max()) < 2


# Scalers


def test_a_step_in_which_a_scaler_found_infinity_is_none() -> None:
    params, loss = rosenbrock()
    optimizer = LBFGS(params)
    for begins in (True, False):
        before = snapshot(optimizer)
        optimizer.found_inf = torch.tensor(1.0)
        said = optimizer.step(closure_of(optimizer, loss))
        assert said.item() == loss().item()
        assert_same(snapshot(optimizer), before)
        assert bool(optimizer.state) is not begins
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step(closure_of(optimizer, loss))


@each_search
def test_gradients_are_unscaled(search: dict[str, Any]) -> None:
    runs = []
    for scale in (1.0, 2.0**10):
        params, loss = rosenbrock()
        optimizer = LBFGS(params, **search)
        if scale != 1:
            optimizer.grad_scale = torch.tensor(scale)

        def closure(o: Any = optimizer, f: Any = loss, scale: float = scale) -> Tensor:
            o.zero_grad()
            value: Tensor = f()
            (value * scale).backward()
            return value

        for _ in range(2):
            optimizer.step(closure)
        runs.append((values(optimizer), optimizer.state_dict()["state"]))
    assert_same(*runs)


# Climbing


@each_search
def test_to_climb_is_to_descend_on_the_other_side(search: dict[str, Any]) -> None:
    runs = []
    for sign in (1.0, -1.0):
        params, loss = rosenbrock()
        optimizer = LBFGS(params, maximize=sign < 0, **search)
        closure = closure_of(optimizer, lambda f=loss, s=sign: s * f())
        said = [sign * optimizer.step(closure).item() for _ in range(2)]
        runs.append((said, values(optimizer), optimizer.state_dict()["state"]))
    assert_same(*runs)


# Closures


BAD_LOSSES: dict[str, tuple[Any, type[Exception], str]] = {
    "a batch of losses": (torch.ones(2), ValueError, "a Tensor of shape (2,) (torch.float32)"),
    "nothing": (torch.ones(0), ValueError, "a Tensor of shape (0,) (torch.float32)"),
    "complex": (torch.tensor(1 + 2j), RuntimeError, "a Tensor of shape () (torch.complex64)"),
    "no memory": (torch.ones((), device="meta"), RuntimeError, "a Tensor of shape () (torch.float"),
    "no loss": (None, TypeError, "None"),
    "a pair": ((torch.ones(()), 1), TypeError, "tuple"),
    "a complex number": (1 + 2j, TypeError, "complex"),
    "words": ("low", ValueError, "str"),
}


@pytest.mark.parametrize(("loss", "kind", "got"), BAD_LOSSES.values(), ids=[*BAD_LOSSES])
def test_what_is_no_loss_is_refused(loss: Any, kind: type[Exception], got: str) -> None:
    params, good = rosenbrock()
    optimizer = LBFGS(params)
    before = snapshot(optimizer)
    found = refused(lambda: optimizer.step(lambda: loss))
    expected = refused(lambda: torch.optim.LBFGS(params).step(lambda: loss))
    assert type(found) is kind
    assert isinstance(expected, kind)
    assert str(found).startswith(f"{expected} (LBFGS: the closure must return the loss, got {got}")
    assert_same(snapshot(optimizer), before)
    # within a search, the parameters are where they were best
    calls = iter([closure_of(optimizer, good)] * 2 + [lambda: loss] * 9)
    assert type(refused(lambda: optimizer.step(lambda: next(calls)()))) is kind
    assert good().isfinite()


@pytest.mark.parametrize(
    "loss", [1, 0.5, True, torch.tensor([0.5]), torch.tensor(1 + 0j), torch.tensor(2)]
)
def test_what_is_a_loss_as_it_is_in_torch(loss: Any) -> None:
    for make in (torch.optim.LBFGS, LBFGS):
        assert make(rosenbrock()[0]).step(lambda: loss) is loss


WITHOUT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "none": (lambda o: o.step(), "LBFGS.step() missing 1 required positional argument: 'closure'"),
    "None": (lambda o: o.step(None), "missing 1 required positional argument: 'closure'"),
    "a loss": (lambda o: o.step(torch.ones(())), "'Tensor' object is not callable"),
}


@pytest.mark.parametrize(("call", "words"), WITHOUT.values(), ids=[*WITHOUT])
def test_a_step_without_a_closure_says_what_to_write(
    call: Callable[[Any], Any], words: str
) -> None:
    found = refused(lambda: call(LBFGS(rosenbrock()[0])))
    assert isinstance(found, TypeError)
    assert words in str(found)
    assert "LBFGS needs a closure" in str(found)
    assert "        loss.backward()\n        return loss\n    optimizer.step(closure)" in str(found)


BAD_GRADIENTS: dict[str, Callable[[Any], None]] = {
    "another shape": lambda p: setattr(p, "data", torch.ones(2, 1, dtype=p.dtype)),
    "complex": lambda p: setattr(p, "data", p.data.to(torch.complex128)),
}


@pytest.mark.parametrize("spoil", BAD_GRADIENTS.values(), ids=[*BAD_GRADIENTS])
def test_a_gradient_that_is_not_of_its_parameter_is_refused(spoil: Callable[[Any], None]) -> None:
    params, loss = rosenbrock()
    optimizer = LBFGS([("width", params[0])])

    def closure() -> Tensor:
        value = closure_of(optimizer, loss)()
        spoil(params[0])
        return value

    found = refused(lambda: optimizer.step(closure))
    words = (
        "LBFGS: the gradient of group 0, parameter 'width' is torch.float64 of shape (2,) on cpu"
    )
    assert words in str(found)
    assert not optimizer.state


# Idle


IDLE: dict[str, Callable[[Any], Any]] = {
    "no step": lambda o: None,
    "no gradient": lambda o: o.step(lambda: torch.ones(())),
    "at the optimum": lambda o: o.step(closure_of(o, lambda: 0 * values(o)[0].sum() + zero(o))),
    "any gradient is small": lambda o: (
        o.param_groups[0].update(tolerance_grad=math.inf),
        o.step(closure_of(o, lambda: (o.param_groups[0]["params"][0] ** 2).sum())),
    ),
}


def zero(optimizer: Any) -> Tensor:
    (param,) = optimizer.param_groups[0]["params"]
    return (0 * param).sum()


@pytest.mark.parametrize("idle", IDLE.values(), ids=[*IDLE])
def test_who_does_not_move_leaves_the_state_that_torch_leaves(idle: Callable[[Any], Any]) -> None:
    states = []
    for make in (LBFGS, torch.optim.LBFGS):
        optimizer = make(rosenbrock()[0])
        idle(optimizer)
        states.append(optimizer.state_dict()["state"])
    assert states[0] == states[1]


@each_search
def test_a_step_ends_where_any_change_is_small(search: dict[str, Any]) -> None:
    runs = []
    for make in (LBFGS, torch.optim.LBFGS):
        params, loss = rosenbrock()
        optimizer = make(params, tolerance_change=math.inf, **search)
        for _ in range(2):
            optimizer.step(closure_of(optimizer, loss))
        state = state_of(optimizer)
        runs.append((values(optimizer), state["n_iter"], state["func_evals"]))
    assert_same(*runs)


def test_without_parameters_the_closure_is_called() -> None:
    optimizer = LBFGS([{"params": []}])
    assert optimizer.step(lambda: 3.0) == 3.0
    assert copy.deepcopy(optimizer).step(lambda: None) is None
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["state"] == {}
    assert LBFGS([nn.Parameter(torch.ones(2), requires_grad=False)]).step(lambda: 3.0) == 3.0


# State


def test_entries_of_nobody_are_kept() -> None:
    params, loss = rosenbrock()
    other = nn.Parameter(torch.ones(2))
    optimizer = LBFGS([*params, other], max_iter=3)
    optimizer.state["epoch"] = 7
    optimizer.state["table"] = {"mean": torch.ones(2)}
    optimizer.state[other]
    assert optimizer.state_bytes() == 8
    optimizer.share_memory()
    for _ in range(2):
        saved = optimizer.state_dict()
        assert saved["state"]["epoch"] == 7
        assert saved["state"]["table"]["mean"] is not optimizer.state["table"]["mean"]
        assert copy.deepcopy(optimizer).state["epoch"] == 7
        twin = LBFGS([*(nn.Parameter(p.detach().clone()) for p in params), other])
        twin.load_state_dict(saved)
        assert twin.state["epoch"] == 7
        optimizer.step(closure_of(optimizer, loss))
    optimizer.state[other]["note"] = 1
    assert copy.deepcopy(optimizer).state_dict()["state"][1] == {"note": 1}


LOST = ("d", "t", "H_diag", "prev_flat_grad", "prev_loss")


@pytest.mark.parametrize("name", LOST)
def test_state_that_has_lost_an_entry_is_refused(name: str) -> None:
    params, loss = rosenbrock()
    optimizer = LBFGS(params, max_iter=3)
    optimizer.step(closure_of(optimizer, loss))
    kept = state_of(optimizer).pop(name)
    start = values(optimizer)
    found = refused(lambda: optimizer.step(closure_of(optimizer, loss)))
    assert f"KeyError: '{name}' (to begin anew, clear optimizer.state)" in str(found)
    assert_same(values(optimizer), start)
    state_of(optimizer)[name] = kept
    optimizer.step(closure_of(optimizer, loss))
    optimizer.state[params[0]] = 7
    assert "state of group 0, parameter 0 must be a dict, got int" in str(
        refused(lambda: optimizer.step(closure_of(optimizer, loss)))
    )


def test_parameters_that_join_and_leave() -> None:
    params, loss = quadratic(condition=10.0)
    joins = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = LBFGS(params, max_iter=3)

    def total() -> Tensor:
        return loss() + (joins**2).sum()

    optimizer.step(closure_of(optimizer, total))
    optimizer.param_groups[0]["params"].append(joins)
    found = refused(lambda: optimizer.step(closure_of(optimizer, total)))
    assert "this state does not fit parameters of 102 numbers in all" in str(found)
    optimizer.state.clear()
    optimizer.step(closure_of(optimizer, total))
    assert float(joins.detach().abs().max()) < 1
    # without the first one, whose entry the history was
    gone = optimizer.param_groups[0]["params"].pop(0)
    before = gone.detach().clone()
    optimizer.step(closure_of(optimizer, total))
    assert torch.equal(gone, before)
    assert optimizer.state_dict()["state"].keys() == {0}


def test_a_shallow_copy_shares_the_state_and_goes_on_in_turns() -> None:
    runs = []
    for is_copied in (False, True):
        params, loss = rosenbrock()
        optimizer = LBFGS(params, max_iter=3)
        optimizer.step(closure_of(optimizer, loss))
        other = copy.copy(optimizer) if is_copied else optimizer
        assert other.state is optimizer.state
        for _ in range(2):
            for each in (other, optimizer):
                each.step(closure_of(each, loss))
        runs.append((values(optimizer), optimizer.state_dict()["state"]))
    assert_same(*runs)


def test_state_of_another_rule_is_refused() -> None:
    params, _ = rosenbrock()
    params[0].grad = torch.ones(2, dtype=torch.float64)
    adam = torch.optim.Adam(params)
    adam.step()
    optimizer = LBFGS(params)
    found = refused(lambda: optimizer.load_state_dict(adam.state_dict()))
    assert "its state belongs to the first parameter, and counts n_iter" in str(found)
    assert not optimizer.state


@each_search
@pytest.mark.parametrize("ends", ["well", "in an error", "in a warning"])
def test_nothing_keeps_parameters_alive(ends: str, search: dict[str, Any]) -> None:
    def run() -> list[weakref.ref[Any]]:
        params, loss = rosenbrock()
        optimizer = LBFGS(params, **search)
        closure = closure_of(optimizer, loss)
        optimizer.step(closure)
        calls: list[int] = []

        def bad() -> Tensor:
            calls.append(1)
            if ends == "in an error" and len(calls) > 2:
                raise ZeroDivisionError
            return closure() * (math.nan if ends == "in a warning" and len(calls) > 1 else 1)

        if ends == "in an error":
            with pytest.raises(ZeroDivisionError):
                optimizer.step(bad)
        elif ends == "in a warning":
            with pytest.warns(RuntimeWarning, match="not finite"):
                optimizer.step(bad)
        kept = [value for value in optimizer.state[params[0]].values() if torch.is_tensor(value)]
        return [weakref.ref(item) for item in (optimizer, *params, *kept)]

    gc.collect()
    gc.disable()
    try:
        assert [ref() for ref in run()] == [None] * len(run())
    finally:
        gc.enable()
