"""Does a race train alike, measure what it says, notice a bad resume, and draw the right data?"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import isnan
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from stepwell.__main__ import main
from stepwell.extra import ExtraMissingError, needs_extra
from stepwell.race import Task, command, machine, picture, progress, runner, table, task
from stepwell.race.contenders import OURS, RIVAL, Contender, Rule, Schedule, rules
from stepwell.race.digits import digits
from stepwell.race.runner import Duel, Plan, Result, Run

PLAN = Plan(epochs=4, batch_size=8, accumulate=2, seed=3)

# a task with all that a resume could forget: dropout draws numbers, batch norm has buffers
TASK_MODULE = """
import torch
from torch import nn
from stepwell.race import Task

def net():
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2)
    )

def blobs():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(96, 4, generator=draw)
    y = (x[:, 0] + x[:, 1] > 0).long()
    return Task("blobs", net, (x[:64], y[:64]), (x[64:], y[64:]), nn.functional.cross_entropy)

def wrong():
    return {"name": "blobs"}

def needs_an_argument(n):
    return blobs()
"""

# a library whose SGD forgets its state on load
FORGETFUL_LIBRARY = """
import torch.optim

class SGD(torch.optim.SGD):
    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "state": {}})
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder on the import path with a task and a library of the user's own."""
    (tmp_path / "blob_task.py").write_text(TASK_MODULE)
    (tmp_path / "blob_needs.py").write_text("import a_package_nobody_has\n")
    library = tmp_path / "forgetful"
    library.mkdir()
    (library / "__init__.py").write_text(FORGETFUL_LIBRARY)
    (library / "lr_scheduler.py").write_text("from torch.optim.lr_scheduler import StepLR\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("blob_task", "blob_needs", "forgetful", "forgetful.lr_scheduler"):
        sys.modules.pop(name, None)


@pytest.fixture
def blobs(here) -> Task:
    return task.load("blob_task:blobs")


@pytest.fixture(autouse=True)
def same_number_of_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def sgd() -> Rule:
    # falls once, after the checkpoint: a schedule that starts anew falls at another time
    fall = Schedule("StepLR", {"step_size": 3, "gamma": 0.5})
    return Rule("SGD", "SGD", lr=0.1, options={"momentum": 0.9}, schedule=fall)


def silent(contender: Contender, done: int, loss: float) -> None:
    pass


def result(library: str, **changes) -> Result:
    values = {
        "contender": Contender(Rule("AdamW", "AdamW", 1e-3), library),
        "losses": (1.0, 0.125),
        "test_loss": 0.25,
        "test_accuracy": 0.9875,
        "first_seconds": 1e-3,
        "step_seconds": 120e-6,
        "state_bytes": 206_960,
    }
    return Result(**{**values, **changes})


def duel(**changes) -> Duel:
    ours = result(OURS, step_seconds=10e-6, **changes)
    return Duel(ours.contender.rule, result(RIVAL), ours, distance=1.5e-7)


def printed(*parts) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(*parts, sep="\n")
    return capture.get()


class TestCommand:
    def test_races_a_task_of_the_users_own(self, here, capsys):
        out = here / "deep" / "out"
        arguments = ["--task", "blob_task:blobs", "--epochs", "4", "--batch-size", "8"]
        assert main(["race", *arguments, "--seed", "3", "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert f"Picture: {out / 'race.png'}" in said
        assert "blobs, 64 rows to train on and 32 to test" in said
        assert "all 4 runs end in the same bits as without a stop" in said
        assert "AdamW · stepwell: epoch 4/4, loss" in said
        assert "AdamW · stepwell: done" in said
        header = (out / "race.png").read_bytes()[:24]
        assert header.startswith(b"\x89PNG\r\n")
        assert int.from_bytes(header[16:20], "big") > 1000

    @pytest.mark.tiny
    def test_says_so_and_fails_if_a_resumed_run_differs(self, here, capsys, monkeypatch):
        for module in (runner, command):
            monkeypatch.setattr(module, "OURS", "forgetful")
        monkeypatch.setattr(command, "rules", lambda epochs: [sgd()])
        arguments = ["--task", "blob_task:blobs", "--epochs", "4", "--batch-size", "8"]
        assert main(["race", *arguments, "--out", str(here)]) == 1
        said = " ".join(capsys.readouterr().out.split())
        assert "SGD · forgetful: resumed from half way, 0.weight differs" in said
        assert "torch.optim: resumed" not in said
        assert "same bits" not in said

    @pytest.mark.tiny
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--task", "blob_task"], "MODULE:FUNCTION, with the module as Python imports it"),
            (["--task", ":blobs"], "got ':blobs'"),
            (["--task", "tasks/blob_task.py:blobs"], "got 'tasks/blob_task.py:blobs'"),
            (["--task", "nowhere:blobs"], "no module named 'nowhere': run the command in the"),
            (["--task", "blob_task:blob"], "has no function 'blob', did you mean blobs?"),
            (["--task", "blob_task:zzz"], "module blob_task has no function 'zzz'"),
            (["--task", "blob_task:wrong"], "must return a stepwell.race.Task, got builtins.dict"),
            (["--task", "blob_task:needs_an_argument"], "callable without arguments"),
            (["--task", "blob_task:blobs", "--batch-size", "64"], "64 x 2 = 128 rows"),
            (["--task", "blob_task:blobs", "--out", "blob_task.py"], "name another with --out"),
        ],
    )
    def test_says_what_to_do_about_a_mistake(self, here, capsys, monkeypatch, arguments, words):
        monkeypatch.chdir(here)
        assert main(["race", "--epochs", "1", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("python -m stepwell race: error: ")
        assert words in said

    @pytest.mark.tiny
    @pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--accumulate", "--threads"])
    @pytest.mark.parametrize("value", ["0", "-1", "many"])
    def test_refuses_numbers_that_are_not_positive(self, capsys, option, value):
        with pytest.raises(SystemExit) as left:
            main(["race", option, value])
        assert left.value.code == 2
        assert option in capsys.readouterr().err

    @pytest.mark.tiny
    def test_a_module_that_a_task_lacks_is_shown_in_full(self, here):
        with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
            task.load("blob_needs:blobs")

    @pytest.mark.tiny
    def test_alone_prints_the_help(self, capsys):
        assert main([]) == 0
        assert "race" in capsys.readouterr().out

    def test_is_not_imported_with_the_package(self):
        script = (
            "import sys, stepwell; "
            "late = ('matplotlib', 'sklearn', 'stepwell.race', 'stepwell.__main__'); "
            "sys.exit(', '.join(m for m in sys.modules if m.startswith(late)) or 0)"
        )
        root = Path(machine.__file__).parents[2]
        subprocess.run([sys.executable, "-c", script], check=True, cwd=root)


@pytest.mark.tiny
class TestTraining:
    def test_is_the_same_for_the_same_library(self, blobs, monkeypatch):
        monkeypatch.setattr(runner, "OURS", RIVAL)
        raced = runner.race(blobs, sgd(), PLAN, silent)
        assert raced.distance == 0
        assert raced.rival.losses == raced.ours.losses
        assert raced.rival.losses[-1] < raced.rival.losses[0]

    def test_reports_every_epoch_of_every_run(self, blobs):
        reports = []
        runner.race(blobs, sgd(), PLAN, lambda who, done, loss: reports.append((who.library, done)))
        for library in (RIVAL, OURS):
            assert [done for who, done in reports if who == library] == [1, 2, 3, 4, 5, 6]

    def test_libraries_take_turns_in_alternating_order(self, blobs):
        order = []
        runner.race(blobs, sgd(), PLAN, lambda who, done, loss: order.append(who.library))
        assert order[:8] == [RIVAL, OURS, OURS, RIVAL] * 2

    def test_depends_on_the_seed_alone(self, blobs):
        contender = Contender(sgd(), RIVAL)
        torch.manual_seed(1)
        first = Run(blobs, contender, PLAN).train_epoch()
        torch.manual_seed(2)
        assert Run(blobs, contender, PLAN).train_epoch() == first
        assert Run(blobs, contender, Plan(4, 8, 2, seed=4)).train_epoch() != first

    def test_leaves_the_callers_random_numbers_alone(self, blobs):
        before = torch.get_rng_state()
        Run(blobs, Contender(sgd(), RIVAL), PLAN).train_epoch()
        assert torch.equal(torch.get_rng_state(), before)

    def test_accumulated_gradients_are_those_of_the_whole_batch(self, blobs):
        plain = Task(
            "plain", lambda: nn.Linear(4, 2), blobs.train, blobs.test, nn.functional.cross_entropy
        )
        runs = [
            Run(plain, Contender(sgd(), RIVAL), Plan(1, size, count))
            for size, count in ((4, 8), (32, 1))
        ]
        losses = [run.train_epoch() for run in runs]
        assert [len(run.step_seconds) for run in runs] == [2, 2]
        # a mean of eight means against one mean: the rounding of float32
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert max(runner.differences(*(run.model for run in runs)).values()) < 1e-6

    def test_rows_that_do_not_fill_a_step_are_left_out(self, blobs):
        run = Run(blobs, Contender(sgd(), RIVAL), Plan(1, batch_size=10, accumulate=2))
        run.train_epoch()
        assert len(run.step_seconds) == 3

    def test_the_first_two_steps_are_not_in_the_median(self, blobs):
        raced = runner.race(blobs, sgd(), Plan(1, 32, 2), silent)  # one step in all
        assert raced.further_steps == runner.FIRST_STEPS + runner.ENOUGH_STEPS - 1
        assert len(raced.rival.losses) == len(raced.ours.losses) == 1
        assert all(result.step_seconds > 0 for result in raced.results)

    def test_a_race_of_enough_steps_takes_no_further_ones(self, blobs):
        assert runner.race(blobs, sgd(), Plan(22, 32, 2), silent).further_steps == 0

    def test_result_holds_what_was_measured(self, blobs):
        run = Run(blobs, Contender(sgd(), RIVAL), PLAN)
        run.train_epoch()
        run.step_seconds = [90.0, 80.0, 3.0, 1.0, 2.0]
        reached = run.result({})
        parameters = sum(p.nbytes for p in run.model.parameters())
        assert reached.state_bytes == parameters
        assert reached.first_seconds == 170.0
        assert reached.step_seconds == 2.0
        assert reached.losses == tuple(run.losses)
        assert 0 <= reached.test_accuracy <= 1
        run.model.eval()
        output = run.model(blobs.test[0])
        assert reached.test_loss == blobs.loss(output, blobs.test[1]).item()


@pytest.mark.tiny
class TestResume:
    @pytest.fixture
    def finished(self, blobs, tmp_path) -> tuple[Run, Path]:
        run = Run(blobs, Contender(sgd(), RIVAL), PLAN)
        run.train_epoch()
        run.train_epoch()
        run.save(tmp_path / "half.pt")
        run.train_epoch()
        run.train_epoch()
        return run, tmp_path / "half.pt"

    def test_from_a_whole_checkpoint_is_exact(self, finished):
        assert runner.unequal_after_resume(*finished, silent) == {}

    @pytest.mark.parametrize("part", ["model", "optimizer", "scheduler"])
    def test_from_a_checkpoint_that_lacks_a_part_is_noticed(self, blobs, finished, part):
        run, path = finished
        saved = torch.load(path, weights_only=True)
        saved[part] = getattr(Run(blobs, run.contender, PLAN), part).state_dict()
        torch.save(saved, path)
        unequal = runner.unequal_after_resume(run, path, silent)
        assert unequal["0.weight"] > 0

    def test_one_bit_is_enough(self, finished, monkeypatch):
        run, path = finished
        weight = run.model[0].weight.data
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        assert runner.unequal_after_resume(run, path, silent).keys() == {"0.weight"}

    def test_tells_zeros_apart_and_nans_alike(self):
        same = runner._same_bits
        assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
        assert same(torch.tensor(float("nan")), torch.tensor(float("nan")))
        assert not same(torch.tensor(1), torch.tensor(2))


@pytest.mark.tiny
class TestNumbersShown:
    def test_rows_of_the_table(self):
        raced = duel()
        assert raced.speedup == pytest.approx(12.0)
        cells = ["stepwell", "98.75%", "0.2500", "0.1250", "10.0", "12.0×", "206,960"]
        assert table.row(raced.ours, raced.speedup) == cells

    def test_table_fits_into_80_columns(self, blobs):
        lines = printed(table.table(blobs, [duel(), duel()])).splitlines()
        assert max(map(len, lines)) <= 80
        assert "…" not in "".join(lines)
        assert sum("torch.optim" in line for line in lines) == 2

    def test_verdict_on_equal_accuracy(self):
        said = printed(*table.verdict([duel()]))
        assert "run the same arithmetic, so they reach the same accuracy" in said
        assert "AdamW: the trained parameters are at most 1.5e-07 apart." in said
        assert "all 2 runs end in the same bits" in said

    def test_verdict_on_unequal_accuracy(self):
        said = printed(*table.verdict([duel(), duel(test_accuracy=0.98)]))
        assert "accuracies are up to 0.75 points apart" in " ".join(said.split())
        assert "same accuracy" not in said

    def test_verdict_on_a_bad_resume(self):
        raced = duel(unequal_after_resume={"head.bias": 0.5})
        assert table.failures([duel(), raced]) == [raced.ours]
        said = " ".join(printed(*table.verdict([duel(), raced])).split())
        assert "AdamW · stepwell: resumed from half way, head.bias differs" in said
        assert "by up to 0.5" in said

    def test_machine_names_versions_and_threads(self):
        torch.set_num_threads(1)
        described = machine.describe()
        assert "1 torch thread," in described
        assert f"torch {torch.__version__}" in described

    def test_the_first_step_stands_apart(self):
        said = " ".join(printed(*table.verdict([duel(first_seconds=0.14)])).split())
        assert "first two steps took 1.0 ms with torch.optim and 140.0 ms with stepwell" in said
        assert "too few steps" not in said
        said = " ".join(printed(*table.verdict([replace(duel(), further_steps=20)])).split())
        assert "too few steps to measure the others: 20 further ones were taken" in said

    def test_a_score_that_does_not_exist_is_not_shown(self):
        cells = table.row(result(OURS, test_accuracy=float("nan")), 1.0)
        assert cells[1] == "-"
        ours = result(OURS, test_accuracy=float("nan"), test_loss=0.5)
        said = printed(*table.verdict([Duel(ours.contender.rule, result(RIVAL), ours, 0.0)]))
        assert "test losses are at most 0.25 apart" in said


@pytest.mark.tiny
class TestProgress:
    def test_says_which_epoch_is_trained_again(self):
        said = [progress._doing(PLAN, done, 0.5) for done in range(1, PLAN.total + 1)]
        assert said == [
            *(f"epoch {n}/4, loss 0.5000" for n in (1, 2, 3, 4)),
            "resume test, epoch 3/4, loss 0.5000",
            "done",
        ]


@pytest.mark.tiny
class TestPicture:
    def test_shows_the_losses_and_times_of_every_contender(self):
        shown = picture.series([duel(), duel()])
        assert [one.library for one in shown] == [RIVAL, OURS, RIVAL, OURS]
        assert [one.ours for one in shown] == [False, True, False, True]
        assert [one.microseconds for one in shown] == pytest.approx([120, 10, 120, 10])
        assert all(list(one.epochs) == [1, 2] for one in shown)
        assert all(one.losses == (1.0, 0.125) for one in shown)
        assert len({one.color for one in shown}) == 4

    def test_labels_say_how_many_times_as_fast(self):
        shown = picture.series([duel()])
        labels = [picture._time_label(shown, index) for index in range(2)]
        assert labels == ["120.0 µs", "10.0 µs, 12.0× as fast"]


class TestDefaultTask:
    def test_is_all_real_digits_split_once(self):
        made = digits()
        assert made.train[0].shape == (1437, 1, 8, 8)
        assert made.test[0].shape == (360, 1, 8, 8)
        assert made.train[0].min() == 0
        assert made.train[0].max() == 1
        assert set(made.train[1].tolist()) == set(made.test[1].tolist()) == set(range(10))
        assert all(torch.equal(a, b) for a, b in zip(made.train, digits().train, strict=True))

    def test_head_learns_ten_times_faster(self):
        made = digits()
        model = made.model()
        backbone, head = made.groups(model, 0.01)
        assert head["lr"] == pytest.approx(10 * backbone["lr"])
        assert len(backbone["params"] + head["params"]) == len(list(model.parameters()))

    def test_rules_are_adamw_and_sgd_with_a_falling_rate(self):
        adamw, momentum = rules(24)
        assert adamw.name == "AdamW"
        assert momentum.options["momentum"] > 0
        assert momentum.schedule == Schedule("StepLR", {"step_size": 8, "gamma": 0.3})

    @pytest.mark.parametrize("library", [RIVAL, OURS])
    def test_every_library_has_the_rules(self, library):
        made = digits()
        for rule in rules(6):
            contender = Contender(rule, library)
            optimizer = contender.optimizer(made, made.model())
            scheduler = contender.scheduler(optimizer)
            assert type(optimizer).__name__ == rule.name
            assert optimizer.param_groups[0]["lr"] == made.rates[rule.name]
            assert (scheduler is None) == (rule.schedule is None)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_both_libraries_read_digits_alike(index):
    plan = Plan(epochs=8)
    raced = runner.race(digits(), rules(plan.epochs)[index], plan, silent)
    for reached in raced.results:
        assert reached.test_accuracy >= 0.93
        assert not reached.unequal_after_resume
    # float32 rounds at 6e-8; 176 steps of training let that grow, a wrong formula is far above
    assert raced.distance < 1e-4


@pytest.mark.tiny
class TestTask:
    def test_refuses_data_of_unequal_length(self):
        data = torch.zeros(3, 2), torch.zeros(2)
        with pytest.raises(task.TaskError, match=r"Task odd: train .* got 3 inputs and 2 targets"):
            Task("odd", lambda: nn.Linear(2, 1), data, data, nn.functional.mse_loss)

    def test_defaults_are_one_group_and_the_share_correct(self, blobs):
        model = blobs.model()
        (group,) = blobs.groups(model, 0.5)
        assert group["lr"] == 0.5
        assert len(group["params"]) == len(list(model.parameters()))
        output = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
        for values in (torch.ones(4, 1), torch.ones(4)):
            assert isnan(blobs.accuracy(output, values))
        assert blobs.accuracy(output, torch.tensor([0, 1, 0, 1])) == 0.5


@pytest.mark.tiny
def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ExtraMissingError, match=r"pip install 'stepwell\[race\]'"):
        digits()
    with pytest.raises(ExtraMissingError, match="nothing_like_it is not installed"):  # noqa: SIM117
        with needs_extra("race"):
            import nothing_like_it  # noqa: F401
