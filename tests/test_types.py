"""Do type checkers see what users call: arguments, overloads, sub-packages, rules of their own?"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stepwell

ROOT = Path(__file__).parents[1]

# a line that must be refused ends with the code of the error
USE = '''
"""Uses what is public, under mypy --strict."""

from dataclasses import dataclass
from typing import Any

import torch

import stepwell
import stepwell as optim
from stepwell.language import Average, ClipNorm, Decay, NonNegative, Transform, lerp, sign, zeros
from stepwell.lr_scheduler import Curve, Schedule, absolute, cosine, linear, warmup


class Lion(stepwell.Optimizer):
    lr: NonNegative = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: stepwell.language.NonNegative = 0.0
    by_row: bool = False

    exp_avg = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        direction = sign(lerp(state.exp_avg, grad, 1 - group.betas[0]))
        state.exp_avg = lerp(state.exp_avg, grad, 1 - group.betas[1])
        return param * (1 - group.lr * group.weight_decay) - group.lr * direction


class Centered(Transform):
    amount: NonNegative = 1.0

    @staticmethod
    def before(param: Any, grad: Any, state: Any, group: Any) -> Any:
        return grad - group.amount * stepwell.language.mean(grad)


class InTorchsManner(stepwell.Optimizer):
    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        return None


@dataclass(frozen=True)
class Flat(Curve):
    steps: float | None

    def at(self, step: float) -> float:
        return 1.0


model = torch.nn.Linear(8, 2)
params = list(model.parameters())
lion = Lion(model.named_parameters(), lr=3e-4, by_row=True, maximize=True, foreach=False)
lion = Lion([{"params": params, "lr": 0.1}], torch.tensor(0.1), (0.9, torch.tensor(0.9)))
Lion(params, lr="fast")  # arg-type
Lion(params, rate=0.1)  # call-arg
InTorchsManner(params, lr=0.1).zero_grad(set_to_none=True)

adamw = optim.AdamW(params, 1e-3, (0.9, 0.999), 1e-8, 0.01, amsgrad=True, fused=True)
optim.AdamW(params, betas=0.9)  # arg-type
optim.AdamW(params, momentum=0.9)  # call-arg
optim.SGD(params, 0.1, 0.9, nesterov=True, foreach=True)
optim.Muon(params, 0.1, adjust_lr_fn="match_rms_adamw")
optim.LBFGS(params, lr=1, line_search_fn="strong_wolfe").step(lambda: model(torch.ones(8)).sum())
losses: tuple[float, torch.Tensor] = adamw.step(lambda: 0.5), adamw.step(lambda: torch.ones(()))
adamw.step()
as_torchs: torch.optim.Optimizer = adamw
torch.amp.GradScaler("cpu").step(adamw)
composed = optim.compose(Lion, Centered, ClipNorm, Average)
with optim.averaged_weights(composed(params, lr=1e-3, max_norm=1.0), model):
    pass

hidden, others = optim.groups.muon_split(model)
both = optim.Combined({"muon": optim.Muon(hidden), "adamw": torch.optim.AdamW(others)})
both.step()
optim.Combined(optim.Muon(hidden))  # arg-type
optim.functional.sgd(params, params, [None, None], weight_decay=0.0, momentum=0.9, lr=0.1,
    dampening=0.0, nesterov=False, maximize=False)

curve = warmup(500) >> 0.5 * cosine(9_500) * Flat(10)
momenta = {"betas[0]": absolute(linear(0.85, 0.95, 1_000)), "weight_decay": cosine(1_000)}
Schedule(adamw, curve, **{"betas[0]": absolute(linear(0.85, 0.95, 1_000))})
Schedule(adamw, lr=[curve, None], last_epoch=3, **momenta)
Schedule(adamw, lr={"head": curve, 0: absolute(curve)}, weight_decay=cosine(10_000))
Schedule(adamw, lr=0.1)  # call-overload
as_torchs_schedule: torch.optim.lr_scheduler.LRScheduler = optim.lr_scheduler.StepLR(adamw, 30)
optim.lr_scheduler.ReduceLROnPlateau(adamw, "min", patience=3).step(0.5)

saved = optim.checkpoint.save("a.safetensors", model=model, optimizer=adamw, extra={"epoch": 3})
epoch = optim.checkpoint.load("a.safetensors", model=model, optimizer=adamw).extra["epoch"]
wrapped: torch.optim.Optimizer = adamw
optim.checkpoint.load("a.safetensors", model=model, optimizer=wrapped, scheduler=as_torchs_schedule)
optim.checkpoint.load("a.safetensors", optimizer=model)  # arg-type
print(optim.groups.table(optim.AdamW(optim.groups.no_decay(model), lr=1e-3)), optim.__version__)
average = optim.swa_utils.AveragedModel(model, use_buffers=True)
optim.plot.schedule(curve).savefig("a.png")
task: optim.race.Task
optim.Lion  # attr-defined
'''


@pytest.mark.slow
def test_a_users_file_passes_under_mypy_and_mistakes_in_it_do_not(tmp_path):
    pytest.importorskip("mypy", reason="mypy is installed by the extra test")
    path = tmp_path / "use.py"
    path.write_text(USE)
    # with the configuration and the cache of the project's own check
    run = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", str(path)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    said = re.findall(r"use\.py:(\d+): error: .*\[([\w-]+)\]", done.stdout)
    expected = [
        (str(number), line.partition("  # ")[2])
        for number, line in enumerate(USE.splitlines(), start=1)
        if re.search(r"  # [\w-]+$", line)
    ]
    assert said == expected, done.stdout


@pytest.mark.tiny
def test_the_file_uses_every_sub_package():
    packages = [name for name in stepwell.__all__ if inspect.ismodule(getattr(stepwell, name))]
    assert all(re.search(rf"\b(optim|stepwell)\.{name}\.", USE) for name in packages)
