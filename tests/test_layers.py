"""Does each module import only from its left, is every public name exported, do the docs run?"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch

import stepwell
from stepwell import language, lr_scheduler, optimizers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stepwell"
FILES = sorted(PACKAGE.rglob("*.py"))

# The one table of layers: a module imports from rows above its own, and nothing beside itself.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("language",),
    (
        "after_import",
        "compiling",
        "exact",
        "extra",
        "matching",
        "modes",
        "shards",
        "terminal",
        "version",
        "wrapped",
    ),
    (
        "batch_statistics",
        "declaration",
        "formulas",
        "hooks",
        "hyperparameters",
        "lr_scheduler",
        "quasi_newton",
        "sparse",
    ),
    ("cohort",),
    ("native", "param_groups", "state_dict"),
    ("backends", "groups", "held_groups", "inspection", "state"),
    ("rehearsal", "totals"),
    ("persistence", "plan"),
    ("optimizer",),
    ("combined", "composing", "optimizers", "stand_ins"),
    ("averaging", "distributed", "functional", "plot", "swa_utils"),
    ("checkpoint",),
    ("race",),
    ("__main__",),
)
# what a file may import from its own package, where files stand side by side
SHELL = {
    "composite",
    "curvelr",
    "functions",
    "hyperparameters",
    "momentum",
    "scheduler",
    "stored",
    "watch",
}
SHARED = {"backends": set(), "optimizers": set(), "lr_scheduler": {"curves", *SHELL}}

LAYER = {name: index for index, row in enumerate(LAYERS) for name in row}
RULES = [value for value in vars(optimizers).values() if inspect.isclass(value)]
CURVES = [
    value
    for name, value in vars(lr_scheduler).items()
    # a curve, or torch's class around it, stands in a file of its name
    if inspect.isclass(value) and value.__module__.endswith(f".{name.lower()}")
]


def _named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _module(path: Path) -> tuple[str, ...]:
    """stepwell/backends/cpu.py -> ("backends", "cpu"); a package is its own name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imports(path: Path) -> set[tuple[str, ...]]:
    """The modules of this package that a file imports, wherever in the file."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            inside = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) + 1 - node.level], *inside]
            elif inside[:1] == ["stepwell"]:
                base = inside[1:]
            else:
                continue
            for alias in node.names:
                whole = (*base, alias.name)
                found.add(whole if _exists(whole) else tuple(base))
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            found |= {tuple(name[1:]) for name in names if name[0] == "stepwell"}
    return found


def _exists(module: tuple[str, ...]) -> bool:
    path = PACKAGE.joinpath(*module)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


MODULES = [path for path in FILES if _module(path)]


@pytest.mark.tiny
@pytest.mark.parametrize("path", MODULES, ids=map(_named, MODULES))
def test_imports_come_from_the_left(path: Path) -> None:
    top, *rest = _module(path)
    assert top in LAYER, f"{top} has no place in the table of layers"
    for imported in _imports(path):
        assert imported, f"{_named(path)} imports the whole package, which imports it"
        if imported[0] != top:
            assert LAYER[imported[0]] < LAYER[top], f"{_named(path)} imports {'.'.join(imported)}"
        elif rest and top in SHARED and imported != (top,):
            assert imported[1] in SHARED[top], f"{_named(path)} imports its sibling {imported[1]}"


@pytest.mark.tiny
def test_nothing_goes_in_circles() -> None:
    graph = {_module(path): _imports(path) - {_module(path)} for path in FILES}
    # a package's __init__ lists its files, which may use each other
    assert list(TopologicalSorter(graph).static_order())


def test_the_table_has_no_empty_place() -> None:
    assert {_module(path)[0] for path in MODULES} == LAYER.keys()


# Exports


@pytest.mark.tiny
@pytest.mark.parametrize(
    "package", ["language", "lr_scheduler", "lr_scheduler/curves", "optimizers"]
)
def test_public_names_are_exported_as_themselves(package: str) -> None:
    path = PACKAGE / package / "__init__.py"
    *statements, last = ast.parse(path.read_text()).body
    if ast.unparse(last).startswith("__all__ = "):
        # fewer names, for those who import all of them
        assert {*ast.literal_eval(last.value)} <= {*_exported(path, statements)}
    else:
        _exported(path, [*statements, last])


@pytest.mark.tiny
def test_the_package_lists_what_it_exports_once() -> None:
    path = PACKAGE / "__init__.py"
    _, first, _, hook, *imports, names, lazy, waits = ast.parse(path.read_text()).body
    assert ast.unparse(first) == "from importlib import import_module"
    assert ast.unparse(hook) == "from .after_import import after_import"
    assert ast.unparse(waits).startswith("after_import('torch.distributed.optim.utils', ")
    assert ast.unparse(names).startswith("__all__ = ")
    assert isinstance(lazy, ast.If)
    exported = [*_exported(path, imports), *_exported(path, lazy.body)]
    assert sorted(exported) == sorted([*stepwell.__all__, "__version__"])


# what traces and runs the words of the language, and is no word itself
INNER = {"Formula", "Program", "program_for", "trace"}


@pytest.mark.tiny
@pytest.mark.parametrize("package", ["checkpoint", "groups", "language", "plot", "race"])
def test_help_lists_what_a_package_exports(package: str) -> None:
    path = PACKAGE / package / "__init__.py"
    *statements, _ = ast.parse(path.read_text()).body
    module = importlib.import_module(f"stepwell.{package}")
    assert {*module.__all__} == {*_exported(path, statements)} - INNER
    text = pydoc.plain(pydoc.render_doc(module))
    assert all(re.search(rf"^ {{4}}(class )?{name}\b", text, re.M) for name in module.__all__)


def _exported(path: Path, statements: list[ast.stmt]) -> list[str]:
    """The names that are imported as themselves; nothing else may be there."""
    found = []
    for node in statements:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        assert isinstance(node, ast.ImportFrom), f"{_named(path)}: {ast.unparse(node)}"
        for alias in node.names:
            assert alias.asname == alias.name, f"{_named(path)}: {ast.unparse(node)}"
            found.append(alias.name)
    return found


IMPORT = """
import sys, torch
before = set(sys.modules)
import stepwell
print(*set(sys.modules) - before)
assert {*stepwell.__all__} == {name for name in dir(stepwell) if not name.startswith("__")}
"""


def test_importing_the_package_loads_what_an_optimizer_needs_and_nothing_more() -> None:
    run = [sys.executable, "-c", IMPORT]
    done = subprocess.run(run, capture_output=True, check=True, cwd=ROOT, text=True)
    loaded = done.stdout.split()
    packages = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    # torch has numpy; LLVM, Triton, rich, safetensors and Matplotlib wait until they are used
    assert packages <= {"stepwell", "numpy"}
    lazy = {name for name in stepwell.__all__ if inspect.ismodule(getattr(stepwell, name))}
    late = {"checkpoint", "functional", "groups", "lr_scheduler", "plot", "race", "swa_utils"}
    assert lazy == {"language", *late}
    assert not {f"stepwell.{name}" for name in late}.intersection(loaded)


@pytest.mark.tiny
def test_what_is_imported_late_is_there_for_whoever_looks() -> None:
    names: dict[str, Any] = {}
    exec("from stepwell import *", names)
    assert {*stepwell.__all__} == names.keys() - {"__builtins__"}
    assert stepwell.plot is importlib.import_module("stepwell.plot")


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("plots", ""),
        ("StepLR", ": it is stepwell.lr_scheduler.StepLR"),
        ("AveragedModel", ": it is stepwell.swa_utils.AveragedModel"),
        ("Lion", r": its optimizers are ASGD, .*, SparseAdam; to write another, see the README, "),
    ],
)
def test_a_name_that_is_not_there_says_where_to_look(name: str, remedy: str) -> None:
    message = rf"^module 'stepwell' has no attribute '{name}'{remedy}"
    with pytest.raises(AttributeError, match=message if remedy else f"{message}$"):
        getattr(stepwell, name)
    if not remedy:
        assert "Did you mean: 'plot'" in _last_line(f"import stepwell; stepwell.{name}")


def _last_line(script: str) -> str:
    """Return the last line that the interpreter prints about a script that fails."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, text=True)
    return done.stderr.splitlines()[-1]


@pytest.mark.tiny
def test_every_rule_and_curve_is_exported() -> None:
    assert all(getattr(stepwell, rule.__name__) is rule for rule in RULES)
    for path in (PACKAGE / "optimizers").glob("[!_]*.py"):
        module = importlib.import_module(f"stepwell.optimizers.{path.stem}")
        assert [name.lower() for name in module.__all__] == [path.stem]
        assert getattr(optimizers, module.__all__[0]) in RULES
    for path in (PACKAGE / "lr_scheduler").glob("[!_]*.py"):
        module = importlib.import_module(f"stepwell.lr_scheduler.{path.stem}")
        assert all(hasattr(lr_scheduler, name) for name in getattr(module, "__all__", ()))


def test_the_words_of_the_language_are_exported() -> None:
    for name in ("fields", "functions", "transforms"):
        module = importlib.import_module(f"stepwell.language.{name}")
        inner = {"Field", "MissingKeyError", "Slot", "near_miss"}
        missing = {*module.__all__} - {*language.__all__} - inner
        assert not missing, f"stepwell.language lacks {missing}"


@pytest.mark.parametrize("path", FILES, ids=map(_named, FILES))
def test_all_lists_what_there_is(path: Path) -> None:
    module = importlib.import_module(".".join(("stepwell", *_module(path))))
    assert all(hasattr(module, name) for name in getattr(module, "__all__", ()))


# No behaviour by name


NAMELESS = [path for path in FILES if _module(path)[:1] not in (("optimizers",), ("race",))]


@pytest.mark.parametrize("path", NAMELESS, ids=map(_named, NAMELESS))
def test_nothing_depends_on_the_name_of_a_rule(path: Path) -> None:
    names = {rule.__name__ for rule in RULES} - {"Optimizer"}
    body = ast.parse(path.read_text()).body
    # a list of what is exported does nothing
    code = [statement for statement in body if not ast.unparse(statement).startswith("__all__ = ")]
    for node in (node for statement in code for node in ast.walk(statement)):
        if isinstance(node, ast.Constant):
            assert node.value not in names, f"{_named(path)}, line {node.lineno}: {node.value}"
        if isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            known = {"type(tensor).__name__", "type(value).__name__", "__name__"}
            by_name = [s for s in sides if s.endswith("__name__") and s not in known]
            assert not by_name, f"{_named(path)}, line {node.lineno}: {ast.unparse(node)}"


# Docs


@pytest.mark.parametrize("path", FILES, ids=map(_named, FILES))
def test_doctests(path: Path) -> None:
    module = importlib.import_module(".".join(("stepwell", *_module(path))))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    exported = {name: getattr(stepwell, name) for name in stepwell.__all__}
    names = {"stepwell": stepwell, **exported, **vars(module), "torch": torch}
    for test in doctest.DocTestFinder().find(module, extraglobs=names):
        if test.examples:
            said: list[str] = []
            runner.run(test, out=said.append)
            assert not said, "".join(said)


def _section(cls: type, title: str) -> list[str]:
    """The names that a Google-style section of a docstring lists."""
    text = inspect.getdoc(cls) or ""
    body = re.split(rf"^{title}:\n", text, flags=re.MULTILINE)[1].split("\n\n")[0]
    return re.findall(r"^ {4}(\w+): ", body, flags=re.MULTILINE)


@pytest.mark.parametrize("cls", [*RULES, *CURVES])
def test_args_are_the_arguments(cls: type[Any]) -> None:
    arguments = list(inspect.signature(cls).parameters)
    listed = _section(cls, "Args")
    # the flags that every rule takes come last, in whatever order the signature has them
    assert sorted(listed) == sorted(arguments)
    positional = [
        p.name for p in inspect.signature(cls).parameters.values() if p.kind is not p.KEYWORD_ONLY
    ]
    assert [name for name in listed if name in positional] == positional


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_says_what_it_is_where_it_is_from_and_shows_it(rule: type[Any]) -> None:
    text = inspect.getdoc(rule) or ""
    assert re.match(r"[A-Z].*\.\n\n", text)
    assert "Paper:" in text
    # an arXiv number, or where and when
    assert re.search(
        r"arXiv:\d{4}\.\d{4,5}|, (19|20)\d\d\.|(ICML|ICLR \w+|ICNN|NeurIPS) \d{4}", text
    )
    assert ">>> " in text
