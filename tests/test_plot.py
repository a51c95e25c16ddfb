"""Are the data behind each picture right, and do pictures need nothing but Matplotlib?"""

from __future__ import annotations

import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stepwell
from stepwell import plot
from stepwell.__main__ import main
from stepwell.extra import ExtraMissingError
from stepwell.lr_scheduler import (
    Schedule,
    StepLR,
    absolute,
    constant,
    cosine,
    curves,
    exponential,
    parse,
    step,
    warmup,
)
from stepwell.plot import documentation

from .shell_cases import refused

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n"


def lines(figure: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What is drawn, by the labels that a reader sees: x and y of each line that has one."""
    return {
        line.get_label(): line.get_data()
        for line in figure.axes[0].get_lines()
        if not line.get_label().startswith("_")
    }


def words(figure: Any) -> list[str]:
    """The names of axes, titles and legends."""
    axes = figure.axes[0]
    legends = [*figure.legends, *([axes.get_legend()] if axes.get_legend() else [])]
    return [
        *(axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")),
        *(text.get_text() for legend in legends for text in legend.get_texts()),
    ]


# Schedules


class TestSchedule:
    @pytest.mark.tiny
    def test_draws_the_value_of_every_step(self):
        figure = plot.schedule(warmup(20) >> cosine(180))
        ((label, (x, y)),) = lines(figure).items()
        assert label == "warmup(20) >> cosine(180)"
        assert x.tolist() == list(range(201))
        rise = [(t + 1) / 21 for t in range(20)]
        fall = [(1 + math.cos(math.pi * t / 180)) / 2 for t in range(181)]
        # both are computed in float64
        np.testing.assert_allclose(y, rise + fall, rtol=1e-12, atol=1e-15)
        assert words(figure) == ["step", "factor of the learning rate", label]

    def test_multiplies_by_the_rate(self):
        figure = plot.schedule(cosine(100), lr=3e-4)
        ((_, y),) = lines(figure).values()
        assert y[0] == 3e-4
        assert words(figure)[1] == "learning rate"

    def test_draws_many_curves_with_their_names(self):
        figure = plot.schedule([cosine(100), exponential(0.9)], 50)
        assert list(lines(figure)) == ["cosine(100)", "exponential(0.9)"]
        assert words(figure)[-2:] == ["cosine(100)", "exponential(0.9)"]
        np.testing.assert_allclose(lines(figure)["exponential(0.9)"][1], 0.9 ** np.arange(51))
        styles = {(a.get_color(), a.get_linestyle()) for a in figure.axes[0].get_lines()}
        assert len(styles) == 2
        alike = plot.schedule([cosine(100), cosine(100), cosine(100)])
        assert list(lines(alike)) == ["cosine(100)", "cosine(100) (2)", "cosine(100) (3)"]
        named = plot.schedule({"a": cosine(100), "b": cosine(100)})
        assert list(lines(named)) == ["a", "b"]

    def test_many_and_long_names_take_no_room_from_the_curves(self):
        long = " * ".join(["cosine(100, end=0.125)"] * 5)
        figure = plot.schedule([*(warmup(k) >> cosine(100) for k in range(1, 15)), parse(long)])
        figure.canvas.draw()
        (axes,), (legend,) = figure.axes, figure.legends
        height = axes.get_window_extent().height / figure.dpi
        # what it is beside three names
        assert height > 2.5
        assert legend.get_window_extent().width < figure.bbox.width

    def test_ends_with_the_longest_curve(self):
        figure = plot.schedule([cosine(30), cosine(70), constant(0.5)])
        assert figure.axes[0].get_xlim() == (0, 70)
        error = refused(lambda: plot.schedule(exponential(0.9)))
        assert str(error).startswith(
            "schedule: steps must be given, since nothing of what is drawn"
        )

    def test_ends_with_the_longest_curve_that_a_schedule_has_for_the_rate(self):
        params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=1.0, weight_decay=0.1)
        rates = [absolute(cosine(30)), cosine(20)]
        schedule = Schedule(optimizer, lr=rates, weight_decay=cosine(99), last_epoch=-1)
        optimizer.step()
        schedule.step()
        assert plot.schedule(schedule).axes[0].get_xlim() == (0, 29)
        for without in (Schedule(optimizer, weight_decay=cosine(9)), StepLR(optimizer, 3)):
            assert "steps must be given" in str(refused(lambda shown=without: plot.schedule(shown)))

    def test_a_long_schedule_is_drawn_in_few_points(self):
        figure = plot.schedule(cosine(10_000_000))
        ((x, y),) = lines(figure).values()
        assert len(x) <= 4000
        assert (x[0], x[-1], y[0], y[-1]) == (0, 10_000_000, 1, 0)

    def test_few_steps_are_stairs(self):
        (line,) = plot.schedule(step(10), 30).axes[0].get_lines()
        assert line.get_drawstyle() == "steps-post"

    def test_draws_the_steps_ahead_of_a_scheduler_and_leaves_it_where_it_is(self):
        weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
        rates = {"a": 0.4, "b": 0.1, "c": 0.4}
        groups = [
            {"params": [w], "name": n, "lr": rates[n]} for w, n in zip(weights, rates, strict=True)
        ]
        optimizer = stepwell.SGD(groups)
        scheduler = stepwell.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        before = scheduler.state_dict()
        figure = plot.schedule(scheduler, 5)
        found = {label: y.tolist() for label, (_, y) in lines(figure).items()}
        halved = [1, 1, 0.5, 0.5, 0.25]
        assert found == {
            "StepLR, a, c": [0.4 * factor for factor in halved],
            "StepLR, b": [0.1 * factor for factor in halved],
        }
        assert words(figure)[1] == "learning rate"
        assert scheduler.state_dict() == before
        twin = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(groups), 2, 0.5)
        error = refused(lambda: plot.schedule(twin, 5))
        assert str(error) == (
            "schedule: StepLR of torch has no preview: stepwell.lr_scheduler.StepLR takes the same "
            "arguments"
        )

    def test_draws_all_steps_of_a_scheduler_that_ends_and_none_beyond(self):
        optimizer = stepwell.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        scheduler = stepwell.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=50)
        ((x, y),) = lines(plot.schedule(scheduler, 50)).values()
        assert x.tolist() == list(range(50))
        assert (y[0], y.max()) == (0.02, 0.5)

    def test_draws_on_axes_of_the_users_own(self):
        from matplotlib.figure import Figure

        figure = Figure()
        left, right = figure.subplots(1, 2)
        assert plot.schedule([cosine(10), cosine(20)], ax=left) is figure
        assert plot.forgetting((0.5,), ax=right) is figure
        assert (len(left.get_lines()), len(right.get_lines())) == (2, 2)

    @pytest.mark.parametrize(
        ("shown", "steps", "words"),
        [
            (cosine(10), 0, "schedule: steps must be"),
            (cosine(10), -3, "schedule: steps must be"),
            (cosine(10), 2.5, "schedule: steps must be"),
            ([], 5, "there is no curve to draw"),
            ("cosine(10)", 5, "a curve such as stepwell.lr_scheduler.cosine(1000), or a scheduler"),
            (None, 5, "is drawn, got NoneType"),
            ([cosine(10), 3], 5, "is drawn, got int"),
        ],
    )
    def test_mistakes_are_refused_in_words(self, shown, steps, words):
        error = refused(lambda: plot.schedule(shown, steps))
        assert isinstance(error, (TypeError, ValueError))
        assert words in str(error)


class TestCommand:
    def run(self, *arguments: str) -> int:
        return main(["plot-schedule", *arguments])

    def test_draws_what_is_written_out(self, tmp_path, capsys):
        path = tmp_path / "both.png"
        status = self.run("warmup(500) >> cosine(9500)", "rex(800)", "--out", str(path))
        assert status == 0
        assert capsys.readouterr().out == f"Picture: {path.resolve()}\n"
        header = path.read_bytes()[:24]
        assert header.startswith(PNG)
        assert int.from_bytes(header[16:20], "big") > 600

    def test_the_ending_says_in_which_format(self, tmp_path):
        assert self.run("step(9)", "--steps", "20", "--out", str(tmp_path / "a.svg")) == 0
        assert "<svg" in (tmp_path / "a.svg").read_text()

    def test_a_file_without_an_ending_is_a_png_and_named_as_it_is(self, tmp_path, capsys):
        assert self.run("step(9)", "--steps", "20", "--out", str(tmp_path / "a")) == 0
        assert capsys.readouterr().out == f"Picture: {(tmp_path / 'a.png').resolve()}\n"
        assert (tmp_path / "a.png").read_bytes().startswith(PNG)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["cosin(5)"], "there is no curve 'cosin'; did you mean 'cosine'?"),
            (["cosine(5"], "'cosine(5' is no curve"),
            (["cosine(0)"], "cosine: steps must be"),
            (["step(5)"], "steps must be given, since nothing of what is drawn says"),
            (["step(5)", "--steps", "0"], "steps must be"),
            (["cosine(5)", "--lr", "nan"], "lr must be"),
            (["cosine(5)", "--out", "no/such/folder/a.png"], "cannot write no/such/folder/a.png"),
            (["cosine(5)", "--out", "a.jgp"], "Format 'jgp' is not supported"),
            (["cosine(5)", "--out", "."], "cannot write .: it is a folder"),
            (["cosine(5)", "--out", ""], "cannot write .: it is a folder"),
            (["step(5)", "--steps", "9" * 20], "steps must be a whole number in [1, 1e+15]"),
            ([f"cosine({10**24})"], "steps must be a whole number in [1, 1e+15]"),
            ([f"cosine({10**400})"], "cosine: steps must be a number"),
        ],
    )
    def test_says_what_to_do_about_a_mistake(self, capsys, tmp_path, monkeypatch, arguments, words):
        monkeypatch.chdir(tmp_path)
        assert self.run(*arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("python -m stepwell plot-schedule: error: ")
        assert words in said
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "arguments", [[], ["cosine(5)", "--steps", "many"], ["cosine(5)", "--lr", "x"]]
    )
    def test_bad_options_end_with_the_usage(self, capsys, arguments):
        with pytest.raises(SystemExit) as left:
            self.run(*arguments)
        assert left.value.code == 2
        assert "usage: python -m stepwell plot-schedule" in capsys.readouterr().err

    def test_the_help_has_an_example_that_works(self, capsys, tmp_path, monkeypatch):
        with pytest.raises(SystemExit):
            self.run("--help")
        example = 'example: python -m stepwell plot-schedule "warmup(500) >> cosine(9500)"'
        assert example in capsys.readouterr().out
        monkeypatch.chdir(tmp_path)
        assert self.run("warmup(500) >> cosine(9500)") == 0
        assert (tmp_path / "schedule.png").exists()


# What tutorials draw


class TestForgetting:
    @pytest.mark.tiny
    def test_the_weights_are_those_of_an_exponential_average(self):
        betas = (0.0, 0.5, 0.9, 0.99)
        figure = plot.forgetting(betas, steps=40)
        found = lines(figure)
        assert list(found) == [f"β = {beta:g}" for beta in betas]
        for beta, (x, y) in zip(betas, found.values(), strict=True):
            assert list(x) == list(range(40))
            expected = [(1 - beta) * beta**k for k in range(40)]
            # forty roundings of float64
            np.testing.assert_allclose(y, expected, rtol=1e-13, atol=0)

    def test_a_point_marks_the_memory(self):
        figure = plot.forgetting((0.9,), steps=40)
        (x,), (y,) = figure.axes[0].get_lines()[1].get_data()
        assert (x, y) == (10, pytest.approx(0.1 * 0.9**10))

    @pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
    def test_a_beta_has_a_range(self, beta):
        with pytest.raises(ValueError, match="Invalid beta parameter"):
            plot.forgetting((beta,))


def ways(steps: int, lr: float, momentum: float = 0.0) -> list[float]:
    """x^2 along the recursion x_k+1 = (1 + m - 2 lr) x_k - m x_k-1, from rest at 1."""
    before = now = 1.0
    losses = [1.0]
    for _ in range(steps):
        before, now = now, (1 + momentum - 2 * lr) * now - momentum * before
        losses.append(now**2)
    return losses


class TestDescent:
    @pytest.mark.tiny
    def test_losses_of_several_rates_are_powers(self):
        rates = (0.01, 0.3, 0.5, 0.9, 1.0, 1.1)
        found = lines(plot.learning_rates(rates, steps=25))
        assert list(found) == [f"lr = {rate:g}" for rate in rates]
        for rate, (x, y) in zip(rates, found.values(), strict=True):
            assert list(x) == list(range(26))
            # roundings of 25 steps; at 0.5 the first one ends at zero
            np.testing.assert_allclose(y, [(1 - 2 * rate) ** (2 * k) for k in x], rtol=1e-12)

    def test_losses_beyond_all_numbers_are_infinite(self):
        figure = plot.learning_rates((5.0,), steps=300)
        ((_, y),) = lines(figure).values()
        # 9 ** 600
        assert y[-1] == math.inf
        figure.canvas.draw()

    def test_losses_of_several_momenta_follow_the_recursion(self):
        momenta = (0.0, 0.5, 0.64, 0.9)
        found = lines(plot.momenta(momenta, lr=0.02, steps=60))
        assert list(found) == [f"momentum = {m:g}" for m in momenta]
        for momentum, (_, y) in zip(momenta, found.values(), strict=True):
            # near its zeros the recursion cancels: some digits relative to the way so far
            np.testing.assert_allclose(y, ways(60, 0.02, momentum), rtol=1e-9, atol=1e-14)

    def test_the_axes_are_logarithmic_and_named(self):
        for figure in (plot.learning_rates(), plot.momenta()):
            assert words(figure)[:2] == ["iteration", "loss f(x) = x²"]
            assert figure.axes[0].get_yscale() == "log"

    def test_a_rate_has_a_range(self):
        with pytest.raises(ValueError, match="Invalid learning rate: -1"):
            plot.learning_rates((-1.0,))


def torch_way(surface: plot.Surface, make: Any, steps: int) -> np.ndarray:
    """The same way with torch's optimizer."""
    point = torch.nn.Parameter(torch.tensor(surface.start, dtype=torch.float64))
    optimizer = make([point])
    points = [surface.start]
    for _ in range(steps):
        optimizer.zero_grad()
        surface.height(point[0], point[1]).backward()
        optimizer.step()
        points.append(tuple(point.tolist()))
    return np.array(points)


class TestTrajectories:
    @pytest.mark.parametrize(
        "surface", [plot.ROSENBROCK, plot.RAVINE], ids=["rosenbrock", "ravine"]
    )
    def test_are_those_of_torchs_optimizers(self, surface):
        found = lines(plot.trajectories(surface, steps=60))
        assert list(found) == list(surface.contenders)
        for label, (x, y) in found.items():
            made = surface.contenders[label]
            assert made.func.__module__.startswith("stepwell.")
            twin = partial(getattr(torch.optim, made.func.__name__), **made.keywords)
            # float64, sixty steps, some of which amplify a rounding tenfold
            np.testing.assert_allclose(
                np.array([x, y]).T, torch_way(surface, twin, 60), rtol=1e-6, atol=1e-9
            )

    def test_a_surface_is_lowest_where_it_says(self):
        for surface in (plot.ROSENBROCK, plot.RAVINE):
            place = [torch.tensor(v, dtype=torch.float64) for v in surface.minimum]
            for variable in place:
                variable.requires_grad_()
            height = surface.height(*place)
            height.backward()
            assert height == 0
            assert all(variable.grad == 0 for variable in place)
            assert surface.height(*map(torch.tensor, surface.start)) > 1

    def test_every_default_stays_in_the_picture(self):
        for figure in (plot.trajectories(), plot.trajectories(plot.RAVINE, steps=60)):
            (left, right), (low, high) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
            for x, y in lines(figure).values():
                assert ((left < x) & (x < right)).all()
                assert ((low < y) & (y < high)).all()

    def test_a_way_that_diverges_ends_at_its_last_finite_point(self):
        figure = plot.trajectories(
            plot.ROSENBROCK, {"far": lambda params: stepwell.SGD(params, lr=1.0)}, steps=50
        )
        ((x, y),) = lines(figure).values()
        assert len(x) < 51
        assert np.isfinite(x).all()
        assert np.isfinite(y).all()

    def test_takes_surfaces_and_optimizers_of_the_users_own(self):
        bowl = plot.Surface("A bowl", lambda x, y: x**2 + y**2, (1, 1), (0, 0), (-2, 2), (-2, 2))
        half = {"half way": lambda params: torch.optim.SGD(params, lr=0.25)}
        ((x, y),) = lines(plot.trajectories(bowl, half, steps=3)).values()
        assert x.tolist() == y.tolist() == [1, 0.5, 0.25, 0.125]
        error = refused(lambda: plot.trajectories(bowl))
        assert "contenders must be given, since the surface names none" in str(error)


@pytest.mark.parametrize(
    "draw", [plot.forgetting, plot.learning_rates, plot.momenta, plot.trajectories]
)
@pytest.mark.parametrize("steps", [0, -1, 1.5, None])
def test_a_number_of_steps_has_a_range(draw, steps):
    error = refused(lambda: draw(steps=steps))
    assert "steps must be" in str(error)


@pytest.mark.parametrize(
    ("draw", "what"),
    [(plot.forgetting, "beta"), (plot.learning_rates, "rate"), (plot.momenta, "momentum")],
)
@pytest.mark.parametrize("none", [(), [], np.array([])])
def test_nothing_to_draw_is_refused(draw, what, none):
    assert str(refused(lambda: draw(none))) == f"{draw.__name__}: there is no {what} to draw"
    one = f"{draw.__name__}: the first argument is a list, of one {what} too: [0.5]"
    assert str(refused(lambda: draw(0.5))) == one


def test_trajectories_say_what_they_take():
    assert "must be a stepwell.plot.Surface" in str(refused(lambda: plot.trajectories("ravine")))
    error = refused(lambda: plot.trajectories(plot.RAVINE, [stepwell.SGD]))
    assert "contenders must be a dict from labels" in str(error)


# The documentation's pictures


def test_every_curve_has_a_picture_in_the_documentation():
    constructors = {name for name, made in vars(curves).items() if callable(made)}
    lower = {name for name in constructors if name.islower()}
    assert lower <= documentation.CURVES.keys()
    for name in lower:
        texts, _ = documentation.CURVES[name]
        assert any(f"{name}(" in text for text in texts)


@pytest.mark.parametrize("name", documentation.PICTURES)
def test_every_picture_is_there_and_small(name):
    picture = (ROOT / "docs" / "pictures" / f"{name}.png").read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) < 80_000


def test_no_picture_is_left_over():
    found = {path.stem for path in (ROOT / "docs" / "pictures").glob("*.png")}
    assert found == documentation.PICTURES.keys()


def test_pictures_are_made_again_by_one_command(tmp_path, monkeypatch, capsys):
    kept = {"composition": documentation.PICTURES["composition"]}
    monkeypatch.setattr(documentation, "PICTURES", kept)
    (path,) = documentation.write(tmp_path / "new")
    assert path.read_bytes().startswith(PNG)
    assert len(path.read_bytes()) < 80_000
    again = tmp_path / "again"
    assert next(documentation.write(again)).read_bytes() == path.read_bytes()


def test_text_in_the_pictures_is_what_the_curves_are():
    for texts, _ in documentation.CURVES.values():
        for text in texts:
            assert parse(repr(parse(text))) == parse(text)


# Without Matplotlib


@pytest.mark.tiny
def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ExtraMissingError, match=r"pip install 'stepwell\[plot\]'"):
        plot.schedule(cosine(10))


def test_the_command_says_so_too(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot-schedule", "cosine(10)"]) == 2
    assert "pip install 'stepwell[plot]'" in capsys.readouterr().err


def test_nothing_global_is_used():
    plot.momenta(steps=3)
    assert "matplotlib.figure" in sys.modules
    assert "matplotlib.pyplot" not in sys.modules


def test_every_picture_that_a_page_shows_is_there():
    shown = set()
    for page in (ROOT / "docs").glob("*.md"):
        shown |= set(re.findall(r"\]\((pictures/[\w-]+\.png)\)", page.read_text()))
    assert "pictures/ravine.png" in shown
    assert all((ROOT / "docs" / path).is_file() for path in shown)
