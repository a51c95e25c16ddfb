"""Is every schedule torch's own by value, message and state_dict, and better where torch errs?"""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as torch_schedulers

import stepwell
from stepwell import lr_scheduler

pytestmark = pytest.mark.tiny

# torch multiplies step by step, a curve is closed: n products differ by n roundings of float64
CHAINED = 1e-13
# the same, for a rate that is kept in a float32 Tensor
CHAINED_TENSOR = 1e-5


def optimizer(*rates: float | torch.Tensor) -> Optimizer:
    """An optimizer with one group for each rate."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates]
    return SGD(groups, lr=1.0)


def both(*rates: float, **arguments: float):
    """torch's StepLR and stepwell's, each on an optimizer of its own."""
    twins = (torch_schedulers.StepLR, lr_scheduler.StepLR)
    return [twin(optimizer(*rates), **arguments) for twin in twins]


def advance(scheduler, steps: int = 1) -> None:
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()


def rates(scheduler) -> list[float]:
    """What the groups hold, having checked that get_last_lr says the same."""
    held = [number(group["lr"]) for group in scheduler.optimizer.param_groups]
    assert held == [number(rate) for rate in scheduler.get_last_lr()]
    return held


def number(rate: float | torch.Tensor) -> float:
    return rate.detach().item() if isinstance(rate, torch.Tensor) else rate


def test_a_star_brings_torchs_names_and_ours():
    names = {}
    exec("from stepwell.lr_scheduler import *", names)
    assert names.keys() >= {*torch_schedulers.__all__, "SWALR", "Schedule", "absolute", "parse"}
    public = {name for name in vars(lr_scheduler.curves) if name[0].isalpha()}
    assert names.keys() >= {name for name in public if callable(getattr(lr_scheduler, name, None))}


@pytest.mark.parametrize("step_size", [1, 2, 7, 100])
@pytest.mark.parametrize("gamma", [0, 0.1, 0.5, 1, 1.5])
def test_rates_are_torchs_at_every_step(step_size, gamma):
    torchs, ours = both(0.3, 0.0, 7, step_size=step_size, gamma=gamma)
    for _ in range(60):
        assert ours.last_epoch == torchs.last_epoch
        assert rates(ours) == pytest.approx(rates(torchs), rel=CHAINED, abs=0)
        advance(torchs)
        advance(ours)


def test_an_untouched_rate_is_the_closed_form_to_the_bit():
    scheduler = lr_scheduler.StepLR(optimizer(0.3), step_size=3, gamma=0.7)
    for step in range(200):
        assert rates(scheduler) == [0.3 * 0.7 ** (step // 3)]
        advance(scheduler)


def test_defaults_and_attributes_are_torchs():
    torchs, ours = both(0.3, 0.1, step_size=5)
    assert isinstance(ours, torch_schedulers.LRScheduler)
    assert (ours.step_size, ours.gamma, ours.last_epoch) == (5, 0.1, 0)
    assert ours.base_lrs == torchs.base_lrs == [0.3, 0.1]
    assert [group["initial_lr"] for group in ours.optimizer.param_groups] == [0.3, 0.1]


def test_a_rate_changed_by_hand_stays_changed():
    torchs, ours = both(0.3, 0.2, step_size=3, gamma=0.5)
    for step in range(20):
        if step in (2, 7, 9):
            for scheduler in (torchs, ours):
                scheduler.optimizer.param_groups[0]["lr"] *= 0.77
        advance(torchs)
        advance(ours)
        assert rates(ours) == pytest.approx(rates(torchs), rel=CHAINED)


def test_a_group_thawed_by_hand_follows_the_curve():
    torchs, ours = both(0.0, step_size=3, gamma=0.5)
    for scheduler in (torchs, ours):
        advance(scheduler, 4)
        scheduler.optimizer.param_groups[0]["lr"] = 0.2
        advance(scheduler, 4)
    assert rates(ours) == rates(torchs) == [0.1]


def test_two_schedules_on_one_optimizer_multiply():
    twins = [optimizer(0.3), optimizer(0.3)]
    pairs = [
        [module.StepLR(twin, 2, 0.5), module.StepLR(twin, 3, 0.7)]
        for module, twin in zip((torch_schedulers, lr_scheduler), twins, strict=True)
    ]
    for _ in range(20):
        for twin, pair in zip(twins, pairs, strict=True):
            twin.step()
            for scheduler in pair:
                scheduler.step()
        expected, held = (twin.param_groups[0]["lr"] for twin in twins)
        assert held == pytest.approx(expected, rel=CHAINED)


def test_torchs_sequence_and_chain_take_our_schedules():
    def sequence(module):
        held = optimizer(0.3)
        parts = [module.StepLR(held, 2, 0.5), module.StepLR(held, 3, 0.7)]
        return torch_schedulers.SequentialLR(held, parts, milestones=[5])

    def chain(module):
        held = optimizer(0.3)
        return torch_schedulers.ChainedScheduler(
            [module.StepLR(held, 2, 0.5), module.StepLR(held, 3, 0.7)]
        )

    for compose in (sequence, chain):
        torchs, ours = compose(torch_schedulers), compose(lr_scheduler)
        for _ in range(20):
            assert rates(ours) == pytest.approx(rates(torchs), rel=CHAINED)
            advance(torchs)
            advance(ours)


class TestTensorRates:
    @pytest.mark.parametrize("shape", [(), (1,)])
    def test_are_filled_in_place_and_never_aliased(self, shape):
        rate = torch.full(shape, 0.3)
        scheduler = lr_scheduler.StepLR(optimizer(rate), step_size=2, gamma=0.5)
        held = scheduler.optimizer.param_groups[0]["lr"]
        advance(scheduler, 2)
        last = scheduler.get_last_lr()[0]
        assert scheduler.optimizer.param_groups[0]["lr"] is held
        assert last.shape == shape
        last.fill_(9)
        assert held.item() == pytest.approx(0.15)
        assert scheduler.base_lrs[0].item() == pytest.approx(0.3)

    def test_are_torchs_and_keep_a_change_by_hand(self):
        torchs, ours = (
            module.StepLR(optimizer(torch.tensor(0.3)), 2, 0.7)
            for module in (torch_schedulers, lr_scheduler)
        )
        for step in range(30):
            if step == 9:
                for scheduler in (torchs, ours):
                    scheduler.optimizer.param_groups[0]["lr"].mul_(3)
            advance(torchs)
            advance(ours)
            assert rates(ours) == pytest.approx(rates(torchs), rel=CHAINED_TENSOR)

    def test_untouched_are_the_closed_form_to_the_bit(self):
        scheduler = lr_scheduler.StepLR(optimizer(torch.tensor(0.3)), 3, 0.7)
        for step in range(60):
            assert rates(scheduler) == [(torch.tensor(0.3) * 0.7 ** (step // 3)).item()]
            advance(scheduler)

    def test_that_require_a_gradient_are_scheduled_too(self):
        rate = torch.tensor(0.3, requires_grad=True)
        scheduler = lr_scheduler.StepLR(optimizer(rate), 1, 0.5)
        advance(scheduler)
        assert rates(scheduler) == pytest.approx([0.15])
        assert rate.requires_grad
        copy.deepcopy(scheduler)


class TestState:
    def test_has_torchs_layout(self):
        torchs, ours = both(0.3, step_size=5)
        assert ours.state_dict().keys() == torchs.state_dict().keys()
        assert ours.state_dict() == torchs.state_dict()

    @pytest.mark.parametrize("stop", [0, 1, 2, 3, 11])
    @pytest.mark.parametrize("source", [torch_schedulers.StepLR, lr_scheduler.StepLR])
    @pytest.mark.parametrize("target", [torch_schedulers.StepLR, lr_scheduler.StepLR])
    def test_is_loaded_from_torch_and_by_torch(self, source, target, stop):
        whole = source(optimizer(0.3, 0.2), 3, 0.7)
        advance(whole, stop)
        resumed = target(optimizer(1.0, 1.0), 50, 0.1)
        resumed.optimizer.load_state_dict(whole.optimizer.state_dict())
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        for _ in range(10):
            advance(whole)
            advance(resumed)
            assert resumed.last_epoch == whole.last_epoch
            assert rates(resumed) == pytest.approx(rates(whole), rel=CHAINED)

    @pytest.mark.parametrize("optimizer_first", [True, False])
    def test_resumes_to_the_bit_in_either_order(self, optimizer_first):
        whole = lr_scheduler.StepLR(optimizer(0.3), 3, 0.7)
        advance(whole, 17)
        saved = whole.optimizer.state_dict(), whole.state_dict()
        held = optimizer(0.3)
        if optimizer_first:
            held.load_state_dict(saved[0])
        resumed = lr_scheduler.StepLR(held, 3, 0.7)
        resumed.load_state_dict(saved[1])
        if not optimizer_first:
            held.load_state_dict(saved[0])
        advance(whole, 13)
        advance(resumed, 13)
        assert rates(resumed) == rates(whole)

    def test_survives_a_file_that_may_hold_no_code(self, tmp_path):
        scheduler = lr_scheduler.StepLR(optimizer(0.3), 3, 0.7)
        advance(scheduler, 4)
        torch.save(scheduler.state_dict(), tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        assert loaded == scheduler.state_dict()

    def test_survives_pickle_and_deepcopy_without_a_false_warning(self):
        for duplicate in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
            scheduler = duplicate(lr_scheduler.StepLR(optimizer(0.3), 1, 0.5))
            advance(scheduler)
            assert rates(scheduler) == [0.15]

    def test_loaded_knows_that_the_optimizer_has_stepped(self):
        saved = lr_scheduler.StepLR(optimizer(0.3), 3, 0.7)
        advance(saved, 4)
        resumed = lr_scheduler.StepLR(optimizer(0.3), 3, 0.7)
        resumed.load_state_dict(saved.state_dict())
        resumed.step()
        assert resumed.last_epoch == 5

    def test_last_epoch_resumes_as_in_torch(self):
        for module in (torch_schedulers, lr_scheduler):
            held = optimizer(0.3)
            held.param_groups[0].update(initial_lr=0.3, lr=0.3 * 0.5)
            scheduler = module.StepLR(held, 2, 0.5, last_epoch=2)
            assert scheduler.last_epoch == 3
            advance(scheduler)
            assert rates(scheduler) == [0.075]

    def test_is_refused_whole_if_an_argument_is_out_of_range(self):
        scheduler = lr_scheduler.StepLR(optimizer(0.3), 2, 0.5)
        before = copy.deepcopy(scheduler.state_dict())
        with pytest.raises(ValueError, match="gamma"):
            scheduler.load_state_dict({"last_epoch": 7, "gamma": math.nan})
        assert scheduler.state_dict() == before


def test_groups_may_join_and_leave():
    torchs, ours = both(0.3, step_size=2, gamma=0.5)
    for scheduler in (torchs, ours):
        advance(scheduler, 3)
        scheduler.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.8})
    for _ in range(8):
        advance(torchs)
        advance(ours)
        assert rates(ours) == pytest.approx(rates(torchs), rel=CHAINED)
    del ours.optimizer.param_groups[0]
    advance(ours)
    assert len(ours.get_last_lr()) == 1


class TestDeprecatedEpoch:
    def test_goes_there_by_the_closed_form_and_warns_in_torchs_words(self):
        torchs, ours = both(0.3, step_size=2, gamma=0.7)
        for epoch in (5, 2, 0, 30):
            for scheduler in (torchs, ours):
                scheduler.optimizer.step()
                with pytest.warns(UserWarning, match="The epoch parameter in `scheduler.step"):
                    scheduler.step(epoch)
            assert rates(ours) == rates(torchs)
            assert ours.last_epoch == epoch

    def test_get_lr_outside_of_a_step_warns(self):
        for scheduler in both(0.3, step_size=2):
            with pytest.warns(UserWarning, match="please use `get_last_lr"):
                assert scheduler.get_lr() == [0.3]


class TestOrderOfSteps:
    def test_swapped_lines_warn_once_in_torchs_words(self):
        for scheduler in both(0.3, step_size=2):
            with pytest.warns(UserWarning, match="Detected call of `lr_scheduler.step") as caught:
                scheduler.step()
            assert caught[0].filename == __file__
            scheduler.step()

    def test_a_step_that_a_scaler_refused_does_not_warn(self):
        scheduler = lr_scheduler.StepLR(optimizer(0.3), 2)
        weight = scheduler.optimizer.param_groups[0]["params"][0]
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale((weight * math.inf).sum()).backward()
        scaler.step(scheduler.optimizer)
        scaler.update()
        assert weight.tolist() == [1, 1]
        scheduler.step()

    @pytest.mark.parametrize("module", [torch.optim, stepwell])
    @pytest.mark.parametrize("unscaled_first", [False, True])
    def test_nor_does_it_with_the_gradients_gone(self, module, unscaled_first):
        weight = torch.nn.Parameter(torch.ones(2))
        scheduler = lr_scheduler.StepLR(module.SGD([weight], lr=0.3), 2)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale((weight * math.inf).sum()).backward()
        if unscaled_first:
            scaler.unscale_(scheduler.optimizer)
        scaler.step(scheduler.optimizer)
        scaler.update()
        scheduler.optimizer.zero_grad()
        assert weight.tolist() == [1, 1]
        scheduler.step()

    @pytest.mark.parametrize("module", [torch.optim, stepwell])
    def test_swapped_lines_around_a_scaler_warn(self, module):
        weight = torch.nn.Parameter(torch.ones(2))
        scheduler = lr_scheduler.StepLR(module.SGD([weight], lr=0.3), 2)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale((weight * 2).sum()).backward()
        scaler.unscale_(scheduler.optimizer)
        with pytest.warns(UserWarning, match="Detected call"):
            scheduler.step()
        scaler.step(scheduler.optimizer)

    @pytest.mark.parametrize("module", [torch.optim, stepwell])
    @pytest.mark.parametrize("way", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])
    def test_copies_of_a_watched_optimizer_hold_nothing_of_schedules(self, module, way):
        held = module.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.3)
        lr_scheduler.StepLR(held, 2)
        assert getattr(way(held), "_step_supports_amp_scaling", False) is False

    @pytest.mark.parametrize("module", [torch_schedulers, lr_scheduler])
    @pytest.mark.parametrize(
        "made",
        [
            lambda module, held: module.SequentialLR(
                held, [lr_scheduler.ConstantLR(held), lr_scheduler.StepLR(held, 2)], [4]
            ),
            lambda module, held: module.ChainedScheduler([lr_scheduler.ConstantLR(held)]),
            lambda module, held: module.ChainedScheduler([lr_scheduler.LambdaLR(held, [abs])]),
            lambda _, held: lr_scheduler.CosineAnnealingWarmRestarts(held, 2),
        ],
    )
    def test_the_warning_names_the_line_of_the_user(self, module, made):
        scheduler = made(module, optimizer(0.3))
        with pytest.warns(UserWarning, match="Detected call") as caught:
            scheduler.step()
        assert [warning.filename for warning in caught] == [__file__]

    def test_a_plateau_says_nothing_as_torchs_does(self):
        for module in (torch_schedulers, lr_scheduler):
            module.ReduceLROnPlateau(optimizer(0.3)).step(1.0)

    def test_finite_gradients_alone_are_no_excuse(self):
        scheduler = lr_scheduler.StepLR(optimizer(0.3), 2)
        weight = scheduler.optimizer.param_groups[0]["params"][0]
        weight.grad = torch.ones(2).to_sparse()
        with pytest.warns(UserWarning, match="Detected call"):
            scheduler.step()

    def test_a_step_wrapped_by_others_is_trusted(self):
        scheduler = lr_scheduler.StepLR(optimizer(0.3), 2)
        scheduler.optimizer.step = lambda: None
        scheduler.step()

    def test_torchs_schedules_beside_ours_stay_quiet(self):
        held = optimizer(0.3)
        pair = [torch_schedulers.ExponentialLR(held, 0.9), lr_scheduler.StepLR(held, 2)]
        held.step()
        for scheduler in pair:
            scheduler.step()

    def test_nothing_is_left_on_the_optimizer_after_the_first_step(self):
        scheduler = lr_scheduler.StepLR(optimizer(0.3), 2)
        advance(scheduler)
        assert not scheduler.optimizer._optimizer_step_post_hooks

    def test_the_optimizer_does_not_keep_the_schedule_alive(self):
        held = optimizer(0.3)
        scheduler = weakref.ref(lr_scheduler.StepLR(held, 2))
        gc.collect()
        assert scheduler() is None


class TestOnOurOptimizers:
    @pytest.fixture
    def held(self) -> Optimizer:
        return stepwell.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.3)

    @pytest.mark.parametrize("module", [torch_schedulers, lr_scheduler])
    def test_the_rate_that_is_written_is_the_rate_of_the_step(self, held, module):
        scheduler = module.StepLR(held, step_size=1, gamma=0.5)
        weight = held.param_groups[0]["params"][0]
        weight.grad = torch.ones(2)
        advance(scheduler, 3)
        # 1 - 0.3 - 0.15 - 0.075, each rounded to float32
        assert weight.tolist() == pytest.approx([0.475] * 2, rel=1e-6)

    def test_swapped_lines_warn(self, held):
        with pytest.warns(UserWarning, match="Detected call"):
            lr_scheduler.StepLR(held, 2).step()

    def test_a_step_that_skips_by_itself_does_not_warn_with_the_gradients_gone(self):
        held = stepwell.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.3, fused=True)
        scheduler = lr_scheduler.StepLR(held, 2)
        weight = held.param_groups[0]["params"][0]
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale((weight * math.inf).sum()).backward()
        scaler.step(held)
        scaler.update()
        held.zero_grad()
        assert weight.tolist() == [1, 1]
        scheduler.step()


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"step_size": 0}, ValueError, "step_size.*0.*StepLR.*whole number.*1"),
            ({"step_size": -3}, ValueError, "step_size.*-3.*StepLR"),
            ({"step_size": 2.5}, TypeError, "step_size.*2.5.*StepLR.*whole number"),
            ({"step_size": True}, TypeError, "step_size.*True"),
            ({"step_size": "10"}, TypeError, "step_size.*'10'"),
            ({"step_size": None}, TypeError, "step_size.*None"),
            ({"step_size": 2, "gamma": math.nan}, ValueError, r"gamma.*nan.*StepLR.*\[0, inf\)"),
            ({"step_size": 2, "gamma": math.inf}, ValueError, "gamma.*inf"),
            ({"step_size": 2, "gamma": -0.1}, ValueError, "gamma.*-0.1"),
            ({"step_size": 2, "gamma": "0.1"}, TypeError, "gamma.*'0.1'"),
            ({"step_size": 2, "last_epoch": -2}, ValueError, "last_epoch.*-2"),
            ({"step_size": 2, "last_epoch": 1.0}, TypeError, "last_epoch.*1.0"),
        ],
    )
    def test_say_owner_argument_range_and_value_and_change_nothing(self, arguments, error, words):
        held = optimizer(0.3)
        with pytest.raises(error, match=words):
            lr_scheduler.StepLR(held, **arguments)
        assert "initial_lr" not in held.param_groups[0]
        assert not held._optimizer_step_post_hooks

    def test_begin_with_torchs_words(self):
        for module in (torch_schedulers, lr_scheduler):
            with pytest.raises(TypeError, match=r"^dict is not an Optimizer"):
                module.StepLR({}, 2)
            with pytest.raises(
                KeyError,
                match=r"param 'initial_lr' is not specified in param_groups\[0\] when "
                r"resuming scheduler with last_epoch >= 0\.",
            ):
                module.StepLR(optimizer(0.3), 2, last_epoch=3)


def test_a_users_own_schedule_needs_get_lr_alone():
    class Halve(lr_scheduler.LRScheduler):
        def get_lr(self):
            return [group["lr"] / 2 for group in self.optimizer.param_groups]

    scheduler = Halve(optimizer(1.0))
    advance(scheduler)
    with pytest.warns(UserWarning, match="epoch parameter"):
        scheduler.step(9)
    assert rates(scheduler) == [0.125]
    assert scheduler.last_epoch == 9


def test_a_users_own_schedule_along_a_curve_needs_the_curve_alone():
    class Warmup(lr_scheduler.CurveLR):
        curve = lr_scheduler.linear(0.2, 0.8, 3)

    scheduler = Warmup(optimizer(1.0))
    seen = []
    for _ in range(5):
        seen += rates(scheduler)
        advance(scheduler)
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_nothing_warns_in_an_ordinary_loop():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance(lr_scheduler.StepLR(optimizer(0.3), 2), 5)
