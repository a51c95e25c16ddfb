"""Do saves stand each other's company: processes in one folder, threads, odd files and names?"""

from __future__ import annotations

import errno
import fcntl
import gc
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from stepwell.checkpoint import load, reading, replacing, save, saving, verify

from .compare import files

ROOT = Path(__file__).parents[1]


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


# Beside other processes


@pytest.mark.parametrize("is_held", [False, True])
def test_a_file_that_is_taken_for_a_leftover_before_it_is_locked(path, monkeypatch, is_held):
    """Another process comes between the making of the file and its lock, twice."""
    real, made, held = os.open, [], []

    def interrupted(name, flags, *mode):
        fd = real(name, flags, *mode)
        if flags & os.O_CREAT and len(made) < 2:
            made.append(name)
            if is_held:
                held.append(real(name, os.O_RDWR))
                fcntl.flock(held[-1], fcntl.LOCK_EX)
                os.unlink(name)
            else:
                replacing._remove_leftovers(path.parent)
        return fd

    monkeypatch.setattr(os, "open", interrupted)
    save(path, extra=1)
    assert len(set(made)) == 2
    assert load(path).extra == 1
    assert files(path.parent) == [path.name]
    for fd in held:
        os.close(fd)


def test_what_others_are_writing_is_left(path):
    with replacing.replacing(path.with_name("other")) as fd:
        save(path, extra=1)
        os.write(fd, b"still there")
    assert path.with_name("other").read_bytes() == b"still there"


def test_locks_may_not_reach_other_machines(path, monkeypatch):
    """What one of them has not touched for a day is a leftover, nothing younger."""
    with monkeypatch.context() as patch:
        patch.setattr(replacing.platform, "node", lambda: "another")
        names = [replacing._created(path, None) for _ in range(2)]
    for _, fd in names:
        os.close(fd)
    (young, _), (old, _) = names
    os.utime(old, (time.time() - 90_000,) * 2)
    save(path, extra=1)
    assert files(path.parent) == sorted([path.name, young.name])


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks(path, monkeypatch, number):
    left = path.with_name(f".x{replacing.UNFINISHED}")
    left.write_bytes(b"")
    monkeypatch.setattr(fcntl, "flock", failing(number))
    save(path, extra=1)
    assert load(path).extra == 1
    # it may be in use
    assert left.exists()


# What is there already


def of_folders(function, number):
    """The function, which fails for folders alone."""

    def sync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        function(fd)

    return sync


def test_a_folder_that_is_not_synced(path, monkeypatch):
    save(path, extra="old")
    monkeypatch.setattr(os, "fsync", of_folders(os.fsync, errno.EIO))
    with pytest.raises(OSError, match="the new checkpoint is in place; a loss of power") as caught:
        save(path, extra="new")
    assert caught.value.filename == str(path)
    assert load(path).extra == "new"
    assert files(path.parent) == [path.name]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders(path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", of_folders(os.fsync, number))
    save(path, extra=1)
    verify(path)


@contextmanager
def seconds(count):
    """Not longer; for what would hang."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(count)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_pipes(path):
    """One of a leftover's name is passed over, and a checkpoint takes the place of none."""
    leftover = path.with_name(f".x{replacing.UNFINISHED}")
    os.mkfifo(leftover)
    os.utime(leftover, (0, 0))
    os.mkfifo(path)
    with seconds(20):
        with pytest.raises(OSError, match="not replaced by a file") as caught:
            save(path, extra=1)
        assert caught.value.filename == str(path)
        save(path.with_name("other"), extra=1)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert len(files(path.parent)) == 3


def test_links_in_a_circle(path):
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)
    with pytest.raises(OSError, match="Too many levels") as caught:
        save(path, extra=1)
    assert caught.value.filename == str(path)
    assert path.is_symlink()


def test_a_link_to_nothing_yet(path):
    path.symlink_to(path.with_name("other"))
    save(path, extra=1)
    assert path.is_symlink()
    assert load(path.with_name("other")).extra == 1


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400])
def test_the_mode_is_kept(path, mode):
    save(path, extra=1)
    path.chmod(mode)
    save(path, extra=2)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert load(path).extra == 2


def test_nobody_else_reads_what_is_being_written(path, monkeypatch):
    save(path, extra=1)
    path.chmod(0o600)
    real, modes = os.pwrite, []

    def noted(fd, *args):
        modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        return real(fd, *args)

    monkeypatch.setattr(os, "pwrite", noted)
    save(path, extra=2)
    assert set(modes) == {0o600}


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_the_longest_names(tmp_path, name):
    save(tmp_path / name, extra=1)
    assert load(tmp_path / name).extra == 1


# In the background


@pytest.fixture
def disk(monkeypatch):
    """A disk whose syncs in other threads take until it is told to go, and then may fail."""
    real, main = os.fsync, threading.main_thread()

    class Disk:
        go = threading.Event()
        number = 0

        def sync(self, fd):
            if threading.current_thread() is not main:
                self.go.wait()
                if self.number:
                    raise OSError(self.number, os.strerror(self.number))
            real(fd)

    disk = Disk()
    monkeypatch.setattr(os, "fsync", disk.sync)
    yield disk
    disk.number = 0
    disk.go.set()
    with suppress(OSError):
        saving.Background.wait()


@pytest.mark.parametrize("background", [False, True])
def test_one_at_a_time(tmp_path, disk, background):
    """The next save waits for the one before, wherever that writes to."""
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    first = save(tmp_path / "1" / "x", extra=1, background=True)
    threading.Timer(0.1, disk.go.set).start()
    second = save(tmp_path / "2" / "x", extra=2, background=background)
    assert first.is_done
    second.wait()
    assert load(tmp_path / "1" / "x").extra == 1


def test_threads_that_save_at_once(path, disk):
    """Both have seen that nothing is under way."""
    first, second = (saving.Writing(path.with_name(name), {}, {}, None) for name in ("1", "2"))
    saving.Background.start(first)
    threading.Timer(0.1, disk.go.set).start()
    saving.Background.start(second)
    assert first.is_done


def test_the_newer_of_two_stays(tmp_path, disk):
    """One folder has two names."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "real" / "x", extra="older", background=True)
    threading.Timer(0.1, disk.go.set).start()
    save(tmp_path / "link" / "x", extra="newer")
    assert load(tmp_path / "real" / "x").extra == "newer"


@pytest.mark.tiny
def test_any_next_save_reports_a_failure(tmp_path, disk):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    disk.number = errno.ENOSPC
    disk.go.set()
    writing = save(tmp_path / "1" / "x", extra=1, background=True)
    with pytest.raises(OSError, match="No space left") as caught:
        save(tmp_path / "2" / "x", extra=2)
    assert caught.value.filename == str(tmp_path / "1" / "x")
    # it is said once
    writing.wait()
    save(tmp_path / "2" / "x", extra=2)


def test_an_interrupt_while_a_save_waits(path, disk):
    """What went wrong meanwhile is not forgotten."""
    disk.number = errno.EIO
    save(path, extra=1, background=True)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        save(path, extra=2)
    disk.go.set()
    with pytest.raises(OSError, match="Input/output error"):
        save(path, extra=3)
    save(path, extra=4)
    assert load(path).extra == 4


def test_a_process_of_multiprocessing_says_what_failed(path, disk, capfd):
    """Such processes do not heed atexit."""
    disk.number = errno.ENOSPC
    disk.go.set()
    process = multiprocessing.get_context("fork").Process(
        target=save, args=(path,), kwargs={"extra": 1, "background": True}
    )
    process.start()
    process.join()
    said = capfd.readouterr().err
    assert "OSError: [Errno 28] No space left on device (no checkpoint was written)" in said
    assert str(path) in said


def forked(body):
    """The exit status of a child that does this, within 20 seconds."""
    child = os.fork()
    if child == 0:
        try:
            with seconds(20):
                body()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def test_a_forked_process_does_not_wait_for_the_thread_of_another(path, disk):
    writing = save(path, extra=1, background=True)
    assert forked(writing.wait) == 0


def test_a_fork_while_another_thread_copies(path, monkeypatch):
    """That thread, which would let go of the lock, is not in the child."""
    real, begun, go = saving._copied, threading.Event(), threading.Event()

    def slow(tensor):
        if os.getpid() == parent:
            begun.set()
            go.wait()
        return real(tensor)

    parent = os.getpid()
    monkeypatch.setattr(saving, "_copied", slow)
    options = {"extra": torch.ones(9), "background": True}
    thread = threading.Thread(target=save, args=(path,), kwargs=options)
    thread.start()
    begun.wait()
    other = path.with_name("other")
    try:
        assert forked(lambda: save(other, **options).wait()) == 0
    finally:
        go.set()
        thread.join()
        saving.Background.wait()
    verify(other)
    verify(path)


def test_a_forked_process_does_not_say_what_another_failed_to_write(path, disk):
    disk.number = errno.EIO
    disk.go.set()
    writing = save(path, extra=1, background=True)
    writing._done.wait()
    disk.number = 0
    assert forked(lambda: save(path, extra=2)) == 0
    with pytest.raises(OSError, match="Input/output error"):
        writing.wait()
    assert load(path).extra == 2


# While the interpreter ends


AT_EXIT = """
import atexit, sys

def late():
    checkpoint.save(sys.argv[1], extra=torch.ones(9_000_000))
    assert checkpoint.load(sys.argv[1]).extra.sum() == 9_000_000
    checkpoint.save(sys.argv[2], extra=torch.ones(9_000_000), background=True)

{}
"""
IMPORT, REGISTER = "import torch; from stepwell import checkpoint", "atexit.register(late)"


@pytest.mark.parametrize("lines", [(IMPORT, REGISTER), (REGISTER, IMPORT)])
def test_a_function_of_atexit_saves_and_loads(tmp_path, lines):
    """It runs before, or after, what waits for a save in the background."""
    paths = [tmp_path / name for name in ("here", "in the background")]
    command = [sys.executable, "-c", AT_EXIT.format("\n".join(lines)), *paths]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.stderr == ""
    for path in paths:
        verify(path)


def test_threads_that_cannot_be_had(path, monkeypatch):
    """Then this one does the work, whatever is asked for."""

    def refused(_):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refused)
    writing = save(path, extra=torch.ones(9_000_000), background=True)
    assert writing.is_done
    writing.wait()
    assert load(path).extra.sum() == 9_000_000


def test_copies_are_let_go_after_a_failure(path, disk, monkeypatch):
    real, copies = saving._copied, []

    def noted(tensor):
        copy = real(tensor)
        copies.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(saving, "_copied", noted)
    disk.number = errno.ENOSPC
    disk.go.set()
    writing = save(path, extra=torch.ones(3), background=True)
    writing._done.wait()
    gc.collect()
    assert [copy() for copy in copies] == [None]
    with pytest.raises(OSError, match="No space"):
        writing.wait()


def test_handles_are_let_go(path):
    first = weakref.ref(save(path, extra=1, background=True))
    save(path, extra=2, background=True).wait()
    gc.collect()
    assert first() is None


def test_a_relative_path_is_that_of_the_call(tmp_path, monkeypatch, disk):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    real = saving.write

    def later(*args, **kwargs):
        disk.go.wait()
        real(*args, **kwargs)

    monkeypatch.setattr(saving, "write", later)
    monkeypatch.chdir(tmp_path / "here")
    writing = save("x", extra=1, background=True)
    monkeypatch.chdir(tmp_path / "there")
    disk.go.set()
    writing.wait()
    assert files(tmp_path / "here") == ["x"]
    assert files(tmp_path / "there") == []


def test_devices_have_finished_before_threads_read(path, monkeypatch):
    """Threads do not share the stream on which the last step may be under way."""
    calls = []
    monkeypatch.setattr(torch.accelerator, "synchronize", calls.append)
    saving.synchronize([torch.ones(2), torch.ones(2, device="meta"), torch.ones(1, device="meta")])
    assert calls == [torch.device("meta")]
    order = []
    for name in ("synchronize", "write", "_copied"):
        real = getattr(saving, name)

        def noted(*args, name=name, real=real, **kwargs):
            order.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(saving, name, noted)
    for background in (False, True):
        save(path, extra=torch.ones(2), background=background).wait()
    assert order == ["synchronize", "write", "synchronize", "_copied", "write"]


def test_devices_have_finished_before_threads_write(path, monkeypatch):
    save(path, model=nn.Linear(2, 2))
    order = []
    for name in ("synchronize", "in_parallel"):
        real = getattr(reading, name)

        def noted(*args, name=name, real=real):
            order.append(name)
            return real(*args)

        monkeypatch.setattr(reading, name, noted)
    load(path, model=nn.Linear(2, 2))
    assert order == ["synchronize", "in_parallel"] * (len(order) // 2)
    assert order


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("background", [False, True])
def test_a_step_on_another_stream_is_saved(path, background):
    value = torch.zeros(20_000_000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**9)
        value.fill_(1)
        save(path, extra=value, background=background).wait()
    assert bool((load(path).extra == 1).all())
