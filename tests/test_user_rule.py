"""Is a rule that a user writes right, and does it get all that the shell gives to ours?

The rules of `rules.py` are held against what their papers say of them: a formula that is only
compared with itself on another back-end could be wrong everywhere alike.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

import stepwell
from stepwell.language import Decay, NonNegative, Switch, lerp, sign, zeros

from . import rules
from .cases import REQUESTS, named, numbers, parameters, set_grads, train
from .compare import assert_same_bits, assert_same_training, assert_training_within, backends

# with TRITON_INTERPRET=1 these go through the kernels for GPUs
pytestmark = pytest.mark.interpret

MATRICES = ((3, 4), (20, 30))
BOTH = ({"foreach": False}, {"fused": True})


def _moved(rule: Any, steps: int = 1, shapes: Any = MATRICES, **options: Any) -> Any:
    """(what each parameter moved by in the last step, where from, its gradient), the optimizer."""
    params = parameters(shapes, torch.float64)
    optimizer = rule(params, **options)
    for step in range(steps):
        set_grads(params, step)
        before = [param.detach().clone() for param in params]
        optimizer.step()
    grads = [param.grad for param in params]
    moves = [param.detach() - old for param, old in zip(params, before, strict=True)]
    return list(zip(moves, before, grads, strict=True)), optimizer


close = torch.testing.assert_close


@pytest.mark.parametrize("request_", BOTH)
class TestPapers:
    """What must hold whatever the numbers are."""

    def test_lion_steps_by_signs(self, request_: dict[str, Any]) -> None:
        rows, _ = _moved(rules.Lion, lr=0.01, **request_)
        for move, _, grad in rows:
            close(move, -0.01 * grad.sign())

    def test_lion_interpolates_twice(self, request_: dict[str, Any]) -> None:
        param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        lion = rules.Lion([param], lr=1.0, betas=(0.5, 0.75), **request_)
        signs = []
        for value in (8.0, -1.5, -3.0):
            before = param.item()
            param.grad = torch.tensor([value], dtype=torch.float64)
            lion.step()
            signs.append(param.item() - before)
        # m = 2, then 1.125; c = 4, then 0.25, then -0.9375
        assert signs == [-1, -1, 1]
        assert lion.state[param]["exp_avg"].item() == 0.75 * 1.125 - 0.25 * 3

    def test_lamb_steps_by_a_share_of_the_norm(self, request_: dict[str, Any]) -> None:
        rows, _ = _moved(rules.LAMB, 3, lr=0.01, **request_)
        for move, old, _ in rows:
            close(move.norm(), 0.01 * old.norm())

    def test_lamb_without_layers_is_adamw(self, request_: dict[str, Any]) -> None:
        rows, _ = _moved(rules.LAMB, lr=0.01, eps=0.0, weight_decay=0.0, **request_)
        for move, old, grad in rows:
            trust = old.norm() / math.sqrt(old.numel())
            close(move, -0.01 * trust * grad.sign())

    def test_lars_steps_by_a_share_of_the_norm(self, request_: dict[str, Any]) -> None:
        rows, _ = _moved(rules.LARS, lr=0.1, weight_decay=0.0, **request_)
        for move, old, grad in rows:
            close(move, -0.1 * 1e-3 * old.norm() * grad / grad.norm())

    def test_adabelief_trusts_what_it_foresaw(self, request_: dict[str, Any]) -> None:
        rows, optimizer = _moved(rules.AdaBelief, lr=0.01, eps=1e-16, **request_)
        for (move, _, grad), state in zip(rows, optimizer.state.values(), strict=True):
            # after a first step m = 0.1 g, and s = (0.9 g)^2 without its bias
            close(move, -0.01 * grad.sign() / 0.9)
            close(state["exp_avg_var"], 0.001 * (0.9 * grad) ** 2)

    def test_yogi_changes_v_by_no_more_than_the_square(self, request_: dict[str, Any]) -> None:
        _, optimizer = _moved(rules.Yogi, 1, **request_)
        old = [state["exp_avg_sq"].clone() for state in optimizer.state.values()]
        params = optimizer.param_groups[0]["params"]
        set_grads(params, 1)
        optimizer.step()
        for param, before in zip(params, old, strict=True):
            change = optimizer.state[param]["exp_avg_sq"] - before
            close(change.abs(), 0.001 * param.grad**2)
            assert torch.equal(change > 0, before < param.grad**2)

    def test_adan_starts_like_a_signed_step(self, request_: dict[str, Any]) -> None:
        rows, _ = _moved(rules.Adan, lr=0.01, eps=0.0, weight_decay=0.5, **request_)
        for move, old, grad in rows:
            close(move, (old - 0.01 * grad.sign()) / 1.005 - old)

    def test_adan_with_a_steady_gradient_has_no_difference(self, request_: dict[str, Any]) -> None:
        param = nn.Parameter(torch.ones(3, dtype=torch.float64))
        adan = rules.Adan([param], **request_)
        for _ in range(3):
            param.grad = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
            adan.step()
        assert (adan.state[param]["exp_avg_diff"] == 0).all()
        close(adan.state[param]["exp_avg"], param.grad)
        close(adan.state[param]["exp_avg_sq"], param.grad**2)

    def test_adopt_only_looks_at_first(self, request_: dict[str, Any]) -> None:
        rows, optimizer = _moved(rules.ADOPT, 1, **request_)
        for (move, _, grad), state in zip(rows, optimizer.state.values(), strict=True):
            assert (move == 0).all()
            close(state["exp_avg_sq"], grad**2)
        old = [state["exp_avg_sq"].clone() for state in optimizer.state.values()]
        params = optimizer.param_groups[0]["params"]
        set_grads(params, 1)
        before = [param.detach().clone() for param in params]
        optimizer.step()
        for param, value, start in zip(params, old, before, strict=True):
            # normalized by the v of the step before, and held within 1 = t**0.25
            scaled = (param.grad / value.sqrt()).clamp(-1, 1)
            close(param.detach() - start, -1e-3 * 0.1 * scaled)

    def test_prodigy_finds_its_rate(self, request_: dict[str, Any]) -> None:
        target = torch.tensor([3.0, -4.0], dtype=torch.float64)
        one, other = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
        prodigy = rules.Prodigy([{"params": [one]}, {"params": [other]}], **request_)
        goals = ((one, target), (other, target / 100))
        rates = []
        for _ in range(60):
            # the second group has a hundredth of the way to go
            one.grad, other.grad = ((p.detach() - w).sign() for p, w in goals)
            prodigy.step()
            rates.append(float(prodigy.state[one]["d"]))
        assert rates == sorted(rates)
        # from 1e-6 towards the distance, which it does not pass
        assert 0.1 < rates[-1] < float(target.norm())
        assert float(prodigy.state[other]["d"]) < float(target.norm()) / 100

    def test_mars_corrects_by_the_change(self, request_: dict[str, Any]) -> None:
        options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0, "eps": 0.0, **request_}
        rows, _ = _moved(rules.MARS, 1, **options)
        for move, _, grad in rows:
            # clipped to norm 1, which a first step of Adam does not see
            close(move, -0.01 * grad.sign())
        param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        mars = rules.MARS([param], betas=(0.5, 0.5), gamma=0.25, **options)
        for values in ([0.3, 0.0], [0.1, 0.2]):
            param.grad = torch.tensor(values, dtype=torch.float64)
            mars.step()
        corrected = torch.tensor([0.1 - 0.25 * 0.2, 0.2 + 0.25 * 0.2], dtype=torch.float64)
        first = torch.tensor([0.3, 0.0], dtype=torch.float64)
        close(mars.state[param]["exp_avg"], 0.25 * first + 0.5 * corrected)

    def test_cautious_adamw_moves_only_downhill(self, request_: dict[str, Any]) -> None:
        options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0}
        rows, _ = _moved(rules.CautiousAdamW, 4, **options, **request_)
        plain, _ = _moved(stepwell.AdamW, 4, **options)
        masked = 0
        for move, _, grad in rows:
            assert (move * grad <= 0).all()
            masked += int((move == 0).sum())
        assert masked > 100
        # a first step masks nothing
        rows, _ = _moved(rules.CautiousAdamW, 1, **options, **request_)
        plain, _ = _moved(stepwell.AdamW, 1, **options)
        for (move, _, _), (expected, _, _) in zip(rows, plain, strict=True):
            close(move, expected)

    def test_factored_is_torchs_adafactor(self, request_: dict[str, Any]) -> None:
        params, twins = (parameters(MATRICES, torch.float64) for _ in range(2))
        # below the 1 / sqrt(step) at which torch caps the rate
        options: dict[str, Any] = {"lr": 0.05, "beta2_decay": -0.8}
        ours = rules.Factored(params, eps1=1e-14, **options, **request_)
        theirs = torch.optim.Adafactor(twins, eps=(1e-14, 1e-3), **options)
        for step in range(5):
            set_grads(params, step)
            set_grads(twins, step)
            ours.step()
            theirs.step()
        for param, twin in zip(params, twins, strict=True):
            close(param, twin, rtol=1e-6, atol=1e-9)
            assert ours.state[param]["row_var"].shape == theirs.state[twin]["row_var"].shape
            assert ours.state[param]["col_var"].shape == theirs.state[twin]["col_var"].shape

    def test_atan2_needs_no_eps(self, request_: dict[str, Any]) -> None:
        for scale in (1.0, 1e-150):
            params = parameters(MATRICES, torch.float64)
            optimizer = rules.AdamAtan2(params, lr=0.01, **request_)
            set_grads(params, 0, scale=scale)
            before = [param.detach().clone() for param in params]
            optimizer.step()
            for param, old in zip(params, before, strict=True):
                # atan2(g, |g|) = pi / 4 sign(g), however small g is
                close(param.detach() - old, -0.01 * param.grad.sign())

    def test_the_largest_sets_the_step(self, request_: dict[str, Any]) -> None:
        rows, _ = _moved(rules.SignedMax, lr=0.1, **request_)
        for move, _, grad in rows:
            close(move, -0.1 * grad.abs().max() * grad.sign())


# A rule of one's own


def _sign_descent() -> type[Any]:
    class SignDescent(stepwell.Optimizer):
        """Steps by signs."""

        lr: NonNegative = 1e-2
        momentum: Decay = 0.9
        decay: Switch = 0

        exp_avg = zeros()

        @staticmethod
        def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
            if group.decay:
                param = param * (1 - group.lr * group.decay)
            state.exp_avg = lerp(state.exp_avg, grad, 1 - group.momentum)
            return param - group.lr * sign(state.exp_avg)

    return SignDescent


def test_its_constructor() -> None:
    parameters_of = inspect.signature(_sign_descent()).parameters
    assert list(parameters_of) == [
        *("params", "lr", "momentum", "decay"),
        *("maximize", "foreach", "capturable", "differentiable", "fused"),
    ]
    assert parameters_of["decay"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert parameters_of["fused"].kind is inspect.Parameter.KEYWORD_ONLY
    made = _sign_descent()(parameters(MATRICES, torch.float32), 0.5, 0.8)
    assert made.defaults["lr"] == 0.5
    assert isinstance(made, torch.optim.Optimizer)


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": math.nan}, r"Invalid learning rate: nan \(SignDescent: lr must be"),
        ({"momentum": 1.0}, r"Invalid momentum value: 1.0 \(SignDescent: momentum must be"),
        ({"momentun": 0.5}, "unexpected keyword argument 'momentun'; did you mean 'momentum'?"),
        ({"foreach": True, "fused": True}, "`fused` and `foreach` cannot be `True` together"),
    ],
)
def test_its_validation(options: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=said):
        _sign_descent()(parameters(MATRICES, torch.float32), **options)


@pytest.mark.parametrize("dtype", **named((torch.float32, torch.float64, torch.bfloat16)))
@pytest.mark.parametrize("decay", [0, 0.5])
def test_all_backends(decay: float, dtype: torch.dtype) -> None:
    rule = _sign_descent()
    made = {
        name: train(lambda p: rule(p, decay=decay, **request), parameters(MATRICES, dtype), 4)  # noqa: B023
        for name, request in REQUESTS.items()
    }
    for name, optimizer in made.items():
        assert backends(optimizer) == {name}
        assert_training_within(optimizer, made["eager"], 8, name)


@pytest.mark.parametrize("request_", REQUESTS)
def test_shared_flags(request_: str) -> None:
    rule, request = _sign_descent(), REQUESTS[request_]
    up = train(lambda p: rule(p, maximize=True, **request), parameters(MATRICES, torch.float32), 1)
    down = train(lambda p: rule(p, **request), parameters(MATRICES, torch.float32), 1)
    params = zip(*(o.param_groups[0]["params"] for o in (up, down)), strict=True)
    for (one, other), start in zip(params, parameters(MATRICES, torch.float32), strict=True):
        close((one + other) / 2, start)


def test_it_is_differentiable() -> None:
    rate = torch.tensor(0.1, requires_grad=True)
    leaf = torch.ones(3, requires_grad=True)
    param = leaf.clone()
    optimizer = _sign_descent()([param], lr=rate, differentiable=True)
    param.grad = torch.tensor([1.0, -2.0, 0.0])
    optimizer.step()
    param.sum().backward()
    assert rate.grad is not None
    assert (leaf.grad == 1).all()
    assert float(rate.grad) == 0.0 - 1.0 + 1.0


@pytest.mark.parametrize("rule", rules.RULES)
def test_checkpoints(rule: type[Any]) -> None:
    straight = train(rule, parameters(MATRICES, torch.float32), 2)
    file = io.BytesIO()
    torch.save([straight.state_dict(), straight.param_groups[0]["params"]], file)
    file.seek(0)
    with torch.serialization.safe_globals([]):
        state_dict, values = torch.load(file, weights_only=True)
    params = parameters(MATRICES, torch.float32)
    for param, value in zip(params, values, strict=True):
        param.data.copy_(value)
    resumed = rule(params)
    resumed.load_state_dict(state_dict)
    assert_same_training(resumed, straight, "loaded")
    for step in (2, 3):
        for optimizer in (straight, resumed):
            set_grads(optimizer.param_groups[0]["params"], step)
            optimizer.step()
    assert_same_training(resumed, straight, rule.__name__)


@pytest.mark.parametrize("rule", rules.RULES)
def test_copies(rule: type[Any]) -> None:
    optimizer = train(rule, parameters(MATRICES, torch.float32), 2)
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, copied):
        set_grads(one.param_groups[0]["params"], 2)
        one.step()
    assert_same_training(copied, optimizer, rule.__name__)


@pytest.mark.parametrize("rule", [r for r in rules.RULES if r is not rules.Factored])
def test_complex_numbers_are_pairs(rule: type[Any]) -> None:
    """But for reductions over elements, which then count parts, a part is a parameter."""
    param = nn.Parameter(numbers((5, 3), torch.complex64, 1))
    pair = nn.Parameter(torch.view_as_real(param.detach()).clone())
    one, other = rule([param]), rule([pair])
    for step in range(3):
        grad = numbers((5, 3), torch.complex64, 10 + step)
        param.grad, pair.grad = grad, torch.view_as_real(grad).clone()
        one.step()
        other.step()
    assert_same_bits(torch.view_as_real(param.detach()), pair, rule.__name__)
