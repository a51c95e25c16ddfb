"""What does the back-end for GPUs do around its kernels: tables, skipped steps, captured graphs?

A GPU is played by Triton's interpreter and CPU tensors. `pretending` makes the package take every
tensor among rates, scales and skip flags for one that lies on a device; `Recorder` takes the place
of a graph: it notes what happens to tensors, and does it again.
"""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stepwell
from stepwell import cohort, hyperparameters, inspection, optimizer, plan
from stepwell.backends import triton
from stepwell.language import ClipNorm, Real, zeros
from stepwell.native import triton_jit, uploads

from .cases import PLAIN, Case, named, numbers, parameters, set_grads
from .compare import assert_same_training, assert_training_within, backends, everything, snapshot
from .rules import LAMB, Prodigy

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        not triton_jit.is_interpreting(), reason="needs TRITON_INTERPRET=1 from the start"
    ),
]

SHAPES = ((7,), (), (40, 30), (0,), (16_385,))


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every tensor lies on a device, where a look at it would wait, and graphs can be captured."""

    def is_tensor(value: Any) -> bool:
        return isinstance(value, Tensor)

    for module in (cohort, hyperparameters, optimizer):
        monkeypatch.setattr(module, "is_elsewhere", is_tensor)
    for module in (inspection, plan):
        monkeypatch.setattr(module, "CAPTURABLE", ("cpu",))
    return monkeypatch


def launch_of(made: Any) -> triton.Launch:
    """The one launch of an optimizer's step."""
    (launch,) = made._held[0]._launches
    assert isinstance(launch, triton.Launch)
    return launch


def stepped(made: Any, params: list[Any], step: int) -> None:
    set_grads(params, step)
    made.step()


class Watched:
    """Kernels whose launches are told to `see(name, launch)`, which does them."""

    def __init__(self, kernels: Mapping[str, Any], see: Callable[[str, Any], None]) -> None:
        self._kernels = kernels
        self._see = see

    def __getitem__(self, name: str) -> Any:
        return _Grid(self._kernels[name], name, self._see)


@dataclass
class _Grid:
    kernel: Any
    name: str
    see: Callable[[str, Any], None]

    def __getitem__(self, grid: Any) -> Any:
        def call(*tables: Any, **options: Any) -> None:
            self.see(self.name, lambda: self.kernel[grid](*tables, **options))

        return call


def counted(made: Any) -> Counter[str]:
    """Count the launches of an optimizer that has taken a step, from now on."""
    launches: Counter[str] = Counter()

    def see(name: str, launch: Any) -> None:
        launches[name] += 1
        launch()

    launch_of(made)._kernels = Watched(launch_of(made)._kernels, see)
    return launches


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many words each upload had."""
    words: list[int] = []
    staged = uploads._staged
    monkeypatch.setattr(
        uploads, "_staged", lambda count, device: words.append(count) or staged(count, device)
    )
    return words


# Launches and uploads


@pytest.mark.parametrize("count", [1, 60])
@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        (stepwell.SGD, {"momentum": 0.9}, {"sweep_0": 1}),
        (stepwell.AdamW, {}, {"sweep_0": 1}),
        (stepwell.AdamW, {"fused": True}, {"rows_0": 1, "sweep_0": 1}),
        (LAMB, {}, {"sweep_0": 1, "reduce_0": 1, "rows_1": 1, "sweep_1": 1}),
        (
            stepwell.compose(stepwell.AdamW, ClipNorm),
            {"max_norm": 1.0},
            {"sweep_0": 1, "reduce_0": 1, "rows_1": 1, "sweep_1": 1},
        ),
    ],
)
def test_launches_do_not_depend_on_the_number_of_tensors(
    rule: Any, options: dict[str, Any], expected: dict[str, int], count: int
) -> None:
    params = parameters(((5,),) * count, torch.float32)
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)]
    made = rule(groups, **options)
    for step in range(2):
        stepped(made, params, step)
    launches = counted(made)
    stepped(made, params, 2)
    assert launches == expected


def test_only_what_has_changed_is_uploaded(sent: list[int]) -> None:
    params = parameters(SHAPES, torch.float32)
    made = stepwell.SGD(params, lr=0.1, momentum=0.9)
    set_grads(params, 0)
    for _ in range(3):
        made.step()
    sent.clear()
    made.step()
    assert not sent, "rates and addresses are those of the last step"
    made.param_groups[0]["lr"] = 0.05
    made.step()
    columns = 3
    assert sent == [len(params) * columns], "the numbers, not the addresses"


def test_counts_on_the_device_need_no_upload(sent: list[int]) -> None:
    params = parameters(SHAPES, torch.float32)
    made = stepwell.AdamW(params, fused=True)
    set_grads(params, 0)
    for _ in range(2):
        made.step()
    sent.clear()
    made.step()
    assert not sent
    assert {state["step"].item() for state in made.state.values()} == {3}


def test_a_rate_is_obeyed_without_new_source() -> None:
    params, others = (parameters(SHAPES, torch.float32) for _ in range(2))
    made = stepwell.AdamW(params, lr=0.1)
    reference = stepwell.AdamW(others, lr=0.1, foreach=False)
    for step in range(4):
        for each in (made, reference):
            each.param_groups[0]["lr"] = 0.1 / (step + 1)
        stepped(made, params, step)
        stepped(reference, others, step)
        if step == 0:
            kept = launch_of(made)._source
        assert launch_of(made)._source is kept
    assert_training_within(made, reference, 8, "a rate that changes")


# Skipped and scaled steps


@pytest.mark.usefixtures("pretending")
@pytest.mark.parametrize("case", **named(PLAIN))
def test_a_skipped_step_changes_nothing(case: Case) -> None:
    params = parameters(SHAPES, torch.float32)
    made = case.make(params, fused=True)
    made.grad_scale, made.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for step in range(2):
        stepped(made, params, step)
    before = snapshot(made)
    launches = counted(made)
    for found in (1.0, float("inf"), float("nan")):
        set_grads(params, 2)
        params[0].grad.fill_(float("nan"))
        made.found_inf = torch.tensor(found)
        made.step()
        assert_same_training(made, before, "a skipped step")
    assert launches["sweep_0"] == 3, "the device finds out, not the host"
    made.found_inf = torch.tensor(0.0)
    stepped(made, params, 2)
    assert any(not torch.equal(tensor, before[entry]) for entry, tensor in everything(made).items())


@pytest.mark.usefixtures("pretending")
@pytest.mark.parametrize("case", **named(PLAIN))
def test_gradients_are_unscaled_in_the_kernel(case: Case) -> None:
    params, others = (parameters(SHAPES, torch.float32) for _ in range(2))
    made, plain = case.make(params, fused=True), case.make(others, fused=True)
    for step in range(3):
        made.grad_scale, made.found_inf = torch.tensor(2.0**step), torch.tensor(0.0)
        set_grads(params, step, scale=2.0**step)
        set_grads(others, step)
        made.step()
        plain.step()
    # powers of two: nothing is rounded differently
    assert_same_training(made, plain, case.name)


@pytest.mark.usefixtures("pretending")
def test_a_first_step_that_is_skipped_leaves_no_momentum() -> None:
    params = parameters(SHAPES, torch.float32)
    made = stepwell.SGD(params, lr=0.1, momentum=0.9, fused=True)
    made.grad_scale, made.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    stepped(made, params, 0)
    assert all(state.get("momentum_buffer") is None for state in made.state.values())


@pytest.mark.usefixtures("pretending")
def test_rates_that_are_tensors_are_left_on_the_device() -> None:
    params, others = (parameters(SHAPES, torch.float32) for _ in range(2))
    rate, beta = torch.tensor(0.1), torch.tensor(0.9)
    groups = [{"params": params[:2], "lr": rate}, {"params": params[2:], "lr": 0.3}]
    made = stepwell.AdamW(groups, betas=(beta, torch.tensor(0.99)), capturable=True)
    groups = [{"params": others[:2], "lr": 0.1}, {"params": others[2:], "lr": 0.3}]
    reference = stepwell.AdamW(groups, betas=(0.9, 0.99), foreach=False)
    for step in range(3):
        rate.fill_(0.1 / (step + 1))
        reference.param_groups[0]["lr"] = rate.item()
        stepped(made, params, step)
        stepped(reference, others, step)
        # lr and both betas of one group, both betas of the other
        assert len(launch_of(made).cohort.hyperparameters.on_device) == 5
    # 0.1 and 0.9 are rounded to float32 in a tensor
    assert_training_within(made, reference, 64, "Tensor rates")


# Captured graphs


class Recorder(TorchDispatchMode):
    """What happens to tensors, and on the device, in order, to be done again with `replay`."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], None]] = []
        self._in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        if not self._in_kernel:
            self._calls.append(lambda: self._again(func, args, given, result))
        return result

    def _again(self, func: Any, args: Any, given: Any, result: Any) -> None:
        # what was made then is what the calls after it use; a view shows its memory anyway
        for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **given)), strict=True):
            if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                old.copy_(new)

    def launched(self, name: str, launch: Any) -> None:
        """A kernel is a call of its own, whatever the interpreter does inside."""
        self._calls.append(launch)
        self._in_kernel = True
        launch()
        self._in_kernel = False

    def replay(self) -> None:
        """Do it all again."""
        with np.errstate(all="ignore"):
            for call in self._calls:
                call()


@contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch, made: Any) -> Iterator[Recorder]:
    """A capture: what happens is noted, and taken back."""
    before = snapshot(made)
    recorder = Recorder()
    launches = [] if made._held is None else [launch_of(made)]
    kernels = [launch._kernels for launch in launches]
    for launch in launches:
        launch._kernels = Watched(launch._kernels, recorder.launched)
    with monkeypatch.context() as patched:
        for module in (plan, triton, uploads):
            patched.setattr(module, "is_capturing", lambda device: True)
        with recorder:
            yield recorder
    for launch, own in zip(launches, kernels, strict=True):
        launch._kernels = own
    for entry, tensor in everything(made).items():
        tensor.copy_(before[entry])


CAPTURED = {
    "AdamW": (stepwell.AdamW, {"lr": 0.05, "capturable": True}),
    "AMSGrad": (stepwell.Adam, {"lr": 0.05, "amsgrad": True, "capturable": True}),
    "SGD": (stepwell.SGD, {"lr": 0.05, "momentum": 0.9}),
    "LAMB": (LAMB, {"lr": 0.05, "capturable": True}),
    "Prodigy": (Prodigy, {"d0": 0.1, "capturable": True}),
    "clipped": (
        stepwell.compose(stepwell.AdamW, ClipNorm),
        {"lr": 0.05, "max_norm": 0.5, "capturable": True},
    ),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_replays_are_steps(pretending: pytest.MonkeyPatch, name: str) -> None:
    rule, options = CAPTURED[name]
    params, others = (parameters(SHAPES, torch.float32) for _ in range(2))
    made, reference = rule(params, **options), rule(others, **options)
    for step in range(2):
        stepped(made, params, step)
        stepped(reference, others, step)
    grads = [param.grad for param in params]
    with capturing(pretending, made) as graph:
        made.step()
    for step in range(2, 6):
        if step == 4:
            # a step in between, with gradients elsewhere, knows nothing of the graph
            stepped(made, params, step)
        else:
            for grad, param in zip(grads, others, strict=True):
                grad.copy_(numbers_of(param, step))
            graph.replay()
        stepped(reference, others, step)
        assert_same_training(made, reference, f"{name}, step {step}")


def numbers_of(param: Any, step: int) -> Tensor:
    """The gradient that `set_grads` gives this parameter of SHAPES in this step."""
    params = parameters(SHAPES, param.dtype)
    set_grads(params, step)
    (found,) = (p.grad for p in params if p.shape == param.shape)
    assert found is not None
    return found


def test_a_replay_obeys_a_rate_that_is_a_tensor(pretending: pytest.MonkeyPatch) -> None:
    params, others = (parameters(SHAPES, torch.float32) for _ in range(2))
    rate = torch.tensor(0.5)
    made = stepwell.AdamW(params, lr=rate, capturable=True)
    reference = stepwell.AdamW(others, lr=torch.tensor(0.5), capturable=True)
    for each, mine in ((made, params), (reference, others)):
        stepped(each, mine, 0)
        set_grads(mine, 1)
    with capturing(pretending, made) as graph:
        made.step()
    for value in (0.25, 0.125, 0.0):
        rate.fill_(value)
        graph.replay()
        reference.param_groups[0]["lr"].fill_(value)
        reference.step()
        assert_same_training(made, reference, f"lr = {value}")


def test_what_a_graph_reads_lives_on(pretending: pytest.MonkeyPatch) -> None:
    params = parameters(SHAPES, torch.float32)
    made = stepwell.AdamW(params, capturable=True)
    stepped(made, params, 0)
    with capturing(pretending, made):
        made.step()
    (table,) = (item for item in made._kept if isinstance(item, uploads.Uploaded))
    alive = weakref.ref(table.table)
    del table
    made.param_groups[0]["amsgrad"] = True
    stepped(made, params, 1)
    made.load_state_dict(copy.deepcopy(made.state_dict()))
    stepped(made, params, 2)
    gc.collect()
    assert alive() is not None, "a replay still reads it"


HOST = "AdamW but param_groups' capturable is False. "


@pytest.mark.parametrize(
    ("rule", "options", "warm", "words"),
    [
        (stepwell.AdamW, {}, False, HOST + r"\(group 0: construct it with capturable=True"),
        (stepwell.AdamW, {}, True, HOST + r"\(group 0: construct it with capturable=True"),
        (stepwell.AdamW, {"fused": True}, True, HOST),
        (stepwell.AdamW, {"capturable": True}, False, "AdamW: something about this step is new"),
        # the second step of a momentum is another program than the first
        (stepwell.SGD, {"momentum": 0.9}, True, "take one more step like this before the capture"),
    ],
)
def test_captures_that_would_not_repeat_a_step_are_refused(
    pretending: pytest.MonkeyPatch, rule: Any, options: dict[str, Any], warm: bool, words: str
) -> None:
    params = parameters(SHAPES, torch.float32)
    made = rule(params, **options)
    if warm:
        stepped(made, params, 0)
    before = snapshot(made)
    set_grads(params, 1)
    with (
        pytest.raises(RuntimeError, match=words),
        capturing(pretending, made),
    ):
        made.step()
    assert_same_training(made, before, "a refused capture")
    # and the next step is as if nothing had happened
    made.step()


def test_a_capture_right_after_a_load_is_refused(pretending: pytest.MonkeyPatch) -> None:
    params = parameters(SHAPES, torch.float32)
    made = stepwell.AdamW(params, capturable=True)
    stepped(made, params, 0)
    made.load_state_dict(copy.deepcopy(made.state_dict()))
    before = snapshot(made)
    with (
        pytest.raises(RuntimeError, match="something about this step is new"),
        capturing(pretending, made),
    ):
        made.step()
    assert_same_training(made, before, "a refused capture")


def test_a_capture_of_numbers_that_are_read_back_is_refused(
    pretending: pytest.MonkeyPatch,
) -> None:
    params = parameters(SHAPES, torch.float32)
    made = stepwell.AdamW(params, lr=torch.tensor(0.1), capturable=True, foreach=False)
    stepped(made, params, 0)
    with pretending.context() as patched:
        for module in (plan, triton, uploads):
            patched.setattr(module, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="AdamW: a step on eager reads numbers back"):
            made.step()


def test_a_graph_needs_no_rule_without_numbers_of_its_own(pretending: pytest.MonkeyPatch) -> None:
    params = parameters(SHAPES, torch.float32)
    made = stepwell.SGD(params, lr=0.1)
    stepped(made, params, 0)
    with capturing(pretending, made):
        made.step()


# What is refused, and where the step goes instead


def test_where_triton_cannot_compile_another_back_end_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise cohort.UnusableError("Triton cannot compile for cpu: no C compiler")

    monkeypatch.setattr(triton.Launch, "_compile", fail)
    params, others = (parameters(SHAPES, torch.float32) for _ in range(2))
    made, reference = stepwell.AdamW(params), stepwell.AdamW(others, foreach=False)
    stepped(made, params, 0)
    stepped(reference, others, 0)
    assert backends(made) == {"cpu"}
    words = "AdamW: not on back-end triton: Triton cannot compile for cpu: no C compiler"
    assert [(r.levelname, r.message) for r in caplog.records] == [("WARNING", words)]
    assert_training_within(made, reference, 8, "without a compiler")


def test_without_triton_the_step_goes_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton, "unusable", lambda device: "Triton is not installed")
    params, others = (parameters(SHAPES, torch.float32) for _ in range(2))
    made = stepwell.AdamW(params)
    with caplog.at_level(logging.DEBUG, "stepwell"):
        stepped(made, params, 0)
    lines = [line for line in caplog.messages if "triton" in line]
    assert lines == ["AdamW: not on back-end triton: Triton is not installed"]
    assert backends(made) == {"cpu"}
    reference = stepwell.AdamW(others, foreach=False)
    stepped(reference, others, 0)
    assert_training_within(made, reference, 8, "without Triton")


@pytest.mark.parametrize("name", ["start", "at", "mask", "count", "tl", "param_ptr", "rows", "a-b"])
def test_state_may_have_any_name(name: str) -> None:
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        setattr(state, name, getattr(state, name) + grad)
        return param - group.lr * getattr(state, name)

    rule: Any = type(
        "Named",
        (stepwell.Optimizer,),
        {
            "__annotations__": {"lr": Real},
            "lr": 0.1,
            name: zeros(),
            "update": staticmethod(update),
        },
    )
    params, others = (parameters(SHAPES, torch.float32) for _ in range(2))
    made, reference = rule(params), rule(others, foreach=False)
    for step in range(2):
        stepped(made, params, step)
        stepped(reference, others, step)
    assert backends(made) == {"triton"}
    assert_training_within(made, reference, 8, name)


@pytest.mark.parametrize("size", [1023, 1024, 1025, 16_383, 16_384, 16_385, 40_000])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_blocks_and_chunks_leave_nothing_out(size: int, offset: int) -> None:
    def whole() -> list[Tensor]:
        buffer = numbers((size + offset,), torch.float32, 3)
        return [torch.nn.Parameter(buffer[offset:])]

    params, others = whole(), whole()
    made = stepwell.AdamW(params, lr=0.1)
    reference = stepwell.AdamW(others, lr=0.1, foreach=False)
    for step in range(2):
        stepped(made, params, step)
        stepped(reference, others, step)
    assert_training_within(made, reference, 8, f"{size} elements from {offset}")
