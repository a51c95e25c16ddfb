"""Can state be made, measured, shared and swapped without taking a step?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stepwell

from .cases import PLAIN, REQUESTS, Case, named, parameters, set_grads, train
from .compare import assert_same_training, everything

SHAPES = ((7,), (), (4, 3), (0,))


@pytest.mark.parametrize("case", **named(PLAIN))
def test_state_made_ahead_is_that_of_a_first_step(case: Case) -> None:
    params, others = (parameters(SHAPES, torch.bfloat16) for _ in range(2))
    made, plain = case.make(params), case.make(others)
    before = [param.detach().clone() for param in params]
    made.init_state()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)
        assert all(entry == 0 for entry in [made.state[param].get("step", 0)])
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        made.step()
        plain.step()
    assert_same_training(made, plain, case.name)


def test_state_that_is_there_stays() -> None:
    params = parameters(SHAPES, torch.float32)
    made = train(stepwell.AdamW, params, 2)
    before = {entry: tensor.clone() for entry, tensor in everything(made).items()}
    held = [made.state[param]["exp_avg"] for param in params]
    made.init_state()
    assert all(made.state[p]["exp_avg"] is h for p, h in zip(params, held, strict=True))
    assert_same_training(made, before, "init_state() after two steps")


def test_a_checkpoint_loads_into_state_made_ahead() -> None:
    trained = train(stepwell.AdamW, parameters(SHAPES, torch.float32), 3)
    params = parameters(SHAPES, torch.float32)
    fresh = stepwell.AdamW(params)
    fresh.init_state()
    assert fresh.state_dict()["state"].keys() == trained.state_dict()["state"].keys()
    fresh.load_state_dict(trained.state_dict())
    for param, source in zip(params, trained.param_groups[0]["params"], strict=True):
        for name, entry in trained.state[source].items():
            assert torch.equal(fresh.state[param][name], entry)


def test_bytes() -> None:
    made = stepwell.AdamW([torch.nn.Parameter(torch.ones(1000)) for _ in range(3)])
    assert made.state_bytes() == 0
    made.init_state()
    # two moments and a count in float32
    assert made.state_bytes() == 3 * (2 * 1000 + 1) * 4
    half = stepwell.Adam([torch.nn.Parameter(torch.ones(10, dtype=torch.bfloat16))], amsgrad=True)
    half.init_state()
    assert half.state_bytes() == 3 * 10 * 2 + 4
    assert stepwell.SGD([torch.nn.Parameter(torch.ones(9))], momentum=0.9).state_bytes() == 0


def test_adagrad_starts_with_its_state_as_in_torch() -> None:
    params, others = (parameters(SHAPES, torch.float32) for _ in range(2))
    ours = stepwell.Adagrad(params, initial_accumulator_value=0.5)
    theirs = torch.optim.Adagrad(others, initial_accumulator_value=0.5)
    for param, other in zip(params, others, strict=True):
        one, two = ours.state[param], theirs.state[other]
        assert list(one) == list(two)
        assert all(torch.equal(one[name], two[name]) for name in two)
    ours.share_memory()
    assert all(ours.state[param]["sum"].is_shared() for param in params)
    # torch's class does not make state for a group that is added
    extra = torch.nn.Parameter(torch.ones(3))
    ours.add_param_group({"params": [extra]})
    extra.grad = torch.ones(3)
    ours.step()
    assert ours.state[extra]["step"] == 1


@pytest.mark.skipif(
    not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="torch 2.13 has it first"
)
@pytest.mark.parametrize("case", **named(PLAIN))
def test_parameters_and_state_are_swapped_in_and_back(case: Case) -> None:
    params, others = (parameters(SHAPES, torch.float32) for _ in range(2))
    made: Any = train(case.make, params, 2)
    twin: Any = train(case.make, others, 2)
    before = {entry: tensor.clone() for entry, tensor in everything(made).items()}
    saved = twin.state_dict()
    named_others = {str(i): other for i, other in enumerate(others)}
    if not made.state:
        with pytest.raises(RuntimeError, match="requires initialized optimizer state"):
            stepwell.swap_in_optimizer_params_and_state(made, named_others, saved).__enter__()
        return
    with stepwell.swap_in_optimizer_params_and_state(made, named_others, saved):
        set_grads(others, 2)
        made.step()
    assert_same_training(made, before, "after the context")
    reference = train(case.make, parameters(SHAPES, torch.float32), 3)
    for other, param in zip(others, reference.param_groups[0]["params"], strict=True):
        assert torch.equal(other, param)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("case", **named(PLAIN))
def test_numbers_are_not_kept_in_half_precision(
    case: Case, dtype: torch.dtype, request_: str
) -> None:
    """A count put in by hand, as by a cast of the whole state, would stand still at 256."""
    made = []
    for kind in (dtype, torch.float32):
        [param] = parameters(((4, 6),), torch.float32)
        optimizer = case.make([param], **REQUESTS[request_])
        set_grads([param], 0)
        optimizer.step()
        state = optimizer.state[param]
        for name, value in state.items():
            if not value.dim():
                state[name] = torch.tensor(4096 if name == "step" else 1, dtype=kind)
        for step in range(2):
            set_grads([param], step)
            optimizer.step()
        assert state.get("step", 4098) == 4098
        made.append(optimizer)
    assert_same_training(*made, f"{case.name}: numbers in {dtype}")
