"""What tests of several files are given."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a checkpoint goes, in a folder with nothing else in it."""
    return tmp_path / "run.safetensors"
