"""skorch: nets with our optimizers, its callbacks with our schedules, clones and pickles."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import Checkpoint, GradientNormClipping, LoadInitState, LRScheduler
from torch import nn

import stepwell

from .training import CURVES, LIBRARIES, assert_identical, assert_same, data, network, weights

INPUTS = data().tensors[0].numpy()
LABELS = data().tensors[1].numpy()


def net(library: Any, rule: str = "AdamW", **options: Any) -> NeuralNetClassifier:
    usual: dict[str, Any] = {
        "criterion": nn.CrossEntropyLoss,
        "lr": 1e-2,
        "max_epochs": 4,
        "batch_size": 8,
        "verbose": 0,
        "train_split": None,
    }
    return NeuralNetClassifier(network(), optimizer=getattr(library, rule), **usual | options)


def losses(net: NeuralNetClassifier) -> list[float]:
    return net.history[:, "train_loss"]


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("AdamW", {"optimizer__weight_decay": 0.1}),
        ("SGD", {"optimizer__momentum": 0.9, "optimizer__nesterov": True}),
        ("RAdam", {}),
        ("Adafactor", {}),
        ("LBFGS", {"optimizer__max_iter": 3}),
        ("AdamW", {"callbacks": [GradientNormClipping(0.1)]}),
        (
            "SGD",
            {
                "optimizer__param_groups": [("0.*", {"lr": 0.1}), ("*.bias", {"momentum": 0.5})],
                "optimizer__momentum": 0.9,
            },
        ),
    ],
)
def test_a_rule(rule: str, options: dict[str, Any]) -> None:
    runs = [net(library, rule, **options).fit(INPUTS, LABELS) for library in LIBRARIES]
    # LBFGS takes a rounding further with each of its evaluations
    assert_same(*map(losses, runs), rtol=2e-3 if rule == "LBFGS" else 1e-5)


@pytest.mark.parametrize("every", ["epoch", "batch"])
@pytest.mark.parametrize("curve", CURVES)
def test_a_policy(curve: str, every: str) -> None:
    runs = []
    for library in LIBRARIES:
        policy = getattr(library.lr_scheduler, curve)
        schedule = LRScheduler(policy, step_every=every, **CURVES[curve])
        fitted = net(library, callbacks=[schedule]).fit(INPUTS, LABELS)
        where = np.s_[:, "event_lr"] if every == "epoch" else np.s_[:, "batches", :, "event_lr"]
        runs.append((fitted.history[where], weights(fitted.module_)))
    assert len(set(np.ravel(runs[1][0]))) > 1
    assert_same(*runs, rtol=1e-4)


@pytest.mark.parametrize("every", ["epoch", "batch"])
def test_the_policy_on_a_plateau(every: str) -> None:
    rates = []
    for library in LIBRARIES:
        policy = library.lr_scheduler.ReduceLROnPlateau
        schedule = LRScheduler(
            policy, monitor="train_loss", step_every=every, patience=0, threshold=0.9
        )
        fitted = net(library, callbacks=[schedule]).fit(INPUTS, LABELS)
        rates.append((losses(fitted), fitted.optimizer_.param_groups[0]["lr"]))
    assert rates[1][1] < 1e-2
    assert_same(*rates, rtol=1e-4)


@pytest.mark.parametrize("policy", ["WarmRestartLR", "StepLR", "CosineAnnealingLR"])
def test_policies_of_skorch_and_torch_on_our_optimizer(policy: str) -> None:
    given: dict[str, Any] = {"StepLR": {"step_size": 1}, "CosineAnnealingLR": {"T_max": 3}}
    runs = [
        net(library, callbacks=[LRScheduler(policy, **given.get(policy, {}))]).fit(INPUTS, LABELS)
        for library in LIBRARIES
    ]
    assert_same(*map(losses, runs), rtol=1e-4)


@pytest.mark.parametrize("curve", [name for name in CURVES if name != "OneCycleLR"])
def test_fitting_further_goes_on_to_the_bit(curve: str) -> None:
    """`partial_fit` makes the schedule anew, with the `last_epoch` that is reached."""

    def made(epochs: int) -> NeuralNetClassifier:
        schedule = LRScheduler(getattr(stepwell.lr_scheduler, curve), **CURVES[curve])
        return net(stepwell, callbacks=[schedule], max_epochs=epochs).fit(INPUTS, LABELS)

    through, twice = made(6), made(3)
    twice.partial_fit(INPUTS, LABELS)
    assert_identical(through.history[:, "event_lr"], twice.history[:, "event_lr"])
    assert_identical(weights(through.module_), weights(twice.module_))


def test_simulated_rates() -> None:
    rates = [
        LRScheduler(library.lr_scheduler.StepLR, step_size=2).simulate(6, 0.1).tolist()
        for library in LIBRARIES
    ]
    assert_same(*rates)


def test_a_checkpoint_is_resumed_to_the_bit(tmp_path: Path) -> None:
    def fit(epochs: int, *callbacks: Any) -> NeuralNetClassifier:
        made = net(stepwell, max_epochs=epochs, callbacks=list(callbacks))
        return made.fit(INPUTS, LABELS)

    through = fit(6)
    saver = Checkpoint(dirname=str(tmp_path), monitor=None)
    fit(3, saver)
    assert (tmp_path / "optimizer.pt").exists()
    resumed = fit(3, LoadInitState(Checkpoint(dirname=str(tmp_path), monitor=None)))
    assert_identical(weights(through.module_), weights(resumed.module_))


def test_parameters_that_are_saved_by_name(tmp_path: Path) -> None:
    """`save_params`, which loads with `weights_only` on a machine that may have no stepwell."""
    fitted = net(stepwell).fit(INPUTS, LABELS)
    fitted.save_params(f_params=tmp_path / "params.pt", f_optimizer=tmp_path / "optimizer.pt")
    assert torch.load(tmp_path / "optimizer.pt", weights_only=True)["state"]
    ends = []
    for library in (stepwell, torch.optim):
        resumed = net(library).initialize()
        resumed.load_params(f_params=tmp_path / "params.pt", f_optimizer=tmp_path / "optimizer.pt")
        resumed.partial_fit(INPUTS, LABELS)
        ends.append(weights(resumed.module_))
    fitted.partial_fit(INPUTS, LABELS)
    assert_identical(ends[0], weights(fitted.module_))
    assert_same(*ends)


@pytest.mark.parametrize("schedule", [None, "StepLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_pickled_it_goes_on_to_the_bit(schedule: str | None) -> None:
    given = {**CURVES, "ReduceLROnPlateau": {"patience": 0}}
    callbacks = []
    if schedule is not None:
        policy = getattr(stepwell.lr_scheduler, schedule)
        callbacks = [LRScheduler(policy, **given[schedule])]
    fitted = net(stepwell, callbacks=callbacks).fit(INPUTS, LABELS)
    copy = pickle.loads(pickle.dumps(fitted))
    for each in (fitted, copy):
        each.partial_fit(INPUTS, LABELS)
    assert_identical(weights(fitted.module_), weights(copy.module_))
    assert_identical(losses(fitted), losses(copy))


def test_a_clone_begins_anew() -> None:
    first = net(stepwell, callbacks=[LRScheduler(stepwell.lr_scheduler.StepLR, step_size=1)])
    second = clone(first)
    for each in (first, second):
        each.fit(INPUTS, LABELS)
    assert_identical(losses(first), losses(second))


def test_a_search_of_a_grid() -> None:
    found = []
    for library in LIBRARIES:
        torch.manual_seed(0)
        search = GridSearchCV(
            net(library),
            {"lr": [1e-3, 1e-1], "optimizer__weight_decay": [0.0, 0.1]},
            cv=2,
            scoring="neg_log_loss",
        )
        search.fit(INPUTS, LABELS)
        found.append((search.best_params_, search.cv_results_["mean_test_score"].tolist()))
    assert_same(*found, rtol=1e-4)


def test_set_params_reaches_the_groups() -> None:
    fitted = net(stepwell).fit(INPUTS, LABELS)
    fitted.set_params(lr=0.5, optimizer__weight_decay=0.25)
    (group,) = fitted.optimizer_.param_groups
    assert group["lr"] == 0.5
    assert group["weight_decay"] == 0.25


def test_a_combined_optimizer() -> None:
    """A function stands where a class is usual."""
    fitted = net(stepwell, callbacks=[LRScheduler(stepwell.lr_scheduler.StepLR, step_size=1)])
    fitted.set_params(optimizer=combined)
    fitted.fit(INPUTS, LABELS)
    rates = [group["lr"] for group in fitted.optimizer_.param_groups]
    assert rates == pytest.approx([0.02 * 1e-4, 1e-2 * 1e-4])
    assert losses(fitted)[-1] < losses(fitted)[0]


def combined(params: Any, lr: float) -> stepwell.Combined:
    params = [param for group in params for param in group["params"]]
    return stepwell.Combined(
        {
            "muon": stepwell.Muon([p for p in params if p.dim() == 2], lr=2 * lr),
            "adamw": stepwell.AdamW([p for p in params if p.dim() != 2], lr=lr),
        }
    )
