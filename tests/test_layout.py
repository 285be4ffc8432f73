"""Imports run one way, pipelines to transforms to models, and models know no Beam."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FORBIDDEN = {
    "models": {"pipelines", "transforms", "apache_beam", "argparse", "tests", "benchmarks"},
    "transforms": {"pipelines", "argparse", "tests", "benchmarks"},
    "pipelines": {"tests", "benchmarks"},
}
MODULES = [(folder, path) for folder in FORBIDDEN for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """The top-level packages that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize(
    ("folder", "path"), [pytest.param(*m, id=str(m[1].relative_to(REPOSITORY))) for m in MODULES]
)
def test_no_module_imports_against_the_direction(folder: str, path: Path) -> None:
    assert imported(path) & FORBIDDEN[folder] == set()


def test_there_are_modules_to_look_at() -> None:
    assert {folder for folder, _ in MODULES} == set(FORBIDDEN)
    assert "transforms" in imported(REPOSITORY / "pipelines" / "prepare.py")


@pytest.mark.parametrize("name", ["utils", "common", "helpers", "misc", "proto"])
def test_no_module_is_a_drawer_for_anything(name: str) -> None:
    assert [path for _, path in MODULES if path.stem == name] == []


# They answer False to a time-out or a refusal; of the others, `find` and `glob` leave out what they cannot list
SILENT_CALLS = {"isfile", "isdir", "exists", "lexists", "find", "glob", "expand_path"}


def silent_calls(source: str) -> list[int]:
    """The lines on which a store is asked in a way that takes a failure for an absence.

    A variable that holds a file system is called `fs`, or ends in it.
    """
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            raises = any(keyword.arg == "on_error" for keyword in node.keywords)
            if node.func.attr in SILENT_CALLS and owner.endswith("fs") and not raises:
                lines.append(node.lineno)
            if node.func.attr == "walk" and owner.endswith("fs") and not raises:
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", [pytest.param(m[1], id=str(m[1].relative_to(REPOSITORY))) for m in MODULES])
def test_no_failure_of_a_store_is_taken_for_an_absence(path: Path) -> None:
    assert silent_calls(path.read_text(encoding="utf-8")) == []


def test_silent_calls_are_seen() -> None:
    assert silent_calls("fs.exists(p)\nfs.info(p)\nself.fs.isdir(p)\nfs.walk(p)\nos.path.exists(p)") == [
        1,
        3,
        4,
    ]
    assert silent_calls("fs.walk(p, on_error='raise')\nfs.glob(p, on_error='raise')") == []
