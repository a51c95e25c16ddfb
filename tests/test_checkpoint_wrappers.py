"""Are optimizers, schedules and models saved and loaded through what frameworks put around them?"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import stepwell
from stepwell.checkpoint import CheckpointError, load, save
from stepwell.wrapped import inner_scheduler

from .compare import assert_same_training


class Accelerated(torch.optim.Optimizer):
    """As accelerate's: another class, without a constructor's call, that hands everything on."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    state: Any = property(lambda self: self.optimizer.state)
    param_groups: Any = property(lambda self: self.optimizer.param_groups)

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()


class Lightning:
    """As Lightning's and Fabric's: of a class that is made for it, with attributes of another."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        kind = type(optimizer)
        self.__class__ = type("Lightning" + kind.__name__, (type(self), kind), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Renamed(Accelerated):
    """As timm's Lookahead: under another name, with an empty state beside the one that counts."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._base_optimizer = optimizer
        self._state: Any = defaultdict(dict)

    state: Any = property(lambda self: self._state)
    param_groups: Any = property(lambda self: self._base_optimizer.param_groups)

    def state_dict(self) -> Any:
        return self._base_optimizer.state_dict()


class Lookahead(Accelerated):
    """As kozistr's: what is inside is a part of its state dict."""

    def state_dict(self) -> Any:
        return {"slow": {}, "base_optimizer": self.optimizer.state_dict()}


class OwnState(torch.optim.Optimizer):
    """One whose state dict has its own state, although the groups are those of another."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.inner = optimizer
        self.param_groups = optimizer.param_groups


class Schedule:
    """As accelerate's: another class, that hands everything on."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def state_dict(self) -> Any:
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.scheduler.load_state_dict(state_dict)


class FabricModule(nn.Module):
    """As Fabric's: parameters have its prefix, the state dict has not."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = self._original_module = module

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._original_module.state_dict(*args, **kwargs)


class PostLocal(Accelerated):
    """As torch's PostLocalSGDOptimizer: with the steps of what averages models."""

    def state_dict(self) -> Any:
        return {**self.optimizer.state_dict(), "step": 7}


class Copied(Lookahead):
    """One that has copies of the groups, so that nothing tells what it is around."""

    param_groups: Any = property(lambda self: [*map(dict, self.optimizer.param_groups)])


class Listed(Accelerated):
    """One whose state dict is a list."""

    def state_dict(self) -> Any:
        return [self.optimizer.state_dict()]


class Raising(Accelerated):
    """One that is not ready yet."""

    def state_dict(self) -> Any:
        raise RuntimeError("not ready")


WRAPPERS: dict[str, Any] = {
    "none": lambda optimizer: optimizer,
    "accelerate": Accelerated,
    "lightning": Lightning,
    "renamed": Renamed,
    "two": lambda optimizer: Accelerated(Lightning(optimizer)),  # type: ignore[arg-type]
}
MODULES: dict[str, Any] = {
    "plain": lambda model: model,
    "parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "fabric": FabricModule,
}


class Training:
    """A model, its optimizer and schedule, and what a framework makes of them."""

    def __init__(self, wrapper: str = "none", module: str = "plain", named: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        outer = MODULES[module](self.model)
        # those who name their parameters name what they are given
        params = outer.named_parameters() if named else outer.parameters()
        self.optimizer = stepwell.averaged(stepwell.AdamW)(params, lr=0.1)
        self.scheduler = stepwell.lr_scheduler.StepLR(self.optimizer, 2)
        is_wrapped = wrapper != "none"
        self.parts = {
            "model": outer,
            "optimizer": WRAPPERS[wrapper](self.optimizer),
            "scheduler": Schedule(self.scheduler) if is_wrapped else self.scheduler,
        }

    def train(self, steps: int = 3) -> None:
        for _ in range(steps):
            self.model(torch.ones(3, 4)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def assert_goes_on_as(self, other: Training) -> None:
        for training in (self, other):
            training.train()
        assert_same_training(self.optimizer, other.optimizer, "resumed")
        assert self.scheduler.state_dict() == other.scheduler.state_dict()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("wrapper", "module"), [*((w, "plain") for w in WRAPPERS), *(("none", m) for m in MODULES)]
)
def test_wrapped_or_not_a_training_goes_on(
    wrapper: str, module: str, named: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    first = Training(wrapper, module, named)
    first.train()
    save(path, **first.parts)
    for other in (Training(), Training(wrapper, module, named), Training("accelerate", "fabric")):
        load(path, **other.parts)
        first.assert_goes_on_as(other)
        save(path, **first.parts)
    plain = Training()
    plain.train()
    save(path, **plain.parts)
    wrapped = Training(wrapper, module, named)
    load(path, **wrapped.parts)
    plain.assert_goes_on_as(wrapped)


@pytest.mark.parametrize(
    ("wrapper", "said"),
    [
        (Lookahead, r"Lookahead around AdamW\+Average, and keeps .*\(base_optimizer, slow\)"),
        (OwnState, r"OwnState around AdamW\+Average, and keeps .*\(state\): .* its inner, and"),
        (PostLocal, r"PostLocal around AdamW\+Average, and keeps more .*\(step\)"),
        (Listed, r"Listed around AdamW\+Average, and keeps .*TypeError\('list is no dict'\)"),
    ],
)
def test_wrappers_that_keep_more_are_refused(wrapper: Any, said: str, tmp_path: Path) -> None:
    training, path = Training(), tmp_path / "a.safetensors"
    training.train()
    wrapped = wrapper(training.optimizer)
    with pytest.raises(TypeError, match=f"^save: optimizer is a {said}"):
        save(path, model=training.model, optimizer=wrapped)
    assert not path.exists()
    save(path, model=training.model, optimizer=training.optimizer)
    with pytest.raises(TypeError, match=f"^load: optimizer is a {said}"):
        load(path, model=training.model, optimizer=wrapped)


def test_wrappers_that_raise_are_not_like_what_raises_inside(tmp_path: Path) -> None:
    training = Training()

    class Outer(Raising):
        def state_dict(self) -> Any:
            return super().state_dict()

    twice = Outer(Raising(training.optimizer))
    with pytest.raises(TypeError, match=r"around Raising, .*raises RuntimeError\('not ready'\)"):
        save(tmp_path / "a.safetensors", model=training.model, optimizer=twice)

    class Unready(Schedule):
        def state_dict(self) -> Any:
            raise RuntimeError("not ready")

    class Inside(stepwell.lr_scheduler.StepLR):
        def state_dict(self) -> Any:
            raise RuntimeError("not ready")

    schedule = Unready(Inside(training.optimizer, 2))
    assert inner_scheduler(schedule) is schedule


def test_what_has_no_groups_in_its_state_dict_is_refused(tmp_path: Path) -> None:
    training = Training(named=True)
    said = r"^save: optimizer is a Copied, whose state_dict\(\) has no 'param_groups'"
    with pytest.raises(TypeError, match=said):
        save(tmp_path / "a.safetensors", optimizer=Copied(training.optimizer))


@pytest.mark.parametrize("given", [SimpleNamespace(), {"state": {}, "param_groups": []}])
def test_what_is_no_optimizer_is_refused(given: Any, tmp_path: Path) -> None:
    for what, function in (("save", save), ("load", load)):
        with pytest.raises(TypeError, match=rf"^{what}: optimizer must be a torch\.optim\.Opt"):
            function(tmp_path / "a.safetensors", optimizer=given)


def test_files_that_name_a_wrapped_schedule_load(tmp_path: Path, monkeypatch: Any) -> None:
    """Earlier versions wrote them."""
    training, path = Training("accelerate"), tmp_path / "a.safetensors"
    training.train()
    with monkeypatch.context() as patched:
        patched.setattr("stepwell.checkpoint.saving.inner_scheduler", lambda given: given)
        save(path, **training.parts)
    other = Training("accelerate")
    load(path, **other.parts)
    training.assert_goes_on_as(other)
    with pytest.raises(CheckpointError, match="state of Schedule, not StepLR"):
        load(path, **Training().parts)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_tables_show_what_is_inside_of_wrappers(wrapper: str) -> None:
    """Also of one that keeps more, which only loses that when it is saved."""
    optimizer = Training().optimizer
    hidden, others = stepwell.groups.muon_split(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    parts = {"muon": stepwell.Muon(hidden), "adamw": stepwell.AdamW(others)}
    combined = stepwell.Combined(parts)
    for each in (optimizer, combined):
        expected = str(stepwell.groups.table(each))
        assert str(stepwell.groups.table(WRAPPERS[wrapper](each))) == expected
        assert str(stepwell.groups.table(Lookahead(each))) == expected
    assert expected.index("Muon (lr=0.001") < expected.index("AdamW (lr=0.001")


def test_averages_of_wrapped_optimizers_are_shown() -> None:
    for wrapper in WRAPPERS:
        training = Training(wrapper)
        training.train()
        before = [param.detach().clone() for param in training.model.parameters()]
        with (
            stepwell.averaged_weights(training.parts["optimizer"]),
            # which does nothing inside of itself
            stepwell.averaged_weights(training.optimizer),
        ):
            for param, was in zip(training.model.parameters(), before, strict=True):
                assert torch.equal(param, training.optimizer.state[param]["average"]) is False
                assert not torch.equal(param, was)
