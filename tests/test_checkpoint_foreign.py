"""Are files of bitsandbytes, torchao and torch-optimi read as these libraries themselves read them?

The libraries are the oracles: they write the files, they decode what they have quantized, and the
next step is compared with theirs. It is taken from decoded state in both, so that only roundings
of the step itself differ: a few ULP, and one where a parameter of half precision is rounded.
"""

from __future__ import annotations

import functools
import io
import math
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.__main__ import main
from stepwell.checkpoint import CheckpointError, convert, load, to_torch
from stepwell.checkpoint.convert import from_torch
from stepwell.checkpoint.foreign import stand_ins

from .cases import named, numbers, set_grads
from .compare import assert_same_bits, assert_within, spacing

# blocks without a rest, with one, fewer elements than are quantized, half precision
SHAPES = {"wide": (64, 80), "ragged": (70, 70), "small": (7,), "half": (64, 128)}
STEPS = 3


@dataclass(frozen=True, eq=False)
class Case:
    """A class of another library.

    Attributes:
        module, kind: where it is
        twin: ours, which goes on from its files
        said: what `convert` says of them
        decoded: the two moments in the state of a parameter, as the library itself reads them
        options: arguments
    """

    module: str
    kind: str
    said: str
    decoded: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Tensor, Tensor]]
    options: Mapping[str, Any]
    twin: type[Any] = stepwell.AdamW

    def make(self, params: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using weight_decay up to")
            return getattr(imported(self.module), self.kind)(params, **self.options)

    def __str__(self) -> str:
        more = ", ".join(key for key in self.options if key not in RATES)
        return f"{self.module.partition('.')[0]} {self.kind}({more})"


def imported(name: str) -> Any:
    return pytest.importorskip(name, reason="no such wheels for this system")


def of_bitsandbytes(entry: Mapping[str, Any], _: Any) -> tuple[Tensor, Tensor]:
    functional = imported("bitsandbytes.functional")
    parts = {**entry, **entry.get("__bnb_optimizer_quant_state__", {})}

    def moment(number: int) -> Tensor:
        codes = parts[f"state{number}"]
        if codes.dtype == torch.float32:
            return codes
        book, scales = parts[f"qmap{number}"], parts[f"absmax{number}"]
        return functional.dequantize_blockwise(codes, absmax=scales, code=book, blocksize=256)

    return moment(1), moment(2)


def of_torchao(entry: Mapping[str, Any], _: Any) -> tuple[Tensor, Tensor]:
    one, other = (
        value.dequantize() if hasattr(value, "codes") else value.float()
        for value in (entry["exp_avg"], entry["exp_avg_sq"])
    )
    return one, other


def of_optimi(entry: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """A mean without bias is the weighted sum of gradients over the sum of weights."""
    weights = [sum((1 - beta) * beta**i for i in range(STEPS)) for beta in (0.8, 0.95)]
    one, other = (
        (entry[key].double() * weight).float()
        for key, weight in zip(("exp_avg", "exp_avg_sq"), weights, strict=True)
    )
    return one, other


RATES = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.05}
BITSANDBYTES = "state of bitsandbytes, read to float32"
TORCHAO = "quantized state of torchao, read to float32"
OPTIMI = "state of torch-optimi, read to float32"
CASES = (
    *(
        Case("bitsandbytes.optim", name, BITSANDBYTES, of_bitsandbytes, RATES)
        for name in ("AdamW8bit", "PagedAdamW8bit", "AdamW32bit", "AdamW")
    ),
    # decays as AdamW does
    Case("bitsandbytes.optim", "Adam8bit", BITSANDBYTES, of_bitsandbytes, RATES, stepwell.Adam),
    *(
        Case("torchao.optim", name, TORCHAO, of_torchao, RATES)
        for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")
    ),
    Case("torchao.optim", "Adam8bit", TORCHAO, of_torchao, RATES, stepwell.Adam),
    Case("optimi", "AdamW", OPTIMI, of_optimi, RATES),
    Case("optimi", "AdamW", OPTIMI, of_optimi, {**RATES, "decouple_lr": True, "max_lr": 0.25}),
    Case("optimi", "Adam", OPTIMI, of_optimi, RATES, stepwell.Adam),
)
each_case = pytest.mark.parametrize("case", **named(CASES))


def fresh() -> dict[str, nn.Parameter]:
    dtypes = {"half": torch.bfloat16}
    return {
        name: nn.Parameter(numbers(shape, dtypes.get(name, torch.float32), len(name)))
        for name, shape in SHAPES.items()
    }


def take_steps(optimizer: Any, params: Mapping[str, Tensor], steps: range) -> None:
    for step in steps:
        set_grads([*params.values()], step)
        # torchao compiles its step, with a compiler that not every machine has
        with mock.patch("torch.compile", lambda step, **_: step), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
            optimizer.step()


def trained(case: Case) -> tuple[dict[str, nn.Parameter], Any]:
    params = fresh()
    optimizer = case.make([*params.values()])
    take_steps(optimizer, params, range(STEPS))
    return params, optimizer


@functools.cache
def file_of(case: Case) -> bytes:
    file = io.BytesIO()
    torch.save(trained(case)[1].state_dict(), file)
    return file.getvalue()


def saved_by(case: Case) -> Any:
    return torch.load(io.BytesIO(file_of(case)), weights_only=True)


def resumed(case: Case, path: Any, params: Mapping[str, Tensor]) -> Any:
    """Ours, after loading a converted file, on copies of these parameters."""
    copies = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    optimizer = case.twin(copies.items(), lr=1.0)
    load(path, optimizer=optimizer)
    return copies, optimizer


# Files of the libraries


@each_case
def test_the_training_goes_on(path, capsys, case):
    params, theirs = trained(case)
    source, names = path.with_name("optimizer.pt"), path.with_name("names.txt")
    torch.save(theirs.state_dict(), source)
    names.write_text("\n".join(params))
    assert main(["checkpoint", "convert", str(source), str(path), "--names", str(names)]) == 0
    assert (
        capsys.readouterr().out == f"{path} is written, a checkpoint with optimizer; {case.said}\n"
    )

    copies, ours = resumed(case, path, params)
    saved = theirs.state_dict()
    for index, (name, param) in enumerate(copies.items()):
        state = ours.state[param]
        expected = case.decoded(saved["state"][index], saved["param_groups"][0])
        for key, moment in zip(("exp_avg", "exp_avg_sq"), expected, strict=True):
            assert_same_bits(state[key], moment, f"{name} {key}")
        assert float(state["step"]) == STEPS
    take_steps(theirs, params, range(STEPS, STEPS + 1))
    take_steps(ours, copies, range(STEPS, STEPS + 1))
    for name, param in params.items():
        assert_within(copies[name].detach(), param.detach(), 8, name)


@each_case
def test_hyperparameters(path, case):
    saved = saved_by(case)
    saved["param_groups"][0]["initial_lr"] = saved["param_groups"][0]["lr"]
    saved["param_groups"][0]["note"] = "the user's own"
    from_torch(saved, path, [*SHAPES])
    _, ours = resumed(case, path, fresh())
    untouched = case.twin(fresh().items())
    found = ours.param_groups[0]
    # nothing of the library is left in the group
    assert found.keys() - untouched.param_groups[0].keys() == {"initial_lr", "note"}
    expected = {**case.options, "initial_lr": case.options["lr"], "amsgrad": False}
    if expected.pop("decouple_lr", False):
        expected["weight_decay"] = case.options["weight_decay"] / expected.pop("max_lr")
    rate = torch.tensor(expected["lr"]).item() if case.said == TORCHAO else expected["lr"]
    expected |= {"lr": rate, "initial_lr": rate}
    assert {key: found[key] for key in expected} == expected
    assert type(found["lr"]) is float
    # Adam of bitsandbytes is AdamW
    decoupled = case.twin is stepwell.AdamW or case.said == BITSANDBYTES
    assert found["decoupled_weight_decay"] == decoupled


@each_case
def test_torch_goes_on_from_a_file_of_theirs(path, case):
    """A colleague without stepwell, and without the other library."""
    params = fresh()
    from_torch(saved_by(case), path, [*params])
    copies, ours = resumed(case, path, params)
    twins = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    target = path.with_name("run.pt")
    convert(path, target)
    torchs = getattr(torch.optim, case.twin.__name__)(twins.items(), foreach=False)
    torchs.load_state_dict(torch.load(target, weights_only=True)["optimizer"])
    for optimizer, held in ((ours, copies), (torchs, twins)):
        take_steps(optimizer, held, range(STEPS, STEPS + 1))
    for name in set(SHAPES) - {"half"}:
        assert_within(copies[name].detach(), twins[name].detach(), 8, name)


CASE = {str(case): case for case in CASES}
EIGHT_BITS, PAGED = CASE["bitsandbytes AdamW8bit()"], CASE["bitsandbytes PagedAdamW8bit()"]
OF_TORCHAO, FOUR_BITS = CASE["torchao AdamW8bit()"], CASE["torchao AdamW4bit()"]
FLOAT8, OF_OPTIMI = CASE["torchao AdamWFp8()"], CASE["optimi AdamW()"]


def test_optimi_goes_on_for_long(path):
    """Nothing is quantized there: 64 ULP after 24 steps, as the twins of torch's classes."""
    params, theirs = trained(OF_OPTIMI)
    from_torch(theirs.state_dict(), path, [*params])
    copies, ours = resumed(OF_OPTIMI, path, params)
    for optimizer, held in ((theirs, params), (ours, copies)):
        take_steps(optimizer, held, range(STEPS, STEPS + 24))
    for name in set(SHAPES) - {"half"}:
        assert_within(copies[name].detach(), params[name].detach(), 64, name)


def test_what_kahan_holds_back_is_less_than_half_an_ulp(path):
    params, theirs = trained(OF_OPTIMI)
    held = theirs.state[params["half"]]["kahan_comp"]
    assert bool(held.any())
    assert bool((held.abs() <= spacing(params["half"].detach(), torch.bfloat16) / 2).all())
    from_torch(theirs.state_dict(), path, [*params])
    _, ours = resumed(OF_OPTIMI, path, params)
    assert all("kahan_comp" not in state for state in ours.state.values())


def test_moments_in_the_dtype_of_the_parameter(path):
    params, theirs = trained(EIGHT_BITS)
    from_torch(theirs.state_dict(), path, [*params])
    ours = stepwell.AdamW(params.items())
    for dtype, expected in (("saved", torch.float32), ("param", torch.bfloat16)):
        load(path, optimizer=ours, dtype=dtype)
        assert ours.state[params["half"]]["exp_avg"].dtype == expected


# Without the libraries, of other versions, in other moods


def test_torchao_is_not_needed(path, monkeypatch):
    """What stands for its classes is ours, and there only while the file is read."""
    params, theirs = trained(OF_TORCHAO)
    source = path.with_name("optimizer.pt")
    torch.save(theirs.state_dict(), source)
    registered = torch.serialization.get_safe_globals()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    try:
        torch.serialization.clear_safe_globals()
        assert convert(source, path, [*params]).endswith(f"; {TORCHAO}")
        assert not torch.serialization.get_safe_globals()
    finally:
        torch.serialization.add_safe_globals(registered)
    _, ours = resumed(OF_TORCHAO, path, params)
    expected, _ = of_torchao(theirs.state_dict()["state"][0], {})
    found = ours.state[ours.param_groups[0]["params"][0]]["exp_avg"]
    assert_same_bits(found, expected, "a moment")


def test_classes_that_torchao_has_registered_stay_its_own():
    """For whoever reads a file in another thread while one is converted."""
    registered = imported("torchao.optim.subclass_8bit").OptimState8bit
    names = {name for _, name in stand_ins()}
    assert f"{registered.__module__}.{registered.__qualname__}" not in names
    assert all(name.startswith("torchao.prototype.") for name in names)


def test_torchao_where_it_was_once(path):
    params, theirs = trained(OF_TORCHAO)
    source, old = path.with_name("new.pt"), path.with_name("old.pt")
    torch.save(theirs.state_dict(), source)
    with zipfile.ZipFile(source) as read, zipfile.ZipFile(old, "w") as written:
        for name in read.namelist():
            once = b"torchao.prototype.low_bit_optim.subclass_8bit"
            content = read.read(name).replace(b"torchao.optim.subclass_8bit", once)
            written.writestr(name, content)
    assert convert(old, path, [*params]).endswith(f"; {TORCHAO}")
    moved = str(to_torch(path))
    convert(source, path, [*params])
    assert moved == str(to_torch(path))


def test_torchao_with_the_largest_squares(path):
    params, theirs = trained(OF_TORCHAO)
    saved = theirs.state_dict()
    saved["param_groups"][0]["amsgrad"] = True
    for entry in saved["state"].values():
        entry["max_exp_avg_sq"] = entry["exp_avg_sq"]
    from_torch(saved, path, [*params])
    found = to_torch(path)["optimizer"]["state"][0]
    assert_same_bits(found["max_exp_avg_sq"], found["exp_avg_sq"], "the largest")
    resumed(OF_TORCHAO, path, params)


@pytest.mark.parametrize("block", [256, 2048])
def test_bitsandbytes_of_other_versions(path, block):
    """State in the open, as before 0.50, and in longer blocks, as before those of 256."""
    functional = imported("bitsandbytes.functional")
    params, theirs = trained(EIGHT_BITS)
    saved = theirs.state_dict()
    wrapped = saved["state"][0].pop("__bnb_optimizer_quant_state__")
    exact = numbers(SHAPES["wide"], torch.float32, 5).square()
    books = {"1": functional.create_dynamic_map(True), "2": functional.create_dynamic_map(False)}
    for which, book in books.items():
        codes, state = functional.quantize_blockwise(exact, code=book, blocksize=block)
        wrapped |= {f"state{which}": codes, f"absmax{which}": state.absmax, f"qmap{which}": book}
    saved["state"][0] |= wrapped
    for key in ("alpha", "t_alpha", "t_beta3"):
        saved["param_groups"][0].pop(key)
    from_torch(saved, path, [*params])
    found = to_torch(path)["optimizer"]["state"][0]
    for which, key in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        codes, scales, book = (wrapped[f"{part}{which}"] for part in ("state", "absmax", "qmap"))
        # number by number, as the paper has it
        flat = [book[c] * scales[i // block] for i, c in enumerate(codes.flatten().tolist())]
        assert_same_bits(found[key].flatten(), torch.stack(flat), key)


def test_bitsandbytes_from_paged_memory(path):
    """Its tensors there have attributes, which are saved with them."""
    params, theirs = trained(PAGED)
    for entry in theirs.state.values():
        entry["state1"].is_paged, entry["state1"].page_deviceid = True, 0
    source = path.with_name("optimizer.pt")
    torch.save(theirs.state_dict(), source)
    assert convert(source, path, [*params]).endswith(f"; {BITSANDBYTES}")


def test_optimi_that_releases_gradients(path):
    """Each parameter has a count of its own there, and its group in its state."""
    params = fresh()
    theirs = imported("optimi").AdamW([*params.values()], **RATES, gradient_release=True)
    for step, param in enumerate(params.values()):
        for _ in range(step):
            set_grads([*params.values()], step)
            theirs.step(param=param)
    source = path.with_name("optimizer.pt")
    torch.save(theirs.state_dict(), source)
    assert convert(source, path, [*params]).endswith(f"; {OPTIMI}")
    saved = to_torch(path)["optimizer"]["state"]
    # the first was never updated
    assert saved.pop(0) == {}
    assert {key: int(entry["step"]) for key, entry in saved.items()} == {1: 1, 2: 2, 3: 3}
    _, ours = resumed(OF_OPTIMI, path, params)
    take_steps(ours, fresh(), range(1))


def test_a_file_from_before_the_first_step(path):
    for case in (EIGHT_BITS, OF_TORCHAO, OF_OPTIMI):
        params = fresh()
        from_torch(case.make([*params.values()]).state_dict(), path, [*params])
        _, ours = resumed(case, path, params)
        assert not ours.state
        assert ours.param_groups[0]["betas"] == RATES["betas"]
        assert ours.param_groups[0]["lr"] == pytest.approx(RATES["lr"])


# What is refused


def bits(**more: Any) -> Callable[[Any], None]:
    """Changes parts of the first parameter's state, of bitsandbytes."""

    def change(saved: Any) -> None:
        wrapped = saved["state"][0]["__bnb_optimizer_quant_state__"]
        for key, value in more.items():
            if value is None:
                del wrapped[key]
            else:
                wrapped[key] = value(wrapped[key]) if callable(value) else value

    return change


def parts(**more: Any) -> Callable[[Any], None]:
    """Changes parts of the first parameter's first moment, of torchao."""

    def change(saved: Any) -> None:
        moment = saved["state"][0]["exp_avg"]
        for key, value in more.items():
            setattr(moment, key, value(getattr(moment, key)) if callable(value) else value)

    return change


def entry(**more: Any) -> Callable[[Any], None]:
    """Changes the first parameter's state."""

    def change(saved: Any) -> None:
        saved["state"][0] = {**saved["state"][0], **more}

    return change


def group(**more: Any) -> Callable[[Any], None]:
    return lambda saved: saved["param_groups"][0].update(more)


def with_first(value: float) -> Callable[[Tensor], Tensor]:
    return lambda old: torch.cat([torch.tensor([value]), old.flatten()[1:]])


NAN, INF = math.nan, math.inf
REFUSED: dict[str, tuple[Case, Callable[[Any], None], str]] = {
    "no scales": (EIGHT_BITS, bits(absmax1=None), "state is step, state1, .*; AdamW of bits"),
    "no state2": (EIGHT_BITS, bits(state2=None, qmap2=None, absmax2=None), "wide: state is step"),
    "clipping": (EIGHT_BITS, entry(gnorm_vec=torch.ones(100)), "gnorm_vec"),
    "fewer scales": (EIGHT_BITS, bits(absmax1=lambda t: t[:-1]), "blocks of 256 must have 20 scal"),
    "scales of NaN": (EIGHT_BITS, bits(absmax2=with_first(NAN)), "state2: .*not finite"),
    "endless scales": (EIGHT_BITS, bits(absmax1=with_first(INF)), "state1: .*not finite"),
    "negative scales": (EIGHT_BITS, bits(absmax1=with_first(-1.0)), "a scale is negative"),
    "scales in a grid": (
        EIGHT_BITS,
        bits(absmax1=lambda t: t.reshape(4, 5)),
        "must have 20 scales",
    ),
    "scales of text": (EIGHT_BITS, bits(absmax1="1"), "must have 20 scales"),
    "codes of floats": (
        EIGHT_BITS,
        bits(state1=lambda t: t.float()),
        "must be a whole tensor of uint8",
    ),
    "a short book": (EIGHT_BITS, bits(qmap1=lambda t: t[:255]), "must hold 256 numbers"),
    "a book of NaN": (EIGHT_BITS, bits(qmap1=lambda t: t * NAN), "not finite"),
    "a signed book": (EIGHT_BITS, bits(qmap2=lambda t: -t), "a mean of squares is negative"),
    "another shape": (EIGHT_BITS, bits(state1=lambda t: t.reshape(-1)), "moments have shapes"),
    "channels last": (
        EIGHT_BITS,
        bits(state1=lambda t: t.t().contiguous().t()),
        "state1 lies in another order of memory",
    ),
    "repeated codes": (
        EIGHT_BITS,
        bits(state1=lambda t: t.flatten()[:1].expand(1 << 40)),
        "must be a whole tensor of uint8",
    ),
    "no count": (EIGHT_BITS, entry(step=None), "step must be one number, 0 or more, got None"),
    "a count below 0": (EIGHT_BITS, entry(step=-1), "step must be one number"),
    "AdEMAMix": (EIGHT_BITS, group(alpha=5.0), "AdEMAMix"),
    "a list": (EIGHT_BITS, lambda saved: saved["state"].update({0: [1]}), "must be a dict"),
    "many scales": (
        OF_TORCHAO,
        parts(scale=lambda t: t.new_ones(1).expand(1 << 40)),
        "0 scales do not divide 5,120",
    ),
    "7 scales": (OF_TORCHAO, parts(scale=lambda t: t[:7]), "7 scales do not divide 5,120 numbers"),
    "no scales of torchao": (OF_TORCHAO, parts(scale=lambda t: t[:0]), "0 scales do not divide"),
    "another block": (OF_TORCHAO, parts(block_size=128), "20 scales do not divide"),
    "torchao's of NaN": (OF_TORCHAO, parts(scale=with_first(NAN)), "exp_avg: .*not finite"),
    "torchao's short book": (OF_TORCHAO, parts(qmap=lambda t: t[:16]), "must hold 256 numbers"),
    "torchao without a book": (OF_TORCHAO, parts(qmap=None), "must hold 256 numbers"),
    "codes that are none": (OF_TORCHAO, parts(codes=3), "codes must be a whole tensor"),
    "codes of another shape": (
        OF_TORCHAO,
        parts(codes=lambda t: t[:32]),
        "has shape .64, 80., and",
    ),
    "a key too many": (
        OF_TORCHAO,
        entry(lamb=1),
        "state is step, exp_avg, exp_avg_sq, lamb; AdamW",
    ),
    "a shape too large": (FOUR_BITS, parts(_shape=(1 << 30, 1 << 30)), "has shape .64, 80., and"),
    "half the codes": (FOUR_BITS, parts(codes=lambda t: t[:1280]), "and 2,560 codes of shape"),
    "a book of 256": (FOUR_BITS, parts(qmap=torch.ones(256)), "must hold 16 numbers"),
    "float8 of NaN": (FLOAT8, parts(scale=with_first(NAN)), "not finite"),
    "two betas missing": (OF_OPTIMI, group(beta1=None), "beta1 must be one number"),
    "a beta of 5": (OF_OPTIMI, group(beta2=5.0), "a mean of squares is negative"),
    "counts of text": (OF_OPTIMI, group(step="3"), "step must be one number"),
    "no rate to compare": (OF_OPTIMI, group(decouple_lr=True, max_lr=0.0), "max_lr must be more"),
    "moments of integers": (
        OF_OPTIMI,
        entry(exp_avg=torch.ones(3).int()),
        "tensor of real numbers",
    ),
}


@pytest.mark.parametrize(("case", "change", "words"), REFUSED.values(), ids=[*REFUSED])
def test_what_does_not_belong_together_is_refused(path, case, change, words):
    saved = saved_by(case)
    change(saved)
    source = path.with_name("optimizer.pt")
    torch.save(saved, source)
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(source, path, [*SHAPES])
    assert str(caught.value).startswith(f"{source} ")
    assert not path.exists()


@pytest.mark.parametrize(
    ("module", "kind", "words"),
    [
        ("bitsandbytes.optim", "LAMB8bit", "unorm_vec"),
        ("bitsandbytes.optim", "Lion8bit", "state is step, state1"),
        ("bitsandbytes.optim", "AdEMAMix8bit", "AdEMAMix"),
        ("optimi", "StableAdamW", "eps_sq"),
        ("optimi", "Lion", "state is exp_avg, kahan_comp"),
    ],
)
def test_other_rules_are_refused(path, module, kind, words):
    params = fresh()
    options = {"lr": 0.01, **({"triton": False} if module == "optimi" else {})}
    theirs = getattr(imported(module), kind)([*params.values()], **options)
    take_steps(theirs, params, range(1))
    with pytest.raises(CheckpointError, match=words):
        from_torch(theirs.state_dict(), path, [*params])
    assert not path.exists()


@pytest.mark.parametrize(
    "name",
    ["Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD"],
)
def test_files_of_older_versions_of_torch_go_on(path, name):
    """Its rules had fewer flags: `foreach` came with 1.12, for one."""
    later = {"foreach", "maximize", "capturable", "differentiable", "fused"}
    later |= {"decoupled_weight_decay"}
    params = fresh()
    theirs = getattr(torch.optim, name)([*params.values()])
    take_steps(theirs, params, range(2))
    saved = theirs.state_dict()
    saved["param_groups"] = [
        {key: value for key, value in group.items() if key not in later}
        for group in saved["param_groups"]
    ]
    from_torch(saved, path, [*params])
    again = {key: nn.Parameter(param.detach().clone()) for key, param in params.items()}
    ours = getattr(stepwell, name)(again.items())
    load(path, optimizer=ours)
    assert ours.param_groups[0]["foreach"] is None
    for each, given in ((theirs, params), (ours, again)):
        take_steps(each, given, range(2, 4))
    for key, param in params.items():
        assert_within(again[key].detach(), param.detach(), 4, key)


def test_moments_must_fit_the_model_beside_them(path):
    params, theirs = trained(EIGHT_BITS)
    model = {name: param.detach() for name, param in params.items()}
    whole = {"model": model, "optimizer": theirs.state_dict()}
    assert from_torch(whole, path, [*params]).endswith(f"; {BITSANDBYTES}")
    whole["model"] = {**model, "wide": model["wide"].t()}
    with pytest.raises(CheckpointError, match=r"wide: parameter and moments have shapes"):
        from_torch(whole, path, [*params])


def test_tensors_of_torchao_elsewhere_are_refused(path):
    params, theirs = trained(OF_TORCHAO)
    source = path.with_name("run.pt")
    for content in (
        {"model": theirs.state_dict()["state"][0]},
        {"optimizer": theirs.state_dict(), "note": theirs.state_dict()["state"][0]["exp_avg"]},
    ):
        torch.save(content, source)
        with pytest.raises(CheckpointError, match="cannot be converted"):
            convert(source, path, [*params])
        assert not path.exists()
