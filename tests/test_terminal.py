"""Do the commands print on terminals whose encoding lacks characters that they use?"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepwell.terminal import printable

TASK = """
import torch
from torch import nn
from stepwell.race import Task

def line():
    x = torch.arange(80.0).reshape(20, 4) / 80
    y = x.sum(1, keepdim=True)
    return Task("line", lambda: nn.Linear(4, 1), (x, y), (x, y), nn.functional.mse_loss)
"""


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("encoding", "written"),
    [("ascii", b"2.0x, 5 us ... ?"), ("cp1252", b"2.0\xd7, 5 \xb5s \x85 ?"), ("utf-8", None)],
)
def test_what_an_encoding_lacks_is_spelt_in_plain_letters(monkeypatch, encoding, written):
    text = "2.0×, 5 µs … ♞"
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with printable():
        print(text, end="")
    stream.flush()
    assert raw.getvalue() == (text.encode() if written is None else written)
    assert stream.errors == "strict"


@pytest.mark.tiny
def test_an_error_handler_of_the_users_own_stays(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    with printable():
        assert stream.errors == "backslashreplace"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with printable():
        print("×")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_race_prints(tmp_path, encoding):
    (tmp_path / "mine.py").write_text(TASK)
    arguments = ["--task", "mine:line", "--epochs", "2", "--batch-size", "8", "--out", "."]
    done = subprocess.run(
        [sys.executable, "-m", "stepwell", "race", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": _path()},
        capture_output=True,
        check=True,
    )
    said = done.stdout.decode(encoding)
    times = "x" if encoding == "ascii" else "×"
    assert f"1.0{times}" in said
    assert "?" not in said
    assert (tmp_path / "race.png").is_file()


def _path() -> str:
    return os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
