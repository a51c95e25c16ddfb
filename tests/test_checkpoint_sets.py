"""Which of many checkpoints is the newest, and which may go?"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from stepwell.checkpoint import folder as folders
from stepwell.checkpoint import latest, load, save, verify, writing

from .compare import files


def saved(folder, *names, **options):
    for name in names:
        save(folder / name, extra=[name, torch.ones(9)], **options)


def damage(*paths):
    """Flip a bit of the last tensor, which the header does not show."""
    for path in paths:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


# Which may go


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("seed0-step-{}.safetensors", "seed1-step-{}.safetensors"),
        ("model-7b-{}.safetensors", "model-13b-{}.safetensors"),
        ("lr0.1-{}", "lr0.01-{}"),
        ("{}", "0x{}"),
        ("run-{}.safetensors", "run-{}.ema.safetensors"),
        ("run-{}.v2", "run-{}.v3"),
    ],
)
def test_other_sets_are_left(tmp_path, name, other):
    saved(tmp_path, *map(other.format, (1, 2, 3)))
    saved(tmp_path, *map(name.format, (9, 10, 11)), keep=2)
    kept = [*map(other.format, (1, 2, 3)), *map(name.format, (10, 11))]
    assert files(tmp_path) == sorted(kept)


@pytest.mark.parametrize(
    "name", ["model-7b", "lr0.1", "loss=0.25.safetensors", "step-3-ema.safetensors", "1.5", "x"]
)
def test_names_that_do_not_end_in_a_whole_number(tmp_path, name):
    """There the number may tell other runs apart."""
    with pytest.raises(ValueError, match="keep=3 needs names that end in a whole number"):
        saved(tmp_path, name, keep=3)
    assert files(tmp_path) == []


@pytest.mark.tiny
def test_damaged_ones_do_not_count(tmp_path):
    saved(tmp_path, "step-1", "step-2", "step-3")
    damage(tmp_path / "step-2", tmp_path / "step-3")
    saved(tmp_path, "step-4", keep=3)
    assert files(tmp_path) == ["step-1", "step-2", "step-3", "step-4"]
    saved(tmp_path, "step-5", keep=3)
    assert files(tmp_path) == ["step-1", "step-2", "step-3", "step-4", "step-5"]
    # now there are three that are whole, and newer than those
    saved(tmp_path, "step-6", keep=3)
    assert files(tmp_path) == ["step-4", "step-5", "step-6"]


def test_damage_after_it_was_verified(tmp_path):
    saved(tmp_path, "step-1", "step-2", "step-3", keep=3)
    damage(tmp_path / "step-3")
    # whatever the clock of the file system can tell apart
    os.utime(tmp_path / "step-3", (0, 0))
    saved(tmp_path, "step-4", keep=2)
    assert files(tmp_path) == ["step-2", "step-3", "step-4"]


def test_what_stays_is_read_once(tmp_path, monkeypatch):
    saved(tmp_path, "step-1", "step-2")
    read = []

    def noted(path):
        read.append(path.name)
        verify(path)

    monkeypatch.setattr(folders, "verify", noted)
    saved(tmp_path, "step-3", keep=3)
    assert read == [], "nothing is removed"
    saved(tmp_path, "step-4", "step-5", "step-6", "step-7", keep=3)
    # 3, 4 and so on were written with keep
    assert read == ["step-2"]
    assert files(tmp_path) == ["step-5", "step-6", "step-7"]


def test_one_that_cannot_be_removed(tmp_path, monkeypatch):
    saved(tmp_path, "step-1")

    def denied(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", denied)
    with pytest.warns(RuntimeWarning, match="an old checkpoint is left: .*denied: .*step-1"):
        saved(tmp_path, "step-2", keep=1)
    assert latest(tmp_path) == tmp_path / "step-2"


def test_a_save_through_a_link_to_a_file_of_its_set(tmp_path):
    """What has just been written is not an older one."""
    saved(tmp_path, "step-1")
    (tmp_path / "step-0").symlink_to("step-1")
    saved(tmp_path, "step-0", keep=1)
    assert files(tmp_path) == ["step-0", "step-1"]
    assert load(tmp_path / "step-1").extra[0] == "step-0"


@pytest.mark.parametrize("name", ["step-99", "best"])
def test_links_do_not_count_and_what_they_lead_to_stays(tmp_path, name):
    saved(tmp_path, "step-0", "step-1", "step-2")
    (tmp_path / name).symlink_to("step-1")
    (tmp_path / "step-98").symlink_to("nowhere")
    saved(tmp_path, "step-3", keep=2)
    assert files(tmp_path) == sorted(["step-1", "step-2", "step-3", name, "step-98"])
    saved(tmp_path, "step-4", keep=2)
    assert files(tmp_path) == sorted(["step-1", "step-3", "step-4", name, "step-98"])
    (tmp_path / name).unlink()
    saved(tmp_path, "step-5", keep=2)
    assert files(tmp_path) == ["step-4", "step-5", "step-98"]


def test_links_to_other_folders_stay(tmp_path):
    (tmp_path / "other").mkdir()
    saved(tmp_path / "other", "step-0")
    (tmp_path / "step-0").symlink_to(tmp_path / "other" / "step-0")
    saved(tmp_path, "step-1", "step-2", keep=1)
    assert files(tmp_path) == ["other", "step-0", "step-2"]
    assert load(tmp_path / "step-0").extra[0] == "step-0"


def test_a_file_with_two_names_counts_once(tmp_path):
    saved(tmp_path, "step-0", "step-1", "step-2")
    os.link(tmp_path / "step-2", tmp_path / "step-8")
    saved(tmp_path, "step-3", keep=3)
    assert files(tmp_path) == ["step-1", "step-2", "step-3", "step-8"]
    saved(tmp_path, "step-4", keep=1)
    assert files(tmp_path) == ["step-4"]


# Which is the newest


@pytest.fixture
def clock(monkeypatch):
    """A clock that says what it is told to."""

    class Clock:
        now = time.time_ns()

    monkeypatch.setattr(folders.time, "time_ns", lambda: Clock.now)
    return Clock


@pytest.mark.tiny
def test_a_clock_that_went_a_year_ahead(tmp_path, clock):
    clock.now += 365 * 86_400 * 10**9
    saved(tmp_path, "step-1", "best.safetensors")
    clock.now -= 365 * 86_400 * 10**9
    saved(tmp_path, "step-2")
    assert latest(tmp_path) == tmp_path / "step-2"
    saved(tmp_path, "step-3", keep=2)
    assert files(tmp_path) == ["best.safetensors", "step-2", "step-3"]


@pytest.mark.parametrize("name", ["best.ckpt", "other/x.safetensors"])
def test_a_clock_that_went_ahead_for_a_file_of_another_kind(tmp_path, clock, name):
    """The folders of a link, and of what it leads to, have the new file as their newest."""
    (tmp_path / "other").mkdir()
    clock.now += 10**18
    saved(tmp_path, name)
    clock.now -= 10**18
    (tmp_path / "step-2.safetensors").symlink_to(tmp_path / "other" / "step-2.safetensors")
    saved(tmp_path, "step-2.safetensors")
    for folder in (tmp_path, tmp_path / "other"):
        assert latest(folder) == folder / "step-2.safetensors"


@pytest.mark.parametrize("now", [10**40 - 2, 2**63])
def test_times_that_no_clock_says(tmp_path, monkeypatch, now):
    """They are passed over, and those that are saved afterwards are found."""
    with monkeypatch.context() as patch:
        patch.setattr(writing, "time_of_saving", lambda _: now)
        saved(tmp_path, "step-1")
    verify(tmp_path / "step-1")
    saved(tmp_path, "step-2", "step-3", "step-4", keep=2)
    assert files(tmp_path) == ["step-1", "step-3", "step-4"]
    assert latest(tmp_path) == tmp_path / "step-4"


def test_the_last_time_that_a_clock_can_say(tmp_path, clock):
    """Nothing is later; then the file system tells them apart."""
    now, clock.now = clock.now, 2**63 - 1
    saved(tmp_path, "step-9")
    clock.now = now
    os.utime(tmp_path / "step-9", (1, 1))
    saved(tmp_path, "step-2")
    assert latest(tmp_path) == tmp_path / "step-2"


def test_a_clock_that_stands_still(tmp_path, clock):
    saved(tmp_path, "step-9", "step-10", "step-2")
    assert latest(tmp_path) == tmp_path / "step-2"


def test_copies_without_their_dates(tmp_path):
    saved(tmp_path, "step-1", "step-2", "step-3")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("step-3", "step-2", "step-1"):
        shutil.copyfile(tmp_path / name, other / name)
        os.utime(other / name, (2_000_000_000 - int(name[-1]),) * 2)
    assert latest(other) == other / "step-3"
    saved(other, "step-4", keep=2)
    assert files(other) == ["step-3", "step-4"]


def test_a_file_that_is_replaced_becomes_the_newest(tmp_path, clock):
    saved(tmp_path, "step-1", "step-2", "step-1")
    assert latest(tmp_path) == tmp_path / "step-1"
    assert load(tmp_path / "step-1").extra[0] == "step-1"


def test_a_link_is_as_new_as_what_it_leads_to(tmp_path, clock):
    (tmp_path / "disk").mkdir()
    saved(tmp_path / "disk", "step-9")
    (tmp_path / "step-2").symlink_to(tmp_path / "disk" / "step-2")
    saved(tmp_path, "step-2")
    assert latest(tmp_path / "disk") == tmp_path / "disk" / "step-2"
    assert latest(tmp_path) == tmp_path / "step-2"
