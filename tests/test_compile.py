"""Does code under torch.compile step, and save, as it does without?"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

import stepwell
from stepwell import compiling, lr_scheduler

from .shell_cases import fill_grads, ours, theirs, weights

# the compiler itself warns of what it does, but must not look into the optimizer
pytestmark = pytest.mark.filterwarnings("ignore", "error:.*does not know how to trace")


def compiled_training(library, hooks):
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.5)
    optimizer = library("AdamW")(model.parameters(), lr=0.01)
    optimizer.register_step_post_hook(lambda *_: hooks.append(1))

    @torch.compile(backend="eager")
    def train_once(x):
        optimizer.zero_grad()
        loss = (model(x) ** 2).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return [train_once(torch.full((1, 3), 1.0 + i)).item() for i in range(12)]


def test_a_training_step_under_torch_compile():
    hooks: list[int] = []
    found = compiled_training(ours, hooks)
    assert len(hooks) == 12
    # losses of twelve steps with a high rate, each rounded to float32
    torch.testing.assert_close(found, compiled_training(theirs, []), rtol=1e-4, atol=1e-5)
    optimizer = stepwell.SGD(weights(), lr=0.5)
    fill_grads(optimizer.param_groups[0]["params"], 0)
    torch.compile(optimizer.step, backend="eager")()
    saved = torch.compile(optimizer.state_dict, backend="eager")()
    assert saved["param_groups"][0]["lr"] == 0.5


SCHEDULES = {
    "StepLR": lambda held: lr_scheduler.StepLR(held, 2, 0.5),
    "OneCycleLR": lambda held: lr_scheduler.OneCycleLR(held, 1.0, 20, cycle_momentum=False),
    "WarmRestarts": lambda held: lr_scheduler.CosineAnnealingWarmRestarts(held, 3),
    "ReduceLROnPlateau": lambda held: lr_scheduler.ReduceLROnPlateau(held, patience=0),
    "SequentialLR": lambda held: lr_scheduler.SequentialLR(
        held, [lr_scheduler.LinearLR(held), lr_scheduler.ExponentialLR(held, 0.9)], [3]
    ),
    "ChainedScheduler": lambda held: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(held), lr_scheduler.ExponentialLR(held, 0.9)]
    ),
    "Schedule": lambda held: lr_scheduler.Schedule(held, lr=lr_scheduler.cosine(9)),
}


@pytest.mark.parametrize("rate", [float, torch.tensor])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_step_alone_and_within_what_is_compiled(name, rate):
    def run(*, alone: bool, compiled: bool) -> list[float]:
        torch._dynamo.reset()
        counters.clear()
        held = stepwell.SGD(weights(), lr=rate(0.5))
        scheduler = SCHEDULES[name](held)
        held.step()
        metric = [torch.tensor(1.0)] if name == "ReduceLROnPlateau" else []

        def within(x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            scheduler.step(*metric)
            return y + 1

        step = scheduler.step if alone else within
        step = torch.compile(step, backend="eager") if compiled else step
        seen = []
        for _ in range(12):
            step(*(metric if alone else [torch.ones(2)]))
            seen.append(float(held.param_groups[0]["lr"]))
        # nothing of the schedule is traced: what is compiled is what stands around it
        assert counters["frames"]["total"] == (2 if compiled and not alone else 0)
        return seen

    expected = run(alone=True, compiled=False)
    assert run(alone=True, compiled=True) == expected
    assert run(alone=False, compiled=True) == expected


def test_fullgraph_says_why_a_schedule_cannot_be_in_a_graph():
    held = stepwell.SGD(weights(), lr=0.5)
    scheduler = lr_scheduler.StepLR(held, 2)

    def within(x: torch.Tensor) -> torch.Tensor:
        scheduler.step()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported, match="a schedule writes into the groups"):
        torch.compile(within, backend="eager", fullgraph=True)(torch.ones(2))


def read(optimizer, x):
    return x * optimizer.param_groups[0]["lr"]


def write(optimizer, x):
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.5
    optimizer.step()
    return x


def assign(optimizer, x):
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.zero_grad()
    (optimizer.param_groups[0]["params"][0] * x).sum().backward()
    optimizer.step()
    return x


@pytest.mark.parametrize("function", [read, write, assign])
def test_compiled_code_with_groups(function):
    found = []
    for library in (ours, theirs):
        torch._dynamo.reset()
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = library("SGD")([weight], lr=0.5)
        compiled = torch.compile(partial(function, optimizer), backend="eager")
        results = []
        for _ in range(3):
            weight.grad = torch.ones(2)
            results.append(compiled(torch.ones(2)))
        found.append((results, optimizer.param_groups[0]["lr"], weight.detach()))
    torch.testing.assert_close(*found)


def test_what_compiled_code_writes_is_checked():
    optimizer = stepwell.SGD(weights(), lr=0.5)

    def set_rate(rate):
        optimizer.param_groups[0]["lr"] = rate

    compiled = torch.compile(set_rate, backend="eager")
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1\.0"):
        compiled(-1.0)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_compiled_code_with_a_group_that_it_holds():
    (group,) = stepwell.SGD(weights(), lr=0.5).param_groups

    def scale(x, rate):
        y = x * 2
        group["lr"] = rate
        group.update(momentum=0.5)
        return y * group["lr"] * group.get("momentum")

    compiled = torch.compile(scale, backend="eager")
    for rate in (0.25, 0.125):
        assert compiled(torch.ones(1), rate).item() == rate
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1\.0"):
        compiled(torch.ones(1), -1.0)
    assert group["lr"] == 0.125


def test_a_warm_step_is_not_compiled_again():
    torch._dynamo.reset()
    counters.clear()
    params = weights()
    optimizer = stepwell.AdamW(params)
    fill_grads(params, 0)
    compiled = torch.compile(optimizer.step, backend="eager")
    for rate in (0.1, 0.2, 0.3):
        optimizer.param_groups[0]["lr"] = rate
        compiled()
    assert not counters["frames"]
    assert not counters["recompiles"]


def test_fullgraph():
    """Of the step alone, it is compiled; of a function that takes one, the refusal says why."""
    params = weights()
    optimizer = stepwell.SGD(params, lr=0.5)
    fill_grads(params, 0)
    before = params[0].detach().clone()
    torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    assert not torch.equal(before, params[0])
    with pytest.raises(Exception, match="a stepwell optimizer runs compiled code of its own"):
        torch.compile(lambda: optimizer.step(), fullgraph=True, backend="eager")()
    with pytest.raises(Exception, match="The groups of a stepwell optimizer check what is written"):
        torch.compile(
            lambda: optimizer.param_groups[0]["lr"] * 2, fullgraph=True, backend="eager"
        )()


def test_compilation_goes_on_after_a_step_that_raises():
    optimizer = stepwell.SGD(weights(), lr=0.5)

    def raises():
        raise RuntimeError("of the closure")

    def around(x):
        with suppress(RuntimeError):
            optimizer.step(raises)
        return x

    compiled = torch.compile(around, backend="eager")
    compiled(torch.ones(1))
    assert compiling.get_eval_frame_callback() is None
