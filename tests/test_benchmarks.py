"""Do the benchmarks count bytes rightly, refuse wrong numbers, and measure all rows of a GPU?

The GPU is played by CPU tensors and Triton's interpreter: its times mean nothing, and none is
looked at.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import stepwell
from benchmarks import checkpoints, gpu
from benchmarks import tune as tuning
from benchmarks.__main__ import main
from benchmarks.cases import RULES, Case, rivals_of
from benchmarks.counting import counted
from benchmarks.cpu_cases import CASES, OTHER_RULES
from benchmarks.devices import Copy, Host
from benchmarks.gpu_cases import FULL, TINY, gpu_cases, resized
from benchmarks.measure import YARDSTICK, Check, Result, measure
from benchmarks.readme import updated
from benchmarks.traffic import traffic
from stepwell.backends import triton
from stepwell.native import triton_jit

ROOT = Path(__file__).parents[1]


# Bytes


@pytest.mark.parametrize(
    ("rule", "dtype", "settings", "moved", "held"),
    [
        # read param, grad and two moments, write param and two moments: 7 x 4
        ("AdamW", torch.float32, {}, 28, 16),
        ("AdamW", torch.bfloat16, {}, 14, 8),
        ("AdamW", torch.float32, {"amsgrad": True}, 36, 20),
        ("Adam", torch.float64, {}, 56, 32),
        ("SGD", torch.float32, {"momentum": 0.9}, 20, 12),
        # read param and grad, write param
        ("SGD", torch.float32, {}, 12, 8),
        ("Adagrad", torch.float32, {}, 20, 12),
        ("RMSprop", torch.float32, {}, 20, 12),
        ("RMSprop", torch.float32, {"momentum": 0.9, "centered": True}, 36, 20),
        ("Adadelta", torch.float32, {}, 28, 16),
        ("Adamax", torch.float32, {}, 28, 16),
        ("NAdam", torch.float32, {}, 28, 16),
        ("RAdam", torch.float32, {}, 28, 16),
        ("ASGD", torch.float32, {}, 20, 12),
        ("Rprop", torch.float32, {}, 28, 16),
    ],
)
def test_bytes_per_element(
    rule: str, dtype: torch.dtype, settings: dict[str, Any], moved: int, held: int
) -> None:
    assert traffic(rule, dtype, settings) == (moved, held)


def test_a_rate_counts_all_elements() -> None:
    case = Case("", "AdamW", (600, 400))
    assert case.gigabytes_per_second(microseconds=2.0) == pytest.approx(14.0)


# Rows


def test_the_model_has_a_billion_elements_in_uneven_tensors() -> None:
    assert len(FULL.model) == 300
    assert sum(FULL.model) == 1_000_000_000
    assert len({size % 16 for size in FULL.model}) > 4
    assert min(FULL.model) == 1


def test_the_rows_of_a_gpu_cover_all_rules() -> None:
    cases = gpu_cases("cuda", FULL)
    assert {case.rule for case in cases} == {"AdamW", *RULES}
    bound = [case for case in cases if case.is_limited_by_memory]
    assert all(case.share_of_copy == 0.85 and case.clock == "device" for case in bound)
    assert cases[0].limit == 7000
    assert all(set(case.bars) <= set(case.rivals) for case in cases)


def test_every_rule_per_element_has_its_rows() -> None:
    works = ("6 tensors, 5,000 elements", "1,000 x 1,000", "100 x 0.5 M")
    fused = {rule for rule in OTHER_RULES if "fused" in rivals_of(rule)}
    assert fused == {"Adagrad"}
    adamw = next(case for case in CASES if (case.rule, case.work) == ("AdamW", works[2]))
    for rule in ("RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop", "Adagrad"):
        few, many, pieces = (case for case in CASES if case.rule == rule)
        assert (few.work, many.work, pieces.work) == works
        expected: Any = (
            ({"fused": 3}, {"fused": 3}) if rule in fused else ({"best": 7}, {"best": 6})
        )
        assert (few.bars, many.bars) == expected
        assert few.limit == 15
        assert pieces.yardstick is not None
        assert pieces.yardstick.sizes == adamw.sizes == pieces.sizes
        assert (pieces.yardstick.rule, pieces.share_of_yardstick) == ("AdamW", 0.9)
        assert {"foreach", "default"} <= set(pieces.rivals)


def test_the_tables_have_every_rule_per_element() -> None:
    rules: dict[str, Any] = {name: getattr(stepwell, name, None) for name in torch.optim.__all__}
    formulas = {
        name: rule.formula
        for name, rule in rules.items()
        if isinstance(rule, type)
        and issubclass(rule, stepwell.Optimizer)
        # Muon and the like have an update of their own, SparseAdam works on rows
        and rule._make_plan is stepwell.Optimizer._make_plan
        and not rule.sparse_only
        and rule.formula is not None
    }
    per_element = {
        name
        for name, formula in formulas.items()
        if all(slot.scalar or slot.is_whole for slot in formula.slots.values())
    }
    assert per_element == {"AdamW", *RULES}


def test_matrices_keep_their_shapes() -> None:
    (muon,) = (case for case in CASES if case.rule == "Muon")
    shapes = Counter(param.shape for param in muon.params())
    assert shapes == {(256, 256): 48, (1024, 256): 12}
    assert all(
        param.grad is not None and param.grad.shape == param.shape for param in muon.params()
    )


def test_a_smaller_row_has_a_smaller_limit() -> None:
    half = resized(gpu_cases("cuda", FULL)[0], 0.5)
    assert sum(half.sizes) == pytest.approx(5e8)
    assert half.limit == pytest.approx(3500)
    assert half.work == f"300 tensors, {sum(half.sizes):,} elements"


# Bars


def test_checks_say_by_how_much_a_bar_is_missed() -> None:
    case = Case("", "AdamW", (10**6,), bars={"fused": 2.0}, limit=25.0, share_of_copy=0.85)
    # 28 MB in 20 us are 1400 GB/s
    result = Result(case, {"stepwell": [20.0], "fused": [30.0]}, {}, copy=2000.0)
    ratio, share, limit = result.checks()
    assert (ratio.value, ratio.missed_by) == (1.5, 0.25)
    assert share.value == pytest.approx(70)
    assert share.missed_by == pytest.approx(1 - 70 / 85)
    assert limit.missed_by == 0
    assert result.misses() == ["1.50x fused, not 2x", "70.00 % of a copy, not 85"]


def test_the_best_rival_counts() -> None:
    case = Case("", "Adagrad", (5,), rivals=("fused", "foreach", "default"), bars={"best": 3.0})
    result = Result(case, {"stepwell": [10.0], "fused": [25.0], "foreach": [40.0]}, {})
    assert result.ratio("best") == 2.5
    assert result.misses() == ["2.50x best, not 3x"]


def test_a_yardstick_counts_its_own_bytes_and_is_no_rival() -> None:
    adamw = Case("", "AdamW", (10**6,))
    case = Case("", "RMSprop", (10**6,), bars={"best": 2.0}, rivals=("foreach",))
    case = replace(case, yardstick=adamw, share_of_yardstick=0.9)
    # 1 byte per nanosecond beside 28 / 16.8
    times = {"stepwell": [20.0], "foreach": [60.0], YARDSTICK: [16.8]}
    ratio, share = Result(case, times, {}).checks()
    assert ratio.value == 3.0
    assert share.value == pytest.approx(60)
    assert share.words == "60.00 % of AdamW, not 90"


def test_a_yardstick_takes_turns() -> None:
    adamw = Case("", "AdamW", (5, 3))
    case = Case("", "RMSprop", (5, 3), rivals=("foreach",), yardstick=adamw, rounds=1)
    result = measure(case, seconds=0)
    assert list(result.times) == ["stepwell", "foreach", YARDSTICK]
    assert len({len(times) for times in result.times.values()}) == 1


@pytest.mark.parametrize("value", [2.0, 1.5])
def test_a_limit_of_zero_can_be_missed(value: float) -> None:
    assert Check(value, 0, " compilations", at_most=True).missed_by == value
    assert not Check(0, 0, " compilations", at_most=True).missed_by


@pytest.mark.parametrize("written", [float("nan"), 0.0])
def test_wrong_numbers_have_no_speed(monkeypatch: pytest.MonkeyPatch, written: float) -> None:
    class Wrong(torch.optim.SGD):
        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for param in self.param_groups[0]["params"]:
                param.fill_(written)

    monkeypatch.setattr(stepwell, "SGD", Wrong)
    result = measure(Case("", "SGD", (5, 3)), seconds=0)
    assert not result.medians
    assert result.misses()[0].startswith("wrong numbers: ")


def test_a_rival_that_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if self.param_groups[0]["fused"]:
                raise RuntimeError("not on this device")
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Refusing)
    result = measure(Case("", "SGD", (5,), rivals=("fused", "foreach")), seconds=0)
    assert result.wrong == {"fused": "not on this device"}
    assert list(result.medians) == ["stepwell", "foreach"]


# What is counted


def test_launches_and_uploads_are_counted_per_step() -> None:
    upload = {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "args": {"bytes": 80}}
    events = [
        {"cat": "kernel", "name": "sweep_0"},
        {"cat": "kernel", "name": "sweep_0"},
        {"cat": "kernel", "name": "void at::add<float, 4>(int, float)"},
        {"cat": "cpu_op", "name": "aten::add"},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "args": {"bytes": 7}},
        {"ph": "M", "name": "process_name"},
        upload,
        upload,
    ]
    assert counted(events, steps=2) == {
        "launches": 1.5,
        "uploads": 1,
        "upload_bytes": 80,
        "kernels": {"sweep_0": 1, "void at::add": 0.5},
    }


def test_tuning_tries_each_choice_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CHOICES", {"CHUNK": (64,), "BLOCK": (32, 64), "num_warps": (8,)})
    before = triton.BLOCK, triton.CHUNK, dict(triton_jit.OPTIONS)
    machine = Host()
    rows = tuning.tune(Case("", "SGD", (5, 3)), machine, Copy(machine, 1 << 16))
    assert {row["BLOCK"] for row in rows} == {32, 64}
    assert rows[0]["microseconds"] <= rows[1]["microseconds"]
    after = triton.BLOCK, triton.CHUNK, triton_jit.OPTIONS
    assert after == before


def _row(rule: str, work: str, share: float | None = None, **times: float) -> dict[str, Any]:
    row = {"rule": rule, "dtype": "float32", "work": work, "microseconds": times, "wrong": {}}
    return row | {"share_of_yardstick": share}


def test_the_readme_has_a_long_and_a_compact_table() -> None:
    rows = [
        _row("AdamW", "few", stepwell=8.0, fused=48.0, default=160.0),
        _row("RMSprop", "few", stepwell=8.0, foreach=96.0, default=100.0),
        _row("RMSprop", "pieces", 0.98, stepwell=2000.0, default=5000.0),
    ]
    text = "a\n\n| rule, dtype | old |\n|---|\n| x |\n\nb\n\n| rule | old |\n|---|\n\nc\n"
    new = updated(text, rows)
    assert "| AdamW, float32 | few | 8.0 | 48.0 | 160 | 6.0x | 20.0x |\n" in new
    assert "| rule | few | pieces | bandwidth |\n|---|---:|---:|---:|\n" in new
    assert "| RMSprop | 8.0 (12.0x) | 2,000 (2.5x) | 98 % |\n" in new
    assert "old" not in new
    assert updated(new, rows) == new


def test_a_readme_without_its_tables_is_not_written() -> None:
    with pytest.raises(SystemExit, match="is missing"):
        updated("no table\n", [])


# The whole way

QUIET = Console(file=io.StringIO())


def _options(path: Path, only: str) -> Namespace:
    return Namespace(json=path, only=only, seconds=0.0, scale=1.0, tune=False)


def test_rows_shrink_to_the_memory_there_is(tmp_path: Path) -> None:
    class Small(Host):
        def free_memory(self) -> int:
            return 40_000

    gpu.run(Small(), TINY, _options(tmp_path / "gpu.json", "RMSprop"), QUIET)
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["speeds"]
    # two contenders of 12 bytes per element, and what foreach computes in between
    assert row["elements"] * (2 * 12 + 3 * 4) == pytest.approx(0.6 * 40_000, rel=0.01)
    assert row["scale"] == pytest.approx(row["elements"] / sum(TINY.model), rel=0.01)
    assert f"{row['elements']:,} elements" in row["what"]


def test_an_interruption_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(case: Case, *rest: Any) -> Result:
        if case.sizes == TINY.small:
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(gpu, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(Host(), TINY, _options(tmp_path / "gpu.json", "host time"), QUIET)
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["speeds"]
    assert row["work"] == "4 x 5"


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "no CUDA GPU found" in capsys.readouterr().err


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run on a GPU writes."""
    path = tmp_path_factory.mktemp("results") / "new" / "gpu.json"
    command = [sys.executable, "-m", "benchmarks", "--device", "interpret", "--seconds", "0"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, "--json", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert path.is_file(), done.stderr
    # no interpreter is as fast as a GPU must be
    assert done.returncode == 1, done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    return found | {"printed": done.stdout}


@pytest.mark.slow
def test_the_report_names_the_machine(report: dict[str, Any]) -> None:
    assert {"date", "gpu", "memory_bytes", "driver", "torch", "triton", "python", "host"} <= report[
        "machine"
    ].keys()
    assert report["machine"]["torch"] == torch.__version__
    assert report["left_out"] == []


@pytest.mark.slow
def test_the_report_has_all_speeds(report: dict[str, Any]) -> None:
    expected = gpu_cases("cpu", TINY)
    found = [(row["rule"], row["dtype"], row["work"], row["clock"]) for row in report["speeds"]]
    names = [(c.rule, str(c.dtype).removeprefix("torch."), c.work, c.clock) for c in expected]
    assert sorted(found) == sorted(names)
    for row in report["speeds"]:
        assert row["error"] is None
        assert row["wrong"] == {}
        assert row["scale"] == 1
        assert row["back-end"] == "triton"
        assert row["microseconds"].keys() == {"stepwell", *rivals_of(row["rule"])}
        assert row["ratios"].keys() == set(rivals_of(row["rule"]))
        for times in row["microseconds"].values():
            assert times["quartiles"][0] <= times["median"] <= times["quartiles"][1]
            assert times["samples"] >= 7
        assert all(check.keys() == {"bar", "value", "missed_by"} for check in row["checks"])


@pytest.mark.slow
def test_the_report_compares_with_a_copy(report: dict[str, Any]) -> None:
    assert report["copy"]["bytes"] == TINY.copy_bytes
    bound = [row for row in report["speeds"] if "share_of_copy" in row]
    moved = {(row["rule"], row["dtype"]): row["bytes_per_element"] for row in bound}
    assert moved["AdamW", "float32"] == 28
    assert moved["AdamW", "bfloat16"] == 14
    assert moved["SGD", "float32"] == 20
    for row in bound:
        share = row["GB/s"]["stepwell"] / row["copy GB/s"]
        assert row["share_of_copy"]["stepwell"] == pytest.approx(share)
        assert any("of a copy" in check["bar"] for check in row["checks"])


@pytest.mark.slow
def test_the_report_counts_and_times_first_steps(report: dict[str, Any]) -> None:
    flags = [row["what"] for row in report["counts"]]
    assert [w.split(",")[0] for w in flags] == [
        f"counts of AdamW({f})" for f in ("", "fused=True", "capturable=True")
    ]
    for row in report["counts"][:2]:
        assert row["back-end"] == "triton"
        assert {"launches", "uploads", "upload_bytes", "kernels"} <= row.keys()
    # what fails says so, and what comes after it is measured
    assert "capturable" in report["counts"][2]["error"]
    assert [row["cache"] for row in report["first_steps"]] == ["empty", "full"]
    for row in report["first_steps"]:
        assert row["compiled_later"] == 0
        assert row["seconds"] > 0


@pytest.mark.slow
def test_the_tables_show_each_row(report: dict[str, Any]) -> None:
    printed = report["printed"]
    for words in ("AdamW, bfloat16", "SGD, float32", "85 % of a copy", "1.5 s", "launches"):
        assert words in printed


def test_checkpoints_are_compared(monkeypatch):
    monkeypatch.setattr(checkpoints, "LAYERS", 2)
    monkeypatch.setattr(checkpoints, "WIDTH", 50)
    monkeypatch.setattr(checkpoints, "ROUNDS", 3)
    compared = checkpoints.compare()
    assert [one.what for one in compared] == [
        "save",
        "load from the disk",
        "load from the system's cache",
        "save in the background, until it returns",
    ]
    assert all(len(one.stepwell) == len(one.plain) == 3 for one in compared)
    slow = replace(compared[0], stepwell=[1.2, 2.4], plain=[1.0, 2.0], extra_megabytes=65.0)
    assert slow.misses() == ["1.20x > 1.15x", "too much memory"]
    assert checkpoints.saved(slow)["ratio"] == 1.2
    assert not replace(slow, plain=[1.1, 2.2], extra_megabytes=0.0).misses()
