"""Does a training that was saved and loaded at any step go on to the same bits?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stepwell.checkpoint import load, save

from .cases import NATIVE, REQUESTS
from .compare import assert_same_training
from .test_properties import SETTINGS, Training, trainings

pytestmark = pytest.mark.interpret


class Weights(nn.Module):
    """Parameters as a model has them."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(params)


def made(training: Training, options: dict[str, Any]) -> tuple[Weights, Any]:
    """The model and the optimizer at the start."""
    params = training.params(permuted=True)
    return Weights(params), training.case.make(training.groups(params), **options)


def go_on(training: Training, model: Weights, optimizer: Any, steps: range) -> None:
    """Take these steps."""
    for step in steps:
        training.set_grads(list(model.weights), step, permuted=True)
        optimizer.step()


@SETTINGS
@given(trainings(), st.sampled_from(sorted(REQUESTS)), st.data())
def test_save_and_load_at_any_step(training: Training, request_: str, data: st.DataObject) -> None:
    options = {} if request_ == NATIVE else REQUESTS[request_]
    stop = data.draw(st.integers(0, len(training.present)), label="saved after")
    model, optimizer = made(training, options)
    other, resumed = made(training, options)
    # what is loaded into has gone its own way, but for the state, which it may lack
    for param in other.weights:
        param.data.zero_()
    go_on(training, model, optimizer, training.steps[:stop])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.safetensors"
        save(path, model=model, optimizer=optimizer)
        load(path, model=other, optimizer=resumed)
    what = f"{training.case.name} on {request_}, saved after step {stop}"
    assert_same_training(resumed, optimizer, f"{what}, as loaded")
    for each in ((model, optimizer), (other, resumed)):
        go_on(training, *each, training.steps[stop:])
    assert_same_training(resumed, optimizer, what)
