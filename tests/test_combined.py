"""Do several optimizers behind one step, load, copy and refuse as each would alone?"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import stepwell
from stepwell import checkpoint
from stepwell.groups import muon_split, no_decay, table
from stepwell.language import Decay

Make = Callable[[nn.Module], dict[str, torch.optim.Optimizer]]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def muon_and_adamw(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    hidden, others = muon_split(model, head="4.weight")
    adamw = stepwell.AdamW(no_decay(others), lr=3e-2)
    return {"muon": stepwell.Muon(hidden, lr=0.02), "adamw": adamw}


def with_torch(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    first = [(name, param) for name, param in named.items() if name.startswith("0")]
    rest = [(name, param) for name, param in named.items() if not name.startswith("0")]
    sgd = torch.optim.SGD(first, lr=0.1, momentum=0.9)
    return {"sgd": sgd, "rmsprop": stepwell.RMSprop(rest, lr=0.01)}


def two_alike(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    params = list(model.parameters())
    return {
        "body": stepwell.AdamW(params[:2], lr=0.01),
        "head": stepwell.AdamW(params[2:], lr=0.1, amsgrad=True),
    }


MAKERS: list[Make] = [muon_and_adamw, with_torch, two_alike]


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, start: int = 0) -> None:
    for step in range(start, start + 3):
        torch.manual_seed(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.fixture
def trained() -> tuple[nn.Module, stepwell.Combined]:
    model = net()
    optimizer = stepwell.Combined(muon_and_adamw(model))
    train(model, optimizer)
    return model, optimizer


@pytest.mark.tiny
@pytest.mark.parametrize("make", MAKERS)
def test_a_step_is_that_of_each(make: Make) -> None:
    apart, together = net(), net()
    optimizers = make(apart)
    combined = stepwell.Combined(make(together))
    train(apart, *optimizers.values())
    train(together, combined)
    assert same(weights(apart), weights(together))
    assert not same(weights(apart), weights(net()))
    assert len(combined.state) == 6
    assert combined.state_bytes() == sum(
        value.numel() * value.element_size()
        for optimizer in optimizers.values()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def test_a_closure_is_called_once() -> None:
    model = net()
    optimizer = stepwell.Combined(with_torch(model))
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(torch.ones(1, 4)).square().mean()
        loss.backward()
        return loss

    before = weights(model)
    assert isinstance(optimizer.step(closure), Tensor)
    assert calls == [True]
    assert not any(map(torch.equal, before, weights(model)))


def test_nothing_moves_if_one_refuses(trained: tuple[nn.Module, stepwell.Combined]) -> None:
    model, optimizer = trained
    model(torch.ones(1, 4)).square().mean().backward()
    before = weights(model), copy.deepcopy(optimizer.state_dict())
    bias = model[4].bias
    bias.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match=r"AdamW does not support sparse gradients.*'4\.bias'"):
        optimizer.step()
    assert same(before[0], weights(model))
    assert_same_state(before[1], optimizer.state_dict())


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["state"].keys() == other["state"].keys()
    for key, entry in one["state"].items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][key][name]))


# Groups and state


@pytest.mark.tiny
def test_groups_are_the_very_dicts(trained: tuple[nn.Module, stepwell.Combined]) -> None:
    _, optimizer = trained
    muon, adamw = optimizer.optimizers.values()
    assert optimizer.param_groups is optimizer.param_groups
    assert [id(group) for group in optimizer.param_groups] == [
        id(group) for group in (*muon.param_groups, *adamw.param_groups)
    ]
    assert [group["optimizer"] for group in optimizer.param_groups] == ["muon", "adamw", "adamw"]
    optimizer.param_groups[0]["lr"] = 0.5
    assert muon.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match=r"Invalid learning rate: nan \(AdamW, group 1"):
        optimizer.param_groups[2]["lr"] = float("nan")


def test_a_group_joins_the_optimizer_that_it_names() -> None:
    model, more, most = net(), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = stepwell.Combined(two_alike(model))
    given = {"params": [more], "optimizer": "head", "lr": 0.25}
    optimizer.add_param_group(given)
    assert [group["optimizer"] for group in optimizer.param_groups] == ["body", "head", "head"]
    assert optimizer.optimizers["head"].param_groups[1]["amsgrad"] is True
    assert given["amsgrad"] is True
    # straight to the optimizer works as well
    optimizer.optimizers["body"].add_param_group({"params": [most]})
    assert len(optimizer.param_groups) == 4
    more.grad = most.grad = torch.ones(2)
    optimizer.step()
    assert more.tolist() == pytest.approx([1 - 0.25 * 0.01 - 0.25] * 2)
    assert most.tolist() == pytest.approx([1 - 0.01 * 0.01 - 0.01] * 2)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            {},
            "the key 'optimizer' must say which one its parameters are for, one of 'body', 'head'",
        ),
        ({"optimizer": "tail"}, "one of 'body', 'head', as in .*; got 'tail'"),
        ({"optimizer": "head", "lr": -1.0}, "Invalid learning rate: -1.0"),
    ],
)
def test_a_group_that_is_refused_changes_nothing(group: dict[str, Any], message: str) -> None:
    optimizer = stepwell.Combined(two_alike(net()))
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **group})
    assert optimizer.state_dict() == before


def test_a_parameter_has_one_optimizer() -> None:
    model = net()
    optimizer = stepwell.Combined(two_alike(model))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model[0].weight], "optimizer": "head"})
    params = list(model.parameters())
    with pytest.raises(ValueError, match=r"parameter 0 of 'b' already belongs to 'a'"):
        stepwell.Combined({"a": stepwell.SGD(params), "b": stepwell.SGD(params[1:])})


def test_groups_that_are_put_into_the_list_find_their_optimizer() -> None:
    model, more = net(), nn.Parameter(torch.ones(2))
    optimizer = stepwell.Combined(two_alike(model))
    head = dict(optimizer.param_groups[1])
    optimizer.param_groups.append({**head, "params": [more], "lr": 0.25})
    more.grad = torch.ones(2)
    optimizer.step()
    assert more.tolist() == pytest.approx([1 - 0.25 * 0.01 - 0.25] * 2)
    # another list, in another order
    optimizer.param_groups = [dict(group) for group in reversed(optimizer.param_groups)]
    optimizer.param_groups[2]["lr"] = 0.0
    model[0].weight.grad = torch.ones(6, 4)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    optimizer.param_groups.append({"params": [nn.Parameter(torch.ones(1))], "lr": 0.1})
    with pytest.raises(ValueError, match="group 3: the key 'optimizer' must say"):
        optimizer.step()


@pytest.mark.parametrize("name", ["head", "tail", None])
def test_a_group_cannot_be_renamed(name: str | None) -> None:
    model = net()
    optimizer = stepwell.Combined(two_alike(model))
    if name is None:
        del optimizer.param_groups[0]["optimizer"]
    else:
        optimizer.param_groups[0]["optimizer"] = name
    model(torch.ones(1, 4)).square().mean().backward()
    before = weights(model)
    words = "group 0: its parameters belong to 'body', but its key 'optimizer' is"
    calls = (
        optimizer.step,
        optimizer.state_dict,
        lambda: optimizer.load_state_dict({"state": {}, "param_groups": []}),
    )
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call()
    assert same(before, weights(model))


def test_the_state_is_one_mapping(trained: tuple[nn.Module, stepwell.Combined]) -> None:
    model, optimizer = trained
    weight, bias = model[0].weight, model[0].bias
    assert optimizer.state[weight] is optimizer.optimizers["muon"].state[weight]
    assert optimizer.state[bias] is optimizer.optimizers["adamw"].state[bias]
    assert {id(key) for key in optimizer.state} == {id(param) for param in model.parameters()}
    # as Lightning moves the state to a device
    for param, entry in optimizer.state.items():
        optimizer.state[param] = {name: value.clone() for name, value in entry.items()}
    optimizer.state["epoch"] = 7
    assert optimizer.state_dict()["state"]["epoch"] == 7
    optimizer.state = {bias: optimizer.state[bias]}
    assert len(optimizer.state) == 1
    assert len(optimizer.optimizers["muon"].state) == 0
    del optimizer.state[bias]
    assert bias not in optimizer.state
    assert optimizer.state[bias] == {}
    assert "adamw" not in optimizer.state


def test_groups_stand_in_the_order_in_which_they_joined() -> None:
    model, more = net(), nn.Parameter(torch.ones(2))
    optimizer = stepwell.Combined(two_alike(model))
    schedule = stepwell.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.add_param_group({"params": [more], "optimizer": "body", "lr": 0.5})
    assert [group["optimizer"] for group in optimizer.param_groups] == ["body", "head", "body"]
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.05, 0.25]
    copied, follows = copy.deepcopy((optimizer, schedule))
    copied.step()
    follows.step()
    assert [group["lr"] for group in copied.param_groups] == [0.0025, 0.025, 0.125]
    assert [group["optimizer"] for group in copied.param_groups] == ["body", "head", "body"]
    again = stepwell.Combined(two_alike(net()))
    again.add_param_group({"params": [nn.Parameter(torch.ones(2))], "optimizer": "body"})
    again.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in again.param_groups] == [0.005, 0.05, 0.25]
    assert again.optimizers["body"].param_groups[1]["lr"] == 0.25


def test_a_parameter_that_is_moved_by_hand_begins_anew() -> None:
    model = net()
    optimizer = stepwell.Combined(two_alike(model))
    train(model, optimizer)
    body, head = optimizer.param_groups
    moved = body["params"].pop()
    optimizer.param_groups.append({**head, "params": [moved]})
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert optimizer.state[moved]["step"] == 1
    assert "max_exp_avg_sq" in optimizer.state[moved]
    assert len(optimizer.state) == 6
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups.append({**body, "params": [moved]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.step()


def test_the_state_is_asked_as_a_dict_is() -> None:
    optimizer, other = stepwell.Combined(two_alike(net())), nn.Parameter(torch.ones(1))
    assert optimizer.state.get(other) is None
    assert optimizer.state.get(other, 3) == 3
    assert optimizer.state.pop(other, 4) == 4
    with pytest.raises(KeyError):
        optimizer.state.pop(other)
    assert other not in optimizer.state
    kept = {"mine": torch.ones(1)}
    assert optimizer.state.setdefault(other, kept) is kept
    assert optimizer.state.pop(other) is kept


# Checkpoints


class Counting(stepwell.SGD):
    """An optimizer that saves more than its state."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "k": 2}


def test_hooks_of_a_load_run_for_each() -> None:
    optimizer = stepwell.Combined(with_torch(net()))
    seen: list[Any] = []
    for part in (optimizer, *optimizer.optimizers.values()):
        part.register_load_state_dict_post_hook(seen.append)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [optimizer, *optimizer.optimizers.values()]


@pytest.mark.parametrize("make", MAKERS)
def test_a_load_goes_on_to_the_bit(make: Make) -> None:
    model, again = net(), net(1)
    optimizer = stepwell.Combined(make(model))
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["params"][0] == 0
    again.load_state_dict(model.state_dict())
    loaded = stepwell.Combined(make(again))
    groups, first = loaded.param_groups, loaded.param_groups[0]
    for group in groups:
        group["lr"] = 0.5
    loaded.load_state_dict(saved)
    assert loaded.param_groups is groups
    assert groups[0] is first
    train(model, optimizer, start=3)
    train(again, loaded, start=3)
    assert same(weights(model), weights(again))


def test_names_find_their_optimizer_in_another_order(
    trained: tuple[nn.Module, stepwell.Combined],
) -> None:
    model, optimizer = trained
    again = net(1)
    again.load_state_dict(model.state_dict())
    made = muon_and_adamw(again)
    loaded = stepwell.Combined(dict(reversed(made.items())))
    loaded.load_state_dict(optimizer.state_dict())
    train(model, optimizer, start=3)
    train(again, loaded, start=3)
    assert same(weights(model), weights(again))


def test_without_names_another_order_is_refused() -> None:
    shape = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    one = stepwell.Combined({"a": stepwell.SGD(shape[:1]), "b": stepwell.SGD(shape[1:])})
    other = stepwell.Combined({"b": stepwell.SGD(shape[:1]), "a": stepwell.SGD(shape[1:])})
    with pytest.raises(ValueError, match="group 0: belonged to 'a' in the state dict"):
        other.load_state_dict(one.state_dict())


def test_a_parameter_that_changed_its_rule_is_reported(
    trained: tuple[nn.Module, stepwell.Combined],
) -> None:
    _, optimizer = trained
    again = net(1)
    hidden, others = muon_split(again)
    moved = stepwell.Combined({"muon": stepwell.Muon(hidden), "adamw": stepwell.AdamW(others)})
    assert len(moved.param_groups[0]["params"]) == 2
    hidden, others = muon_split(again, others="2.weight")
    moved = stepwell.Combined({"muon": stepwell.Muon(hidden), "adamw": stepwell.AdamW(others)})
    before = moved.state_dict()
    with pytest.raises(ValueError, match=r"missing: 2\.weight: (step|exp_avg)"):
        moved.load_state_dict(optimizer.state_dict())
    assert moved.state_dict() == before


def test_what_raises_in_the_middle_of_a_load_is_undone() -> None:
    class Refuses(stepwell.SGD):
        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            if self.param_groups[0]["lr"] == 0.125:
                raise RuntimeError("not this rate")

    def make(lr: float) -> stepwell.Combined:
        params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        for param in params:
            param.grad = torch.ones(2)
        parts = {"a": stepwell.Adam(params[:1], lr=lr), "b": Refuses(params[1:], lr=lr)}
        return stepwell.Combined(parts)

    source, target = make(0.125), make(0.5)
    source.step()
    target.step()
    target.step()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(RuntimeError, match="not this rate"):
        target.load_state_dict(source.state_dict())
    assert target.state_dict()["param_groups"] == before["param_groups"]
    assert_same_state(before, target.state_dict())


@pytest.mark.parametrize("make", [muon_and_adamw, with_torch])
def test_a_checkpoint_goes_on_to_the_bit(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    model, again = net(), net(1)
    optimizer, loaded = (stepwell.Combined(make(each)) for each in (model, again))
    schedule, other = (stepwell.lr_scheduler.StepLR(each, 1, 0.5) for each in (optimizer, loaded))
    train(model, optimizer)
    schedule.step()
    checkpoint.save(path, model=model, optimizer=optimizer, scheduler=schedule)
    checkpoint.load(path, model=again, optimizer=loaded, scheduler=other)
    assert [group["lr"] for group in loaded.param_groups] == schedule.get_last_lr()
    train(model, optimizer, start=3)
    train(again, loaded, start=3)
    assert same(weights(model), weights(again))


def test_a_checkpoint_loads_in_another_order_of_optimizers(
    trained: tuple[nn.Module, stepwell.Combined], tmp_path: Path
) -> None:
    model, optimizer = trained
    path = tmp_path / "training.safetensors"
    checkpoint.save(path, model=model, optimizer=optimizer)
    other = net()
    parts = muon_and_adamw(other)
    resumed = stepwell.Combined(dict(reversed(parts.items())))
    checkpoint.load(path, model=other, optimizer=resumed)
    for each in (optimizer, resumed):
        train(model if each is optimizer else other, each)
    assert same(weights(model), weights(other))


def test_a_checkpoint_of_other_rules_is_refused(
    trained: tuple[nn.Module, stepwell.Combined], tmp_path: Path
) -> None:
    model, optimizer = trained
    path = tmp_path / "training.safetensors"
    checkpoint.save(path, model=model, optimizer=optimizer)
    hidden, others = muon_split(model, head="4.weight")
    sgd = stepwell.Combined({"muon": stepwell.Muon(hidden), "adamw": stepwell.SGD(others)})
    words = r"state of Combined\(adamw=AdamW, muon=Muon\), not Combined\(adamw=SGD, muon=Muon\)"
    with pytest.raises(checkpoint.CheckpointError, match=rf"{words}\n"):
        checkpoint.load(path, optimizer=sgd)
    parts = {"first": stepwell.Muon(hidden), "rest": stepwell.AdamW(others)}
    words = r"not Combined\(first=Muon, rest=AdamW\); give the .* saved names: 'adamw', 'muon'\n"
    with pytest.raises(checkpoint.CheckpointError, match=words):
        checkpoint.load(path, optimizer=stepwell.Combined(parts))
    with pytest.raises(checkpoint.CheckpointError, match=r"not AdamW"):
        checkpoint.load(path, optimizer=stepwell.AdamW(model.named_parameters()))


def test_a_checkpoint_may_be_without_the_transforms_of_a_part(tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    model = net()
    named = list(model.named_parameters())
    averaged = stepwell.averaged(stepwell.SGD)
    parts = {"a": averaged(named[:3], lr=0.1), "b": stepwell.AdamW(named[3:])}
    optimizer = stepwell.Combined(parts)
    train(model, optimizer)
    checkpoint.save(path, optimizer=optimizer)
    plain = stepwell.Combined(
        {"a": stepwell.SGD(named[:3], lr=0.1), "b": stepwell.AdamW(named[3:])}
    )
    with pytest.raises(checkpoint.CheckpointError, match="of Average"):
        checkpoint.load(path, optimizer=plain)
    checkpoint.load(path, optimizer=plain, strict=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("make", MAKERS)
def test_copies_go_on_to_the_bit(make: Make, how: str) -> None:
    model = net()
    optimizer = stepwell.Combined(make(model))
    train(model, optimizer)
    both = model, optimizer
    other, copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert copied.param_groups[0] is next(iter(copied.optimizers.values())).param_groups[0]
    train(model, optimizer, start=3)
    train(other, copied, start=3)
    assert same(weights(model), weights(other))


# Schedules, scalers, averages, hooks


def test_one_schedule_drives_all(trained: tuple[nn.Module, stepwell.Combined]) -> None:
    _, optimizer = trained
    ours = stepwell.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    ours.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.015, 0.015]
    theirs = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    theirs.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.0075, 0.0075]


class Careful(stepwell.Optimizer):
    """A rule whose rate is a share."""

    lr: Decay = 0.1

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        return param - group.lr * grad


def test_a_schedule_checks_each_rule_by_its_own_range() -> None:
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    parts = {"adam": stepwell.Adam(params[:1], lr=0.5), "careful": Careful(params[1:], lr=0.5)}
    optimizer = stepwell.Combined(parts)
    schedule = stepwell.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 + step)
    optimizer.step()
    # of the two, Adam alone takes a rate of one
    with pytest.raises(ValueError, match=r"Invalid learning rate: 1\.0 \(Careful"):
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_a_cycle_of_momenta_needs_one_that_all_have() -> None:
    model = net()
    optimizer = stepwell.Combined(two_alike(model))
    schedule = stepwell.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=10)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.95, 0.999)] * 2
    train(model, optimizer)
    schedule.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(2 * optimizer.param_groups[0]["lr"])
    mixed = stepwell.Combined(muon_and_adamw(net()))
    with pytest.raises(ValueError, match="the groups have neither in common; pass cycle_momentum"):
        stepwell.lr_scheduler.OneCycleLR(mixed, max_lr=0.1, total_steps=10)
    stepwell.lr_scheduler.OneCycleLR(mixed, max_lr=0.1, total_steps=10, cycle_momentum=False)


@pytest.mark.parametrize("is_finite", [True, False])
@pytest.mark.parametrize("fused", [None, True])
def test_a_grad_scaler_skips_all_or_none(is_finite: bool, fused: bool | None) -> None:
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    parts = {
        "sgd": stepwell.SGD(params[:1], lr=0.5, fused=fused),
        "adam": stepwell.Adam(params[1:], lr=0.5, fused=fused),
    }
    optimizer = stepwell.Combined(parts)
    assert bool(getattr(optimizer, "_step_supports_amp_scaling", False)) is bool(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = sum(param.sum() for param in params)
    scaler.scale(loss).backward()
    if not is_finite:
        assert params[1].grad is not None
        params[1].grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    moved = [param.flatten()[-1].item() for param in params]
    assert moved == pytest.approx([0.5, 0.5] if is_finite else [1.0, 1.0])
    assert all("found_inf" not in vars(part) for part in (optimizer, *parts.values()))


def test_a_step_that_a_scaler_refuses_moves_nothing() -> None:
    model = net()
    optimizer = stepwell.Combined(muon_and_adamw(model) | {})
    model(torch.ones(1, 4)).square().mean().backward()
    before = weights(model)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), None
    optimizer.step()
    assert same(before, weights(model))
    assert len(optimizer.state) == 0


@pytest.fixture
def global_calls() -> Iterator[list[Any]]:
    calls: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    yield calls
    handle.remove()


def test_hooks_run_once(
    trained: tuple[nn.Module, stepwell.Combined], global_calls: list[Any]
) -> None:
    _, optimizer = trained
    own, part = [], []
    optimizer.register_step_post_hook(lambda *_: own.append(1))
    optimizer.step()
    assert (len(own), global_calls) == (1, [optimizer])
    muon = optimizer.optimizers["muon"]
    muon.register_step_pre_hook(lambda *_: part.append("before"))
    muon.register_step_post_hook(lambda *_: part.append("after"))
    optimizer.step()
    assert (len(own), part, global_calls) == (2, ["before", "after"], [optimizer] * 2)


def test_a_hook_of_one_that_refuses_comes_before_all_steps() -> None:
    model = net()
    optimizer = stepwell.Combined(two_alike(model))

    def refuse(*_: Any) -> None:
        raise RuntimeError("not now")

    optimizer.optimizers["head"].register_step_pre_hook(refuse)
    model(torch.ones(1, 4)).square().mean().backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match="not now"):
        optimizer.step()
    assert same(before, weights(model))


def test_a_hook_may_replace_the_gradients_of_another() -> None:
    size = 100_000
    a, b = (nn.Parameter(torch.ones(size)) for _ in "ab")
    optimizer = stepwell.Combined({"a": stepwell.SGD([a], lr=0.5), "b": stepwell.SGD([b], lr=0.5)})
    parts, held = optimizer.optimizers, []

    def before(*_: Any) -> None:
        a.grad = torch.full((size,), 0.5)

    def after(*_: Any) -> None:
        a.grad = b.grad = None
        # memory that is free now
        held.extend(torch.full((size,), 1e6) for _ in range(8))

    parts["b"].register_step_pre_hook(before)
    parts["a"].register_step_post_hook(after)
    a.grad, b.grad = torch.ones(size), torch.ones(size)
    optimizer.step()
    assert (a.min().item(), a.max().item()) == (0.75, 0.75)
    assert (b.min().item(), b.max().item()) == (0.5, 0.5)


def test_schedules_of_torch_on_one_of_them() -> None:
    model = net()
    optimizer = stepwell.Combined(two_alike(model))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer.optimizers["body"], 1, 0.5)
    train(model, optimizer)
    # would warn that the optimizer has not stepped
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.1]
    model[4].bias.grad = torch.ones(2).to_sparse()
    before = weights(model)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert same(before, weights(model))


def test_averages_of_all_parts() -> None:
    model = net()
    params = list(model.parameters())
    sgd, adamw = map(stepwell.averaged, (stepwell.SGD, stepwell.AdamW))
    parts = {
        "sgd": sgd(params[:3], lr=0.1, average_decay=0.5),
        "adamw": adamw(params[3:], average_decay=0.5),
    }
    optimizer = stepwell.Combined(parts)
    train(model, optimizer)
    before = weights(model)
    averages = [optimizer.state[param]["average"].clone() for param in params]
    with stepwell.averaged_weights(optimizer):
        assert same(weights(model), averages)
        with pytest.raises(RuntimeError, match="cannot take a step inside averaged_weights"):
            optimizer.step()
    assert same(weights(model), before)
    # a part may be used alone, inside and outside of the whole
    alone, state = parts["sgd"], [{**optimizer.state[param]} for param in params]
    with stepwell.averaged_weights(optimizer), stepwell.averaged_weights(alone):
        assert same(weights(model), averages)
        with pytest.raises(RuntimeError, match="cannot take a step inside averaged_weights"):
            alone.step()
    with stepwell.averaged_weights(alone):
        with stepwell.averaged_weights(optimizer):
            assert same(weights(model), averages)
        assert same(weights(model)[:3], averages[:3])
        assert same(weights(model)[3:], before[3:])
        with pytest.raises(RuntimeError, match="cannot take a step inside averaged_weights"):
            optimizer.step()
        # nothing is half done
        assert same(weights(model)[3:], before[3:])
    assert same(weights(model), before)
    for param, kept in zip(params, state, strict=True):
        assert all(torch.equal(optimizer.state[param][key], kept[key]) for key in kept)
    mixed = stepwell.Combined({"sgd": parts["sgd"], "muon": stepwell.Muon([params[4]])})
    with (
        pytest.raises(
            TypeError, match=r"averaged_weights: 'muon' in Combined keeps no averages; aver"
        ),
        stepwell.averaged_weights(mixed),
    ):
        pass


def test_nothing_is_kept_alive() -> None:
    model = net()
    optimizer = stepwell.Combined(muon_and_adamw(model))
    train(model, optimizer)
    refs = [weakref.ref(param) for param in model.parameters()]
    refs += [weakref.ref(v) for s in optimizer.state.values() for v in s.values()]
    gc.collect()
    gc.disable()
    try:
        del model, optimizer
        assert [ref() for ref in refs if ref() is not None] == []
    finally:
        gc.enable()


def test_code_under_compile_writes_to_the_groups() -> None:
    model = net()
    optimizer = stepwell.Combined(two_alike(model))

    def step(factor: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        optimizer.step()

    model(torch.ones(1, 4)).square().mean().backward()
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager")
    compiled(0.5)
    compiled(0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.025]
    with pytest.raises(ValueError, match=r"Invalid learning rate: -0\.0025 \(AdamW"):
        compiled(-1.0)


# Words


def test_what_it_prints(trained: tuple[nn.Module, stepwell.Combined]) -> None:
    _, optimizer = trained
    shown = repr(optimizer).splitlines()
    assert shown[:3] == ["Combined (", "  muon: Muon (", "  Parameter Group 0"]
    assert "    optimizer: muon" in map(str.rstrip, (line[2:] for line in shown))
    assert shown[-1] == ")"
    lines = str(table(optimizer)).splitlines()
    assert any(line.startswith("Muon (lr=0.02") for line in lines)
    assert any(line.startswith("AdamW (lr=0.03") for line in lines)


PARAM = nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("optimizers", "error", "message"),
    [
        ({}, ValueError, "the dict of optimizers is empty"),
        ([stepwell.SGD([PARAM])], TypeError, r"must be a dict of optimizers by name.* got list"),
        ({"a": stepwell.SGD}, TypeError, "'a' is the class SGD: construct it with its parameters"),
        ({"a": Counting([PARAM])}, TypeError, r"'a' \(Counting\) has a state_dict of its own"),
        ({"a": 3}, TypeError, "'a' must be an optimizer, got int"),
        ({0: stepwell.SGD([PARAM])}, TypeError, "names of optimizers must be texts, got 0"),
        ({"a": stepwell.LBFGS([PARAM])}, TypeError, r"'a' \(LBFGS\) evaluates its closure several"),
        ({"a": torch.optim.LBFGS([PARAM])}, TypeError, "evaluates its closure several times"),
        (
            {"a": stepwell.Combined({"b": stepwell.SGD([PARAM])})},
            TypeError,
            r"'a' is a Combined already: list its optimizers in this one",
        ),
        (
            {
                "a": stepwell.SGD([("weight", PARAM)]),
                "b": stepwell.SGD([nn.Parameter(torch.ones(1))]),
            },
            ValueError,
            "should be with/without names",
        ),
    ],
)
def test_what_cannot_be_combined(optimizers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stepwell.Combined(optimizers)
