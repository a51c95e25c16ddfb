"""Trains a task with a rule of two libraries in turns, and measures both.

The libraries take turns epoch by epoch, so that whatever else the machine does meets both alike.
Every epoch starts from a seed of its own: runs see the same rows in the same order, and a run that
resumes from a checkpoint draws what the uninterrupted one drew.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .contenders import OURS, RIVAL, Contender, Rule
from .task import Task, TaskError

# Their times stand apart from those of all others: they make the state and compile, momentum in the
# second step once more, since it finds its buffer only then.
FIRST_STEPS = 2
# Fewer say little about a median.
ENOUGH_STEPS = 20

Report = Callable[[Contender, int, float], None]
"""Called after every epoch: who, how many epochs it has done in all, the mean loss."""


@dataclass(frozen=True)
class Plan:
    """How long and in which portions to train.

    Attributes:
        epochs: passes over the training data
        batch_size: rows per backward pass
        accumulate: backward passes per optimizer step, whose gradients are averaged
        seed: of the model's first parameters and of the order of the rows
    """

    epochs: int = 24
    batch_size: int = 32
    accumulate: int = 2
    seed: int = 0

    @property
    def half(self) -> int:
        """The epochs done when the checkpoint is written."""
        return self.epochs // 2

    @property
    def total(self) -> int:
        """The epochs a contender trains in all: the whole run, and the resumed half again."""
        return self.epochs + self.epochs - self.half


@dataclass(frozen=True)
class Result:
    """What one contender reached.

    Attributes:
        contender: who it was
        losses: the mean training loss of every epoch
        test_loss: over all test rows, after the last epoch
        test_accuracy: likewise, from 0 to 1
        first_seconds: the duration of the first two steps together, which make state and compile
        step_seconds: the median duration of the steps after the first two
        state_bytes: the size of the tensors in the optimizer's state
        unequal_after_resume: the parameters and buffers that differ in any bit when the run
            resumes half way, with their largest difference; empty if the run is exact
    """

    contender: Contender
    losses: tuple[float, ...]
    test_loss: float
    test_accuracy: float
    first_seconds: float
    step_seconds: float
    state_bytes: int
    unequal_after_resume: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Duel:
    """One rule by both libraries.

    Attributes:
        rule: the rule
        rival: what torch.optim reached
        ours: what stepwell reached
        distance: the largest difference between the two trained models' parameters
        further_steps: how many steps were taken after the training, only to measure them
    """

    rule: Rule
    rival: Result
    ours: Result
    distance: float
    further_steps: int = 0

    @property
    def results(self) -> tuple[Result, Result]:
        """The rival's result, then ours."""
        return self.rival, self.ours

    @property
    def speedup(self) -> float:
        """How many of our steps fit into one of the rival's."""
        return self.rival.step_seconds / self.ours.step_seconds


class Run:
    """One model in training by one contender."""

    def __init__(self, task: Task, contender: Contender, plan: Plan) -> None:
        self.task = task
        self.contender = contender
        self.plan = plan
        with _seeded(plan.seed):
            self.model = task.model().to(task.device)
        self.optimizer = contender.optimizer(task, self.model)
        self.scheduler = contender.scheduler(self.optimizer)
        self.epoch = 0
        self.losses: list[float] = []
        self.step_seconds: list[float] = []

    def train_epoch(self) -> float:
        """Train on all rows once, in a new order, and return the mean loss."""
        rows_per_step = self.plan.batch_size * self.plan.accumulate
        with _seeded(self.plan.seed + 1_000_003 * (self.epoch + 1)):
            order = torch.randperm(len(self.task.train[0])).to(self.task.device)
            steps = [
                rows for rows in torch.split(order, rows_per_step) if len(rows) == rows_per_step
            ]
            loss = statistics.fmean(self._step(rows) for rows in steps)
        if self.scheduler is not None:
            self.scheduler.step()
        self.epoch += 1
        self.losses.append(loss)
        return loss

    def _step(self, rows: Tensor) -> float:
        inputs, targets = self.task.train
        total = 0.0
        self.optimizer.zero_grad()
        for part in torch.split(rows, self.plan.batch_size):
            loss = self.task.loss(self.model(inputs[part]), targets[part]) / self.plan.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        begin = self._now()
        self.optimizer.step()
        self.step_seconds.append(self._now() - begin)
        return total

    def _now(self) -> float:
        if self.task.device.type != "cpu":
            torch.accelerator.synchronize(self.task.device)
        return time.perf_counter()

    def result(self, unequal_after_resume: Mapping[str, float]) -> Result:
        """What the run has reached so far."""
        inputs, targets = self.task.test
        self.model.eval()
        with torch.no_grad():
            output = self.model(inputs)
        self.model.train()
        return Result(
            contender=self.contender,
            losses=tuple(self.losses),
            test_loss=self.task.loss(output, targets).item(),
            test_accuracy=self.task.accuracy(output, targets),
            first_seconds=self.first_seconds(),
            step_seconds=self.steady_seconds(),
            state_bytes=_state_bytes(self.optimizer),
            unequal_after_resume=unequal_after_resume,
        )

    def first_seconds(self) -> float:
        """The duration of the first steps together."""
        return sum(self.step_seconds[:FIRST_STEPS])

    def steady_seconds(self) -> float:
        """The median duration of the steps after the first ones; NaN if there are none."""
        steady = self.step_seconds[FIRST_STEPS:]
        return statistics.median(steady) if steady else float("nan")

    def save(self, path: Path) -> None:
        """Write everything that a later run needs to go on from here."""
        state = {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
        }
        torch.save(state, path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(path, map_location=self.task.device, weights_only=True)
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def race(task: Task, rule: Rule, plan: Plan, report: Report) -> Duel:
    """Train the task with the rule of both libraries, then resume both from half way.

    Raises:
        TaskError: there are too few rows for one step
    """
    _check_rows(task, plan)
    rival, ours = runs = [Run(task, Contender(rule, library), plan) for library in (RIVAL, OURS)]
    with tempfile.TemporaryDirectory(prefix="stepwell-race-") as folder:
        checkpoints = [Path(folder, f"{run.contender.library}.pt") for run in runs]
        _train(runs, plan.half, report)
        for run, path in zip(runs, checkpoints, strict=True):
            run.save(path)
        _train(runs, plan.epochs, report)
        unequal = [
            unequal_after_resume(run, path, report)
            for run, path in zip(runs, checkpoints, strict=True)
        ]
    distance = max(differences(rival.model, ours.model).values())
    results = [run.result(differs) for run, differs in zip(runs, unequal, strict=True)]
    further_steps = _measure_further(runs)
    rival_result, our_result = (
        replace(result, first_seconds=run.first_seconds(), step_seconds=run.steady_seconds())
        for result, run in zip(results, runs, strict=True)
    )
    return Duel(rule, rival_result, our_result, distance, further_steps)


def unequal_after_resume(run: Run, checkpoint: Path, report: Report) -> dict[str, float]:
    """What differs from a finished run, in any bit, when a new run resumes from its checkpoint.

    The new run starts from other parameters, so that nothing but the checkpoint can make it equal.
    """
    resumed = Run(run.task, run.contender, run.plan)
    with torch.no_grad():
        for param in resumed.model.parameters():
            param.zero_()
    resumed.load(checkpoint)
    while resumed.epoch < run.epoch:
        loss = resumed.train_epoch()
        report(run.contender, run.epoch + resumed.epoch - run.plan.half, loss)
    mine, theirs = run.model.state_dict(), resumed.model.state_dict()
    distances = differences(run.model, resumed.model)
    return {name: d for name, d in distances.items() if not _same_bits(mine[name], theirs[name])}


def differences(one: nn.Module, other: nn.Module) -> dict[str, float]:
    """The largest absolute difference of every parameter and buffer of two equal modules."""
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return {name: _distance(mine, theirs) for (name, mine), theirs in pairs}


def _train(runs: list[Run], epochs: int, report: Report) -> None:
    for epoch in range(runs[0].epoch, epochs):
        # whoever goes second finds the caches warm
        for run in runs if epoch % 2 == 0 else reversed(runs):
            report(run.contender, epoch + 1, run.train_epoch())


def _measure_further(runs: list[Run]) -> int:
    """Train on until there are enough steps to measure, and return how many that took."""
    before = len(runs[0].step_seconds)
    while len(runs[0].step_seconds) < FIRST_STEPS + ENOUGH_STEPS:
        _train(runs, runs[0].epoch + 1, lambda contender, done, loss: None)
    return len(runs[0].step_seconds) - before


def _check_rows(task: Task, plan: Plan) -> None:
    rows, needed = len(task.train[0]), plan.batch_size * plan.accumulate
    if rows < needed:
        raise TaskError(
            f"Task {task.name}: one step takes batch size x accumulate = {plan.batch_size} x "
            f"{plan.accumulate} = {needed} rows, but there are {rows} to train on; lower either"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = optimizer.state_dict()["state"].values()
    return sum(v.nbytes for state in states for v in state.values() if isinstance(v, Tensor))


def _distance(one: Tensor, other: Tensor) -> float:
    if one.numel() == 0:
        return 0.0
    return (one.detach().double() - other.detach().double()).abs().max().item()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    bits = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*bits)
