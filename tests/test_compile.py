"""Does code under torch.compile step, and save, as it does without?"""

from __future__ import annotations

import pytest
import torch

import stepwell

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
