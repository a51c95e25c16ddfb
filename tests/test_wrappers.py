"""Do classes around an optimizer work that never call `Optimizer.__init__`?

Lookahead, SAM and the like are subclasses of Optimizer that hold another one and share its groups;
Lightning makes `type("Lightning" + name, (Wrapper, cls), {})`, which asks what it wraps.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import stepwell
from stepwell.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .shell_cases import fill_grads, refused, weights


def sharing(base: Any) -> Any:
    class Lookahead(base):  # type: ignore[misc]
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups
            self.state, self.defaults = optimizer.state, optimizer.defaults

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    return Lookahead


class Lookahead(sharing(stepwell.Optimizer)):  # type: ignore[misc]
    """One that pickle finds."""


class Delegate:
    """As `LightningOptimizer`."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


def delegating(optimizer: Any) -> Any:
    cls = type(optimizer)
    return type("Wrapped" + cls.__name__, (Delegate, cls), {})(optimizer)


WRAPPERS = {
    "shares": lambda lib, optimizer: sharing(lib.Optimizer)(optimizer),
    "delegates": lambda lib, optimizer: delegating(optimizer),
}
each_wrapper = pytest.mark.parametrize("how", WRAPPERS)
LIBRARIES = (stepwell, torch.optim)


def wrapped(lib: Any, how: str, **options: Any) -> tuple[Any, Any, Any]:
    params = weights()
    optimizer = lib.AdamW(params, lr=0.1, **options)
    fill_grads(params, 0)
    return WRAPPERS[how](lib, optimizer), optimizer, params


@each_wrapper
def test_what_an_optimizer_does(how: str) -> None:
    seen = []
    for lib in LIBRARIES:
        wrapper, optimizer, params = wrapped(lib, how)
        schedule = lib.lr_scheduler.StepLR(wrapper, 1, 0.5)
        assert wrapper.step(lambda: 3.0) == 3.0
        schedule.step()
        wrapper.step()
        assert optimizer.param_groups[0]["lr"] == 0.05
        assert "lr: 0.05" in repr(wrapper)
        wrapper.zero_grad()
        assert all(param.grad is None for param in params)
        if how == "delegates" or lib is stepwell:
            assert wrapper.state_dict()["state"][0]["step"] == 2
        seen.append([param.detach() for param in params])
    torch.testing.assert_close(*seen)


@each_wrapper
def test_hooks_run_once(how: str) -> None:
    """Global ones, and those of the optimizer, know the optimizer; those of the wrapper run too."""
    for lib in LIBRARIES:
        wrapper, optimizer, _ = wrapped(lib, how)
        calls: list[tuple[str, Any]] = []

        def hook(name: str, calls: Any = calls) -> Any:
            return lambda caller, args, kwargs: calls.append((name, caller))

        handles = [
            register_optimizer_step_pre_hook(hook("global pre")),
            register_optimizer_step_post_hook(hook("global post")),
        ]
        optimizer.register_step_pre_hook(hook("pre"))
        optimizer.register_step_post_hook(hook("post"))
        # torch has no registry of a wrapper that shares
        has_own = how == "shares" and lib is stepwell
        if has_own:
            wrapper.register_step_pre_hook(hook("wrapper pre"))
            wrapper.register_step_post_hook(hook("wrapper post"))
        elif how == "delegates":
            wrapper.register_step_post_hook(hook("wrapper post"))
        try:
            wrapper.step()
        finally:
            for handle in handles:
                handle.remove()
        expected = [("global pre", optimizer), ("pre", optimizer), ("post", optimizer)]
        if how == "delegates":
            expected.append(("wrapper post", optimizer))
        expected.append(("global post", optimizer))
        if has_own:
            expected = [("wrapper pre", wrapper), *expected, ("wrapper post", wrapper)]
        assert calls == expected


@pytest.mark.filterwarnings("ignore")
@each_wrapper
def test_a_profile_shows_the_step_once(how: str) -> None:
    labels = []
    for lib in LIBRARIES:
        wrapper, _, _ = wrapped(lib, how)
        if lib is stepwell:
            wrapper.register_step_post_hook(lambda *_: None)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            wrapper.step()
        events = [event for event in recorded.events() if event.name.startswith("Optimizer.step#")]
        labels.append([event.name for event in events])
    assert labels[0] == labels[1] == ["Optimizer.step#AdamW.step"]


@each_wrapper
def test_hooks_of_state_dicts(how: str) -> None:
    wrapper, _, _ = wrapped(stepwell, how)
    wrapper.register_state_dict_post_hook(lambda _, saved: {**saved, "note": 1})
    saved = wrapper.state_dict()
    assert saved["note"] == 1
    calls: list[int] = []
    wrapper.register_load_state_dict_post_hook(lambda *_: calls.append(1))
    wrapper.load_state_dict(saved)
    assert calls == [1]


@each_wrapper
def test_what_a_wrapper_loads_the_optimizer_has(how: str) -> None:
    trained, _, _ = wrapped(stepwell, how)
    trained.step()
    saved = copy.deepcopy(trained.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    wrapper, optimizer, params = wrapped(stepwell, how)
    wrapper.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.state[params[0]]["step"] == 1
    wrapper.step()
    assert optimizer.state[params[0]]["step"] == 2


def copied(optimizer: Any) -> Any:
    return copy.deepcopy(optimizer)


def unpickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("again", [copied, unpickled])
def test_a_copy_of_a_wrapper_shares_the_groups_of_its_optimizer(again: Any) -> None:
    params = weights()
    wrapper = Lookahead(stepwell.AdamW(params, lr=0.1))
    fill_grads(params, 0)
    wrapper.step()
    new = again(wrapper)
    assert new.param_groups is new.optimizer.param_groups
    assert new.state is new.optimizer.state
    schedule = stepwell.lr_scheduler.StepLR(new, 1, 0.5)
    new.step()
    schedule.step()
    assert new.optimizer.param_groups[0]["lr"] == 0.05
    calls: list[Any] = []
    new.optimizer.register_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    new.step()
    handle.remove()
    assert calls == [new.optimizer, new.optimizer]
    assert wrapper.optimizer.param_groups[0]["lr"] == 0.1


def test_a_wrapper_without_groups_says_so() -> None:
    class Bare(stepwell.Optimizer):
        def __init__(self) -> None:
            pass

    bare = Bare()
    for name in ("param_groups", "no_such_name"):
        error = refused(lambda name=name: getattr(bare, name))
        assert str(error) == f"'Bare' object has no attribute '{name}'"


def test_hooks_of_one_wrapper_are_not_those_of_another() -> None:
    one, other = (Lookahead(stepwell.AdamW(weights(), lr=0.1)) for _ in range(2))
    calls: list[Any] = []
    handle = one.register_step_post_hook(lambda caller, *_: calls.append(caller))
    for_all = register_optimizer_step_post_hook(lambda caller, *_: calls.append(caller))
    for wrapper in (other, one):
        wrapper.step()
    for_all.remove()
    assert calls == [other.optimizer, one.optimizer, one]
    handle.remove()
    other.register_step_pre_hook(lambda caller, *_: calls.append(caller))
    del calls[:]
    for wrapper in (other, one):
        wrapper.step()
    assert calls == [other]


class Renamed(stepwell.AdamW):
    """One that keeps groups and state elsewhere."""

    @property
    def param_groups(self) -> Any:
        return self.my_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.my_groups = groups

    @property
    def state(self) -> Any:
        return self.my_state

    @state.setter
    def state(self, state: Any) -> None:
        self.my_state = state


class Asking(stepwell.AdamW):
    """One without groups and state, or a list, of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.inner = stepwell.AdamW(*args, **options)
        self.defaults = self.inner.defaults

    @property
    def param_groups(self) -> Any:
        return [*self.inner.param_groups]

    @property
    def state(self) -> Any:
        return self.inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("cls", [Renamed, Asking])
@pytest.mark.parametrize("inside", [False, True])
def test_groups_and_state_that_are_properties_are_loaded(cls: Any, inside: bool) -> None:
    donor_params, params = weights(), weights()
    donor = stepwell.AdamW(donor_params, lr=0.3)
    fill_grads(donor_params, 0)
    donor.step()
    own = cls(params, lr=0.1)
    optimizer = stepwell.Combined({"one": own}) if inside else own
    held = own.param_groups[0], own.state
    optimizer.load_state_dict(donor.state_dict())
    for each in (copy.deepcopy(own), own):
        assert each.param_groups[0]["lr"] == 0.3
        assert [state["step"] for state in each.state.values()] == [1] * len(params)
    assert held[0] is own.param_groups[0]
    assert held[1] is own.state
    for param, other in zip(params, donor_params, strict=True):
        param.data.copy_(other.data)
    for every, each in ((params, optimizer), (donor_params, donor)):
        fill_grads(every, 1)
        each.step()
    for param, other in zip(params, donor_params, strict=True):
        assert torch.equal(param, other)


def test_looking_up_attributes_of_an_optimizer_stays_quick() -> None:
    """A class with `__getattr__` looks up every attribute in a slower way, in each step."""
    assert not hasattr(stepwell.Optimizer, "__getattr__")
