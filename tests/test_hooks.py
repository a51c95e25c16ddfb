"""Do hooks run when, in which order and with what torch's do, and is a step whole around them?"""

from __future__ import annotations

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

import stepwell
from stepwell.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .shell_cases import (
    assert_same,
    each_name,
    fill_grads,
    ours,
    refused,
    snapshot,
    theirs,
    train,
    weights,
)

pytestmark = pytest.mark.tiny


@pytest.fixture
def handles():
    """Global hooks registered in a test, which must not outlive it."""
    registered = []
    yield registered
    for handle in registered:
        handle.remove()


def listen(optimizer, handles, log):
    def said(what):
        def hook(*args):
            log.append((what, *(type(a).__name__ for a in args[1:])))

        return hook

    handles.append(register_optimizer_step_pre_hook(said("global pre")))
    handles.append(register_optimizer_step_post_hook(said("global post")))
    optimizer.register_step_post_hook(said("post"))
    optimizer.register_step_pre_hook(said("pre"))
    optimizer.register_step_pre_hook(said("pre 2"))
    optimizer._optimizer_step_code = lambda: log.append(("code",))


@each_name
def test_order_is_torchs(name, handles):
    logs = []
    for library in (ours, theirs):
        log = []
        optimizer = library(name)(weights())
        listen(optimizer, handles, log)
        optimizer.step()
        for handle in handles:
            handle.remove()
        logs.append(log)
    assert logs[0] == logs[1]
    order = ["global pre", "pre", "pre 2", "code", "post", "global post"]
    assert [entry[0] for entry in logs[0]] == order


def test_torchs_own_registry_is_the_same(handles):
    seen = []
    handles.append(
        torch_optimizer.register_optimizer_step_pre_hook(lambda *args: seen.append(args[0]))
    )
    handles.append(register_optimizer_step_post_hook(lambda *args: seen.append(args[0])))
    a, b = stepwell.SGD(weights()), torch.optim.SGD(weights())
    a.step()
    b.step()
    assert [id(x) for x in seen] == [id(a), id(a), id(b), id(b)]


def arguments_seen(library, call):
    seen = []
    optimizer = library("SGD")(weights())
    optimizer.register_step_pre_hook(lambda *a: seen.append(("pre", a[1][1:], a[2])))
    optimizer.register_step_post_hook(lambda *a: seen.append(("post", a[1][1:], a[2])))
    call(optimizer)
    return seen


def closure():
    return 3.0


@pytest.mark.parametrize(
    "call", [lambda o: o.step(), lambda o: o.step(closure), lambda o: o.step(closure=closure)]
)
def test_hooks_are_given_what_the_step_was_given(call):
    assert arguments_seen(ours, call) == arguments_seen(theirs, call)


@each_name
def test_a_pre_hook_can_replace_the_arguments(name):
    results = []
    for library in (ours, theirs):
        optimizer = library(name)(weights())
        optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
        seen = []
        optimizer.register_step_post_hook(lambda o, args, kwargs, s=seen: s.append(len(args)))
        results.append((optimizer.step(), seen))
    assert results[0] == results[1] == (7.0, [2])


@pytest.mark.parametrize("answer", [3, (1, 2, 3), "ab"])
def test_a_pre_hook_that_answers_wrongly(answer):
    params = weights()
    optimizer = stepwell.SGD(params, momentum=0.9)
    fill_grads(params, 0)
    optimizer.register_step_pre_hook(lambda *_: answer)
    before = snapshot(optimizer)
    error = refused(optimizer.step)
    assert type(error) is RuntimeError
    assert f"must return None or a tuple of (new_args, new_kwargs), but got {answer}." in str(error)
    assert "SGD.step" in str(error) or "Optimizer.step" in str(error)
    assert_same(snapshot(optimizer), before)


def test_handles_remove_and_prepend():
    optimizer = stepwell.SGD(weights())
    log = []
    kinds = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
    for kind in kinds:
        register = getattr(optimizer, f"register_{kind}_hook")
        register(lambda *_, k=kind: log.append((k, 1)))
        register(lambda *_, k=kind: log.append((k, 2)))
        register(lambda *_, k=kind: log.append((k, 0)), prepend=True)
        register(lambda *_, k=kind: log.append((k, 9))).remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert log == [(kind, i) for kind in kinds for i in range(3)]
    handle = optimizer.register_step_pre_hook(lambda *_: log.append("step"))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert log.count("step") == 1


def test_state_dict_hooks_may_answer_with_another_dict():
    optimizer = stepwell.SGD(weights(), lr=0.5)
    optimizer.register_state_dict_post_hook(lambda o, sd: {**sd, "note": 1})
    saved = optimizer.state_dict()
    assert saved["note"] == 1

    def slower(_, state_dict):
        groups = [{**g, "lr": g["lr"] / 10} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(slower)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert saved["param_groups"][0]["lr"] == 0.5


def test_a_load_hook_may_write_into_its_copy():
    optimizer = stepwell.SGD(weights())
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: sd.pop("extra", None) and None)
    saved["extra"] = 1
    optimizer.load_state_dict(saved)
    assert saved["extra"] == 1


class BoomError(Exception):
    pass


def boom(*_):
    raise BoomError


def trained():
    params = weights()
    optimizer = stepwell.AdamW(params)
    train(optimizer)
    fill_grads(params, 50)
    return optimizer


def stepped_once_more():
    optimizer = trained()
    optimizer.step()
    return snapshot_values(optimizer)


def snapshot_values(optimizer):
    return [
        [p.detach().clone() for g in optimizer.param_groups for p in g["params"]],
        [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()],
    ]


STEPPED_WHEN_RAISED = {
    "global pre": False,
    "pre": False,
    "closure": False,
    "post": True,
    "global post": True,
}


@pytest.mark.parametrize("where", STEPPED_WHEN_RAISED)
def test_who_raises_leaves_the_state_before_or_after(where, handles):
    optimizer = trained()
    expected = stepped_once_more() if STEPPED_WHEN_RAISED[where] else snapshot_values(optimizer)
    kind = where.rpartition(" ")[2]
    if where.startswith("global"):
        register = {"pre": register_optimizer_step_pre_hook}.get(
            kind, register_optimizer_step_post_hook
        )
        handles.append(register(boom))
    elif where != "closure":
        handles.append(getattr(optimizer, f"register_step_{kind}_hook")(boom))
    with pytest.raises(BoomError):
        optimizer.step(boom if where == "closure" else None)
    assert_same(snapshot_values(optimizer), expected)


def test_hooks_go_on_after_one_raised():
    optimizer = trained()
    handle = optimizer.register_step_pre_hook(boom)
    with pytest.raises(BoomError):
        optimizer.step()
    handle.remove()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert calls == [1]


def test_a_hook_may_remove_itself():
    optimizer = stepwell.SGD(weights())
    calls = []
    handle = optimizer.register_step_post_hook(lambda *_: (calls.append(1), handle.remove()))
    optimizer.register_step_post_hook(lambda *_: calls.append(2))
    optimizer.step()
    optimizer.step()
    assert calls == [1, 2, 2]


class Wrapped(stepwell.SGD):
    def step(self, closure=None):
        self.wrapped = True
        return super().step(closure)


class WrappedTwice(Wrapped):
    def step(self, closure=None):
        return super().step(closure)


class Mixin:
    def step(self, closure=None):
        return super().step(closure)


class Mixed(Mixin, stepwell.SGD):
    pass


@pytest.mark.parametrize("cls", [Wrapped, WrappedTwice, Mixed])
def test_a_step_that_calls_super_has_its_hooks_once(cls):
    stepwell.SGD(weights()).step()
    optimizer = cls(weights())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    assert optimizer.step(lambda: 5.0) == 5.0
    assert calls == ["pre", "post"]


class OldSchool(stepwell.Optimizer):
    """An optimizer in torch's manner."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group["lr"] * param.grad)


def test_an_optimizer_in_torchs_manner():
    params = weights()
    optimizer = OldSchool(params, lr=0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    before = [p.detach().clone() for p in params]
    fill_grads(params, 0)
    optimizer.step()
    torch.testing.assert_close(
        [p.detach() for p in params],
        [b - 0.5 * p.grad for b, p in zip(before, params, strict=True)],
    )
    assert calls == ["pre"]
    assert OldSchool.step.hooked
    other = OldSchool(weights())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.5


def test_without_a_step_there_is_none():
    optimizer = stepwell.Optimizer(weights(), {"lr": 0.1})
    assert type(refused(optimizer.step)) is NotImplementedError


def test_a_required_default():
    required = torch_optimizer.required
    error = refused(lambda: stepwell.Optimizer(weights(), {"lr": required}))
    twin = refused(lambda: torch.optim.Optimizer(weights(), {"lr": required}))
    assert str(error).startswith(str(twin))
    group = {"params": weights(), "lr": 0.1}
    assert stepwell.Optimizer([group], {"lr": required}).param_groups[0]["lr"] == 0.1
