"""Do pickles and copies of an optimizer lose nothing, and share nothing?"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch

import stepwell
from stepwell.language import Average, ClipNorm

from .shell_cases import (
    SignDescent,
    Twin,
    assert_same,
    each_twin,
    fill_grads,
    refused,
    train,
    weights,
)

pytestmark = pytest.mark.tiny

Clipped = stepwell.compose(stepwell.AdamW, ClipNorm)


def by_pickle(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def by_torch_save(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [by_pickle, by_torch_save, copy.deepcopy]
each_way = pytest.mark.parametrize("way", WAYS)


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@each_twin
@each_way
def test_a_copy_goes_on_to_the_same_bits(twin, way):
    optimizer = twin.ours(weights())
    train(optimizer)
    twin = way(optimizer)
    assert type(twin) is type(optimizer)
    assert not set(map(id, parameters(twin))) & set(map(id, parameters(optimizer)))
    for trained in (optimizer, twin):
        train(trained, seed=1)
    assert_same([p.detach() for p in parameters(twin)], [p.detach() for p in parameters(optimizer)])
    assert_same(twin.state_dict(), optimizer.state_dict())


@each_way
def test_a_copy_made_before_the_first_step(way):
    optimizer = way(stepwell.AdamW(weights()))
    train(optimizer)
    assert len(optimizer.state) == 3
    assert optimizer._warned_capturable_if_run_uncaptured


@each_way
def test_groups_go_on_to_be_checked(way):
    optimizer = way(stepwell.AdamW([{"params": weights(), "name": "x"}]))
    group = optimizer.param_groups[0]
    assert "AdamW, group 0" in str(refused(lambda: group.__setitem__("lr", -1)))
    assert group["name"] == "x"


@each_way
def test_the_flag_for_scalers_stays(way):
    optimizer = way(stepwell.AdamW(weights(), fused=True))
    assert optimizer._step_supports_amp_scaling
    twin = way(torch.optim.AdamW(weights(), fused=True))
    assert not hasattr(twin, "_step_supports_amp_scaling"), "torch loses it: this is what we mend"


@each_way
def test_hooks_and_patches_do_not_come_along(way):
    optimizer = stepwell.SGD(weights())
    optimizer.register_step_post_hook(lambda *_: pytest.fail("a hook came along"))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "step" in vars(optimizer)
    twin = way(optimizer)
    assert "step" not in vars(twin)
    assert not hasattr(twin, "_opt_called")
    twin.step()
    assert twin.param_groups[0]["initial_lr"] == 1e-3


class Counting(stepwell.SGD):
    """A subclass with an attribute of its own, which torch would lose."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.count = 0
        self.first = self.param_groups[0]["params"][0]

    def step(self, closure=None):
        self.count += 1
        return super().step(closure)


@each_way
def test_attributes_of_a_subclass_come_along(way):
    optimizer = Counting(weights())
    optimizer.step()
    twin = way(optimizer)
    twin.step()
    assert (optimizer.count, twin.count) == (1, 2)
    assert twin.first is twin.param_groups[0]["params"][0]


def test_what_torch_keeps_is_all_there_is():
    optimizer = stepwell.AdamW(weights())
    train(optimizer)
    kept = optimizer.__getstate__()
    assert kept.keys() == {"defaults", "state", "param_groups"}
    assert kept["state"] is optimizer.state


@each_way
def test_a_composed_rule(way):
    optimizer = Clipped(weights(), lr=0.5, max_norm=2.0)
    train(optimizer)
    twin = way(optimizer)
    assert type(twin) is Clipped
    assert twin.param_groups[0]["max_norm"] == 2.0
    train(twin)


@each_way
def test_a_composition_of_compositions(way):
    optimizer = stepwell.compose(stepwell.compose(SignDescent, Average), ClipNorm)(weights())
    assert type(way(optimizer)) is type(optimizer)


def test_a_rule_defined_in_a_function_can_be_copied():
    class Local(stepwell.Optimizer):
        lr: stepwell.language.NonNegative = 0.5

        @staticmethod
        def update(param, grad, state, group):
            return param - group.lr * grad

    optimizer = copy.deepcopy(Local(weights()))
    before = [p.detach().clone() for p in parameters(optimizer)]
    fill_grads(parameters(optimizer), 0)
    optimizer.step()
    for param, old in zip(parameters(optimizer), before, strict=True):
        torch.testing.assert_close(param.detach(), old - 0.5 * param.grad)


def test_an_older_pickle_lacks_a_hyperparameter():
    optimizer = stepwell.AdamW(weights())
    older = {
        "defaults": {"lr": 0.1},
        "state": optimizer.state,
        "param_groups": [{"params": weights(), "lr": 0.1}],
    }
    optimizer.__setstate__(older)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["fused"]) == (0.1, (0.9, 0.999), None)
    assert optimizer.defaults["differentiable"] is False
    train(optimizer)


def test_a_shallow_copy_shares_parameters_and_state():
    optimizer = Twin("AdamW").ours(weights())
    train(optimizer)
    twin = copy.copy(optimizer)
    assert parameters(twin)[0] is parameters(optimizer)[0]
    assert twin.state is optimizer.state
    assert twin.defaults is optimizer.defaults
    # as torch's: what is written into the groups of one is read by the other
    assert twin.param_groups is optimizer.param_groups
    twin.param_groups[0]["lr"] = 0.25
    assert optimizer.param_groups[0]["lr"] == 0.25
    with pytest.raises(ValueError, match="group 0: lr must be"):
        twin.param_groups[0]["lr"] = -1.0


class Refuses:
    """Something that cannot be copied, as a file or a lock."""

    def __reduce__(self):
        raise RuntimeError("not me")


ATTACHED = {
    "lock": threading.Lock(),
    "function": lambda: 0,
    "generator": (i for i in ()),
    "other": Refuses(),
    "in a list": [1, {"a": threading.Lock()}],
}


@pytest.mark.parametrize("what", ATTACHED)
@each_way
def test_what_cannot_be_copied_stays_behind(way, what):
    optimizer = Counting(weights())
    train(optimizer)
    optimizer.attached, optimizer.note = ATTACHED[what], {"kept": [1, 2]}
    twin = way(optimizer)
    assert twin.note == {"kept": [1, 2]}
    assert twin.count == optimizer.count
    # deepcopy takes functions as they are
    assert hasattr(twin, "attached") is (way is copy.deepcopy and what == "function")
    assert_same(twin.state_dict(), optimizer.state_dict())


@each_way
def test_what_is_attached_may_hold_the_optimizer(way):
    optimizer = stepwell.SGD(weights())
    optimizer.trainer = {"optimizer": optimizer}
    twin = way(optimizer)
    assert twin.trainer["optimizer"] is twin
    optimizer.trainer["lock"] = threading.Lock()
    assert not hasattr(way(optimizer), "trainer")


ODD_NUMBERS = {
    "float64": np.float64(0.25),
    "float32": np.float32(0.25),
    "array": np.array(0.25),
    "fraction": Fraction(1, 4),
}


@pytest.mark.parametrize("number", ODD_NUMBERS)
def test_files_of_what_an_optimizer_shows_run_no_code(number):
    """`torch.load` takes numbers of Python alone; those of numpy come from searches and files."""
    lr = ODD_NUMBERS[number]
    params = [{"params": weights(), "lr": lr, "lr_scale": np.float64(2.0), "betas": [lr, lr]}]
    optimizer = stepwell.AdamW(params, lr=lr, weight_decay=np.int64(1), amsgrad=np.bool_(True))
    train(optimizer)
    optimizer.param_groups[0]["eps"] = np.float64(0.5)
    for what in (optimizer.state_dict(), optimizer.param_groups, optimizer.defaults):
        file = io.BytesIO()
        torch.save(what, file)
        file.seek(0)
        assert_same(torch.load(file, weights_only=True), what)
    group = optimizer.param_groups[0]
    assert [type(group[key]) for key in ("lr", "eps", "weight_decay", "amsgrad", "lr_scale")] == [
        *(float, float, int, bool, float)
    ]
    assert group["betas"] == (0.25, 0.25)


@pytest.mark.parametrize("times", [False, True])
@each_twin
def test_files_of_every_rule_run_no_code(twin, times):
    lr = stepwell.groups.Times(0.5) if times else 0.1
    optimizer = twin.ours([{"params": weights(), "lr": lr}])
    train(optimizer)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), optimizer.param_groups, optimizer.defaults], file)
    file.seek(0)
    saved, groups, defaults = torch.load(file, weights_only=True)
    assert groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(saved)
    assert defaults == optimizer.defaults
