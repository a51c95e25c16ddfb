"""Do the files that are published hold what they should, and do other tools see the package?"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import stepwell
from stepwell.__main__ import main

ROOT = Path(__file__).parents[1]
HOOKS = """
import sys
from pathlib import Path
from hatchling import build
for kind in ("sdist", "wheel", "editable"):
    Path(sys.argv[1], kind).mkdir()
    getattr(build, f"build_{kind}")(str(Path(sys.argv[1], kind)))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with what the build back-end makes of this checkout: sdist, wheel, editable."""
    pytest.importorskip("hatchling", reason="the build back-end is installed by the extra test")
    folder = tmp_path_factory.mktemp("built")
    subprocess.run([sys.executable, "-c", HOOKS, str(folder)], cwd=ROOT, check=True)
    return folder


def _wheel(folder: Path) -> zipfile.ZipFile:
    (path,) = folder.glob(f"stepwell-{stepwell.__version__}-py3-none-any.whl")
    return zipfile.ZipFile(path)


def test_the_source_distribution_holds_all_that_a_developer_needs(built):
    (path,) = (built / "sdist").iterdir()
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    single = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "constraints.txt"}
    assert {*single, "pyproject.toml", "scripts/environment.sh", ".ci/run"} <= names
    for folder in ("stepwell", "tests", "benchmarks", "docs", "examples", "scripts"):
        here = {p for p in (ROOT / folder).rglob("*") if p.is_file()}
        paths = {p.relative_to(ROOT) for p in here}
        # caches of tools, which git ignores
        kept = {p for p in paths if not any(part.startswith((".", "__pyc")) for part in p.parts)}
        assert {*map(str, kept)} <= names
    places = {name.partition("/")[0] for name in names}
    assert places.isdisjoint({".git", ".venv", "build", "dist", "out", ".mypy_cache"})


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with _wheel(built / "wheel") as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (about,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = wheel.read(about).decode()
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "stepwell").rglob("*.py")}
    assert names == {*files, "stepwell/py.typed"}
    assert f"\nVersion: {stepwell.__version__}\n" in metadata


def test_an_editable_install_is_a_path_that_type_checkers_follow(built):
    with _wheel(built / "editable") as wheel:
        (name,) = (name for name in wheel.namelist() if ".dist-info/" not in name)
        assert name.endswith(".pth")
        assert wheel.read(name).decode().strip() == str(ROOT)


@pytest.mark.tiny
def test_the_version_is_the_one_of_the_changelog(capsys):
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest is not None
    assert latest[1] == stepwell.__version__
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"stepwell {stepwell.__version__}")
