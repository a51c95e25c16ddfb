"""Is a step, from the outside, torch's: closures, scalers, schedulers, profiles, zero_grad?"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import stepwell

from .cases import REQUESTS
from .shell_cases import (
    assert_same,
    each_name,
    each_twin,
    fill_grads,
    named_weights,
    ours,
    snapshot,
    theirs,
    train,
    weights,
)


@each_name
def test_a_closure_is_run_with_gradients_and_its_result_returned(name):
    found = []
    for library in (ours, theirs):
        params = weights([(3,)])
        optimizer = library(name)(params, lr=0.1)

        def closure(optimizer=optimizer, params=params):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = (params[0] ** 2).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            losses = [optimizer.step(closure).item() for _ in range(3)]
        found.append((losses, params[0].detach()))
    torch.testing.assert_close(found[0], found[1])
    assert ours(name)(weights()).step() is None


def test_the_closure_comes_before_the_step():
    params = weights([(3,)])
    before = params[0].detach().clone()
    optimizer = stepwell.SGD(params, lr=1.0)
    seen = []
    optimizer.step(lambda: seen.append(params[0].detach().clone()))
    assert torch.equal(seen[0], before)


# Loss scaling


def scaled(name, scaler, grads, **options):
    """An optimizer stepped once for each list of gradients, through a scaler."""
    params = weights()
    optimizer = (ours if options.pop("library", "") != "torch" else theirs)(name)(params, **options)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    return optimizer, params


def gradients(steps, scale=1.0):
    draw = torch.Generator().manual_seed(3)
    return [[scale * torch.randn(p.shape, generator=draw) for p in weights()] for _ in range(steps)]


@pytest.mark.parametrize("fused", [None, True])
@each_name
def test_a_scaler_scales_back(name, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    _, found = scaled(name, scaler, gradients(3, 8.0), fused=fused, lr=0.1)
    optimizer = ours(name)(weights(), lr=0.1)
    params = optimizer.param_groups[0]["params"]
    for step in gradients(3):
        for param, grad in zip(params, step, strict=True):
            param.grad = grad
        optimizer.step()
    torch.testing.assert_close(found, params)


@pytest.mark.parametrize("fused", [None, True])
@each_twin
def test_a_step_with_an_infinite_gradient_is_none(twin, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    params = weights()
    optimizer = twin.ours(params, fused=fused)
    train(optimizer, 2)
    before = snapshot(optimizer)
    fill_grads(params, 9)
    params[1].grad[2] = torch.inf
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert_same(snapshot(optimizer), before)
    assert scaler.get_scale() == 4.0
    assert "found_inf" not in vars(optimizer)
    assert "grad_scale" not in vars(optimizer)


def test_an_infinite_first_step_makes_no_state():
    params = weights()
    optimizer = stepwell.AdamW(params)
    fill_grads(params, 0)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert not optimizer.state
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


@each_name
def test_who_handles_the_scale_is_decided_as_in_torch(name):
    """Trainers refuse to clip if the optimizer says that it unscales: it does so when fused."""
    for options in ({}, {"fused": True}, {"fused": False}, {"foreach": True}):
        made = [library(name)(weights(), **options) for library in (ours, theirs)]
        flags = [getattr(m, "_step_supports_amp_scaling", False) for m in made]
        assert flags[0] == flags[1]


def test_gradients_are_unscaled_where_others_see_them():
    params = weights([(2,)])
    optimizer = stepwell.SGD(params, fused=True)
    params[0].grad = torch.tensor([8.0, 16.0])
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()
    assert params[0].grad.tolist() == [1.0, 2.0]


def test_the_scale_may_come_and_go():
    params = weights([(2,)])
    optimizer = stepwell.SGD(params, lr=1.0)
    for scale in (None, 2.0, None, 4.0):
        before = params[0].detach().clone()
        params[0].grad = torch.tensor([4.0, 8.0])
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
        expected = before - torch.tensor([4.0, 8.0]) / (scale or 1.0)
        torch.testing.assert_close(params[0].detach(), expected)
        vars(optimizer).pop("grad_scale", None)


# Schedulers


@each_name
def test_torchs_schedulers_drive_it(name):
    found = []
    for library in (ours, theirs):
        optimizer = library(name)(weights(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        rates = []
        for step in range(5):
            fill_grads(optimizer.param_groups[0]["params"], step)
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        found.append((rates, [p.detach() for p in optimizer.param_groups[0]["params"]]))
    assert found[0][0] == found[1][0] == [1.0, 0.5, 0.5, 0.25, 0.25]
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_scheduler_sees_that_a_step_was_taken():
    optimizer = stepwell.SGD(weights())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    optimizer = stepwell.SGD(weights())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert optimizer._opt_called
    assert calls == [1]
    scheduler.step()


def test_a_rate_that_is_a_tensor_is_looked_at_each_time():
    params = weights([(2,)])
    optimizer = stepwell.SGD(params, lr=torch.tensor(1.0))
    for rate in (1.0, 0.5, 0.0):
        optimizer.param_groups[0]["lr"].fill_(rate)
        before = params[0].detach().clone()
        params[0].grad = torch.ones(2)
        optimizer.step()
        torch.testing.assert_close(params[0].detach(), before - rate)


# What may change between steps


def test_groups_and_state_may_be_put_in_from_outside():
    params = weights()
    optimizer = stepwell.AdamW(params)
    train(optimizer)
    optimizer.state = type(optimizer.state)(dict)
    train(optimizer, 1)
    assert optimizer.state[params[0]]["step"] == 1
    optimizer.state.clear()
    train(optimizer, 1)
    assert optimizer.state[params[0]]["step"] == 1
    groups = [dict(optimizer.param_groups[0], params=params[:1])]
    optimizer.param_groups = groups
    before = params[1].detach().clone()
    train(optimizer, 1)
    fill_grads(params, 0)
    optimizer.step()
    assert torch.equal(params[1].detach(), before)
    assert optimizer.state[params[0]]["step"] == 3


def test_an_optimizer_is_freed_with_its_last_reference():
    params = weights()
    optimizer = stepwell.AdamW(params)
    train(optimizer)
    gone = weakref.ref(optimizer)
    state = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    gc.disable()
    try:
        del optimizer
        assert gone() is None
        assert state() is None
    finally:
        gc.enable()


# zero_grad


@each_name
def test_zero_grad_drops_gradients(name):
    params = weights()
    optimizer = ours(name)(params)
    fill_grads(params[:2], 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_zero_grad_fills_with_zeros(flags):
    params = [*weights(), *weights([(2, 2)], dtype=torch.float64), *weights([(5, 2)])]
    optimizer = stepwell.SGD(params, **flags)
    fill_grads(params[:1] + params[2:4], 0)
    params[4].grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2), (5, 2))
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    assert [p.grad for p in params] == grads
    assert params[1].grad is None
    for param in params:
        assert param.grad is None or not param.grad.to_dense().any()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_zero_grad_takes_gradients_out_of_the_graph():
    params = weights([(3,)])
    optimizer = stepwell.SGD(params)
    (params[0] ** 3).sum().backward(create_graph=True)
    assert params[0].grad.grad_fn is not None
    optimizer.zero_grad(set_to_none=False)
    assert params[0].grad.grad_fn is None
    params[0].grad = torch.ones(3, requires_grad=True)
    optimizer.zero_grad(set_to_none=False)
    assert not params[0].grad.requires_grad


# Profiles and words


def profiled_names(optimizer):
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    return {e.key for e in profile.key_averages() if e.key.startswith("Optimizer.")}


@each_name
def test_labels_in_a_profile_are_torchs(name):
    found = profiled_names(ours(name)(weights()))
    assert found == profiled_names(theirs(name)(weights()))
    assert found == {f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"}


def test_the_python_profiler_finds_the_optimizer():
    with torch.profiler.profile(
        with_stack=True, record_shapes=True, profile_memory=True
    ) as profile:
        optimizer = stepwell.SGD(weights())
        fill_grads(optimizer.param_groups[0]["params"], 0)
        optimizer.step()
    assert profile.events() is not None
    assert optimizer._zero_grad_profile_name == "Optimizer.zero_grad#SGD.zero_grad"


def test_the_code_of_the_profiler_is_called_without_hooks_too():
    optimizer = stepwell.SGD(weights())
    calls = []
    optimizer._optimizer_step_code = lambda: calls.append(1)
    optimizer.step()
    assert calls == [1]


def test_torch_does_not_wrap_the_step_again():
    assert stepwell.SGD.step.hooked
    optimizer = stepwell.SGD(weights())
    before = stepwell.SGD.step
    optimizer._patch_step_function()
    assert stepwell.SGD.step is before


def test_repr_names_the_back_end_after_a_step():
    optimizer = stepwell.SGD(named_weights())
    assert "Backend" not in repr(optimizer)
    train(optimizer, 1)
    lines = repr(optimizer).splitlines()
    assert lines[0] == "SGD ("
    assert lines[-2] in [f"Backend: {name}" for name in REQUESTS]
    assert lines[-1] == ")"
    assert lines[1:-2] == repr(torch.optim.SGD(named_weights())).splitlines()[1:-1]
