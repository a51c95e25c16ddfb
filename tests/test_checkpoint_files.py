"""Is a checkpoint written all or nothing, whatever goes wrong, and which of many is the newest?"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

import stepwell
from stepwell.checkpoint import CheckpointError, latest, load, save, saving, verify
from stepwell.checkpoint.pieces import in_parallel
from stepwell.lr_scheduler import StepLR

from .compare import assert_same_training, files, snapshot

ROOT = Path(__file__).parents[1]


def fails_after(function, count, number):
    """The function, which from some call on fails as a system call does."""
    calls = iter(range(1_000_000))

    def failing(*args):
        if next(calls) >= count:
            raise OSError(number, os.strerror(number))
        return function(*args)

    return failing


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("call", "count", "number"),
    [
        ("pwrite", 0, errno.ENOSPC),
        ("pwrite", 2, errno.ENOSPC),
        ("pwrite", 1, errno.EDQUOT),
        ("fsync", 0, errno.EIO),
        ("open", 0, errno.EACCES),
        ("open", 0, errno.EROFS),
        ("replace", 0, errno.EPERM),
    ],
)
@pytest.mark.parametrize("background", [False, True])
def test_a_failure_names_the_file_and_leaves_the_old_one(
    path, monkeypatch, call, count, number, background
):
    save(path, extra=[torch.arange(5.0), torch.ones(7)])
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails_after(getattr(os, call), count, number))
        with pytest.raises(OSError, match=str(path)) as caught:
            save(path, extra=[torch.zeros(3), torch.ones(3)], background=background).wait()
    assert caught.value.errno == number
    assert "no checkpoint was written" in str(caught.value)
    assert files(path.parent) == [path.name]
    assert path.read_bytes() == before
    assert torch.equal(load(path).extra[0], torch.arange(5.0))


def test_a_limit_of_the_system(path):
    """Not a stand-in for it: the kernel cuts the file short, and then refuses to write."""
    save(path, extra=torch.ones(10))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save(path, extra=torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(path) in str(caught.value)
    assert files(path.parent) == [path.name]
    assert torch.equal(load(path).extra, torch.ones(10))


def test_a_system_without_the_calls(path, monkeypatch):
    save(path, extra=1)
    monkeypatch.delattr(os, "preadv")
    for attempt in (lambda: save(path, extra=2), lambda: load(path), lambda: verify(path)):
        with pytest.raises(NotImplementedError, match=r"on Linux and macOS; .* lacks os.preadv"):
            attempt()
    with pytest.raises(NotImplementedError):
        latest(path.parent)


def test_places_where_no_file_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    for path, error in (
        (tmp_path / "file" / "x.safetensors", NotADirectoryError),
        (tmp_path, IsADirectoryError),
    ):
        with pytest.raises(error, match=str(path)):
            save(path, extra=1)
    assert files(tmp_path) == ["file"]


def test_the_order_of_writing(path, monkeypatch):
    """All is on the disk before the name changes, and the name before the call returns."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*args, name=name, real=real):
            is_folder = name == "fsync" and os.readlink(f"/proc/self/fd/{args[0]}") == str(
                path.parent
            )
            calls.append("sync folder" if is_folder else name)
            return real(*args)

        monkeypatch.setattr(os, name, noted)
    save(path, extra=1)
    assert calls == ["fsync", "replace", "sync folder"]


def test_interrupted_by_the_keyboard(path, monkeypatch):
    save(path, extra=1)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(path, extra=2)
    assert files(path.parent) == [path.name]
    assert load(path).extra == 1


def test_a_link_goes_on_leading_to_the_file(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "run.safetensors"
    link.symlink_to(tmp_path / "disk" / "real.safetensors")
    save(link, extra=1)
    assert link.is_symlink()
    assert load(tmp_path / "disk" / "real.safetensors").extra == 1


def test_files_may_be_read_as_any_other(path):
    save(path, extra=1)
    other = path.with_name("other")
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode


def test_a_file_cut_while_it_is_read(path, monkeypatch):
    save(path, extra=torch.zeros(5_000_000))
    real = os.preadv

    def cutting(fd, views, place):
        if place > 1_000_000:
            os.truncate(path, 1_000_000)
        return real(fd, views, place)

    monkeypatch.setattr(os, "preadv", cutting)
    with pytest.raises(CheckpointError, match="ended early"):
        load(path)


@pytest.mark.parametrize("cores", [1, 3])
def test_work_side_by_side_is_in_order_and_ends_at_an_error(monkeypatch, cores):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert in_parallel(lambda a, b: a - b, [(i, 1) for i in range(100)]) == list(range(-1, 99))
    begun = []

    def work(i):
        begun.append(i)
        if i == 3:
            raise OSError(errno.EIO, "no more")

    with pytest.raises(OSError, match="no more"):
        in_parallel(work, [(i,) for i in range(100_000)])
    assert len(begun) < 100_000


@pytest.fixture
def half_way(path, monkeypatch):
    """A file, a training that is another, and what makes a disk fail at the second reading."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    # without it small ones are read beforehand, once
    monkeypatch.setattr("stepwell.checkpoint.states.SMALL", 0)

    def made(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(*(torch.nn.Linear(9, 9, bias=False) for _ in range(3)))
        optimizer = stepwell.AdamW(model.parameters(), lr=0.1 + seed)
        model(torch.ones(2, 9)).sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer, "scheduler": StepLR(optimizer, 1 + seed)}

    save(path, **made(0))
    real, reads = os.preadv, Counter()

    def fail(outcome):
        def reading(fd, views, place):
            reads[place] += 1
            # the second tensor of the model, of those that are read once more
            again = [p for p, count in reads.items() if count == 2]
            if reads[place] == 2 and again.index(place) == 1:
                outcome()
            return real(fd, views, place)

        monkeypatch.setattr(os, "preadv", reading)

    return made(0), made(1), fail


def bits(model):
    return [param.detach().clone() for param in model.parameters()]


def rest_of(training):
    """All but the model."""
    optimizer = training["optimizer"]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    state = {k: v for k, v in snapshot(optimizer).items() if k.kind != "param"}
    return state, groups, training["scheduler"].state_dict()


def assert_same_rest(found, expected):
    assert_same_training(found[0], expected[0], "the optimizer")
    assert found[1:] == expected[1:]


def test_a_disk_that_fails_while_the_model_is_overwritten(path, half_way):
    saved, training, fail = half_way
    before, rest = bits(training["model"]), rest_of(training)

    def outcome():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    fail(outcome)
    with pytest.raises(CheckpointError) as caught:
        load(path, **training)
    assert str(caught.value).splitlines() == [
        f"{path} was whole, and could not be read once more: [Errno 5] Input/output error",
        "  The model is half loaded. These are overwritten, wholly or in part; everything else is "
        "what it was:",
        "  model.0.weight",
        "  model.1.weight",
    ]
    assert isinstance(caught.value.__cause__, OSError)
    after = bits(training["model"])
    assert torch.equal(after[0], bits(saved["model"])[0])
    assert torch.equal(after[2], before[2])
    assert_same_rest(rest_of(training), rest)


def test_an_interrupt_while_the_model_is_overwritten(path, half_way):
    _, training, fail = half_way
    rest = rest_of(training)

    def outcome():
        raise KeyboardInterrupt

    fail(outcome)
    with pytest.raises(KeyboardInterrupt):
        load(path, **training)
    assert_same_rest(rest_of(training), rest)


def test_a_file_that_changes_while_it_is_read(path, half_way):
    saved, training, fail = half_way
    content = path.read_bytes()
    weight = bits(saved["model"])[1].numpy().tobytes()
    fail(lambda: path.write_bytes(content.replace(weight, bytes(len(weight)))))
    with pytest.raises(CheckpointError, match=r"once more: .*bytes of 'model.1.weight' are not"):
        load(path, **training)


# Memory


def megabytes(what):
    """What the kernel says of this process: VmRSS is what it has now, VmHWM the most it had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) / 1024


def forget_the_peak():
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says")
def test_no_copy_of_the_parameters_is_made(path):
    def made():
        model = torch.nn.Sequential(torch.nn.Linear(4000, 4000), torch.nn.Linear(4000, 4000))
        # in another order of memory, so that it cannot be written as it lies
        model[1].weight.data = model[1].weight.data.t()
        return model, stepwell.AdamW(model.parameters())

    model, optimizer = made()
    optimizer.init_state()
    # what is there once, threads and buffers of the file system, is not counted
    save(path.with_name("first"), extra=torch.ones(5_000_000))
    before = megabytes("VmRSS")
    forget_the_peak()
    save(path, model=model, optimizer=optimizer)
    assert megabytes("VmHWM") - before < 64

    del model, optimizer
    model, optimizer = made()
    before = megabytes("VmRSS")
    forget_the_peak()
    load(path, model=model, optimizer=optimizer)
    assert megabytes("VmRSS") - before > 200, "two moments of 32 M numbers should be there"
    assert megabytes("VmHWM") - megabytes("VmRSS") < 64


# In the background


def test_what_changes_meanwhile_is_not_saved(path):
    weight = torch.nn.Parameter(torch.zeros(300, 300))
    optimizer = stepwell.SGD([("w", weight)], momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = torch.ones(300, 300)
    writing = save(path, optimizer=optimizer, extra=[weight.detach()], background=True)
    with torch.no_grad():
        weight.fill_(2)
        optimizer.state[weight]["momentum_buffer"].fill_(2)
    writing.wait()
    assert writing.is_done
    other = stepwell.SGD([("w", torch.nn.Parameter(torch.zeros(300, 300)))], momentum=0.9)
    assert torch.equal(load(path, optimizer=other).extra[0], torch.zeros(300, 300))
    (state,) = other.state.values()
    assert torch.equal(state["momentum_buffer"], torch.ones(300, 300))


def test_the_next_save_reports_a_failure(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails_after(os.pwrite, 0, errno.ENOSPC))
        writing = save(path, extra=1, background=True)
        writing._done.wait()
    with pytest.raises(OSError, match="No space left"):
        save(path.with_name("other.safetensors"), extra=2)
    # it is said once
    writing.wait()
    save(path, extra=3)
    assert load(path).extra == 3


def test_a_process_that_ends_finishes_its_file(path):
    code = (
        "import sys, torch; from stepwell.checkpoint import save; "
        "save(sys.argv[1], extra=[torch.ones(1_000_000)] * 3, background=True)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, cwd=ROOT)
    verify(path)


def test_a_process_that_ends_says_what_failed(path):
    code = (
        "import os, sys, torch; from stepwell.checkpoint import save; "
        "save(sys.argv[1], extra=1, background=True).wait(); "
        "os.fsync = lambda fd: os.close(-1); "
        "save(sys.argv[1], extra=2, background=True)"
    )
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, cwd=ROOT)
    last = ran.stderr.decode().strip().splitlines()[-1]
    assert last.startswith("OSError: [Errno 9] Bad file descriptor (no checkpoint was written)")
    assert str(path) in last
    assert load(path).extra == 1


# Many files


def test_keep_leaves_the_newest(tmp_path):
    for name in ("notes-1.txt", "other-1.safetensors", "step-9.safetensors.bak"):
        (tmp_path / name).write_text("not a checkpoint")
    (tmp_path / "step-0.safetensors").write_text("not a checkpoint")
    save(tmp_path / "best-1.safetensors", extra=0)
    for step in (9, 10, 11, 12, 13):
        save(tmp_path / f"step-{step}.safetensors", extra=step, keep=3)
    assert files(tmp_path) == [
        "best-1.safetensors",
        "notes-1.txt",
        "other-1.safetensors",
        "step-0.safetensors",
        "step-11.safetensors",
        "step-12.safetensors",
        "step-13.safetensors",
        "step-9.safetensors.bak",
    ]
    # training was set back: what is newest is not what has the greatest number
    save(tmp_path / "step-2.safetensors", extra=2, keep=1)
    assert latest(tmp_path) == tmp_path / "step-2.safetensors"
    assert len(files(tmp_path)) == 6


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_keep_is_a_count(tmp_path, keep):
    with pytest.raises(ValueError, match="keep must be a whole number"):
        save(tmp_path / "step-1.safetensors", extra=1, keep=keep)


def test_keep_needs_numbers_in_names(path):
    with pytest.raises(ValueError, match="keep=3 needs names that end in a whole number"):
        save(path, extra=1, keep=3)
    assert not path.exists()


@pytest.mark.tiny
def test_latest_passes_over_what_is_damaged(tmp_path):
    assert latest(tmp_path) is None
    for step in (1, 2, 3):
        save(tmp_path / f"step-{step}.safetensors", extra=torch.full((9,), step))
    assert latest(tmp_path) == tmp_path / "step-3.safetensors"
    newest = tmp_path / "step-3.safetensors"
    # what a killed process has left, just before it would have had its name
    (tmp_path / ".step-4.safetensors.0.unfinished-checkpoint").write_bytes(newest.read_bytes())
    assert latest(tmp_path) == newest
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x07")
    (tmp_path / "step-2.safetensors").write_bytes(b"")
    (tmp_path / "step-4.safetensors").mkdir()
    assert latest(tmp_path) == tmp_path / "step-1.safetensors"
    assert latest(tmp_path / "nowhere") is None
    with pytest.raises(NotADirectoryError):
        latest(tmp_path / "step-2.safetensors")


def test_what_is_saved_in_the_background_is_what_loads_next(tmp_path, monkeypatch):
    path, go_on = tmp_path / "step-1.safetensors", threading.Event()
    write = saving.write

    def slowly(*args, **options):
        go_on.wait()
        write(*args, **options)

    save(path, extra=1)
    monkeypatch.setattr(saving, "write", slowly)
    for number, read in ((2, lambda: load(path).extra), (3, lambda: latest(tmp_path))):
        go_on.clear()
        newer = path if number == 2 else tmp_path / "step-3.safetensors"
        writing = save(newer, extra=number, background=True)
        found = []
        thread = threading.Thread(target=lambda read=read, found=found: found.append(read()))
        thread.start()
        assert not found
        go_on.set()
        thread.join()
        writing.wait()
        assert found == [number if number == 2 else newer]
    # what went wrong there is for the next save
    monkeypatch.setattr(saving, "write", mock.Mock(side_effect=OSError("full")))
    writing = save(path, extra=4, background=True)
    assert load(path).extra == 2
    with pytest.raises(OSError, match="full"):
        writing.wait()


def test_a_first_run_has_no_folder_yet(tmp_path, monkeypatch):
    """The way to resume that the documentation shows, in a folder that the first save makes."""
    folder, synced = tmp_path / "runs" / "7", []
    real = os.fsync

    def noted(fd):
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    if sys.platform == "linux":
        monkeypatch.setattr("os.fsync", noted)
    for step in (1, 2):
        start = load(newest).extra["step"] if (newest := latest(folder)) else 0
        assert start == step - 1
        save(folder / f"step-{step}.safetensors", extra={"step": step}, keep=3, background=step > 1)
    save(folder / "other" / "step-1.safetensors", extra=1, background=True).wait()
    assert files(folder) == ["other", "step-1.safetensors", "step-2.safetensors"]
    if sys.platform == "linux":
        # the names of new folders survive a loss of power
        assert {str(tmp_path), str(tmp_path / "runs"), str(folder)} <= {*synced}


@pytest.mark.parametrize("kills", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_killed_at_random_moments(tmp_path, kills):
    command = [sys.executable, "-m", "tests.killed_saves", str(kills), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    interrupted = int(ran.stdout.split()[2])
    assert interrupted > kills // 10, f"kills missed the saves: {ran.stdout}"
