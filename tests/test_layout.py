"""The plan of the house: which way imports run, what a folder may hold, and where a test lies."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TOP_LEVEL = ("models", "transforms", "pipelines")
FORBIDDEN = {
    "models": {"diptych.pipelines", "diptych.transforms", "apache_beam", "argparse", "tests", "benchmarks"},
    "transforms": {"diptych.pipelines", "argparse", "tests", "benchmarks"},
    "pipelines": {"tests", "benchmarks"},
}
# The rooms of a folder, and what each may import of that folder: other rooms, and modules outside of rooms.
# "*" stands for all modules outside of rooms.
ROOMS = {
    "models": {
        "files": {"*"},
        "text": {"*", "files"},
        "captioning": {"*", "files"},
        "generation": {"*", "files", "text"},
        "metrics": {"*", "files", "captioning"},
        "training": {"*", "files", "text", "captioning", "generation", "metrics"},
        "*": {"*", "files", "text", "captioning", "generation", "metrics"},
    },
    "transforms": {
        "images": {"*"},
        "inference": {"*"},
        "sources": {"*"},
        "*": {"*", "images", "inference", "sources"},
    },
    "transforms/sources": {
        "archives": {"*"},
        "text": {"*"},
        "sharded": {"*", "archives", "text"},
        "planned": {"*", "archives", "text"},
        "*": {"*", "archives", "text", "sharded", "planned"},
    },
    "pipelines": {
        "demo_data": set(),
        "options": set(),
        "runners": {"options", "terminal"},
        "lifecycle": {"options", "runners", "terminal"},
        "training": {"options", "runners", "lifecycle", "terminal", "prepare"},
        "terminal": set(),
        "*": {"*", "demo_data", "options", "runners", "lifecycle", "terminal", "training"},
    },
}
# Test files of a whole rather than of one module
TESTS_OF_A_WHOLE = {
    "pipelines/runners/test_runners.py",
    "pipelines/test_concurrent_jobs.py",
    "pipelines/test_model_jobs.py",
    "pipelines/test_nightly.py",
    "pipelines/test_places.py",
    "pipelines/test_repeatable.py",
    "pipelines/test_retry_rejects.py",
    "transforms/sources/archives/test_archive_fuzz.py",
    "transforms/sources/sharded/test_tfrecord_fuzz.py",
}


def name_of(path: Path) -> str:
    """The name by which a file is imported."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(("diptych", *(parts[:-1] if parts[-1] == "__init__" else parts)))


PATHS = {name_of(path): path for top in TOP_LEVEL for path in sorted((REPOSITORY / top).rglob("*.py"))}
EACH_MODULE = pytest.mark.parametrize("module", sorted(PATHS))


def import_names(node: ast.AST) -> list[str]:
    """The modules that a statement names; `from package import module` names the module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        parent = node.module or ""
        children = [f"{parent}.{alias.name}" for alias in node.names]
        return [child if child in PATHS else parent for child in children]
    return []


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from at_import(child)


@functools.cache
def imports(module: str, *, only_at_import: bool = False) -> set[str]:
    """What a module imports, wherever in it or only where that runs at once."""
    tree = ast.parse(PATHS[module].read_text(encoding="utf-8"))
    nodes = at_import(tree) if only_at_import else ast.walk(tree)
    return {name for node in nodes for name in import_names(node)}


def breaks(module: str) -> set[tuple[str, str]]:
    """A module's imports that the table of rooms does not allow."""
    return {
        (module, target)
        for target in imports(module)
        if target in PATHS
        for folder in ROOMS
        if room(folder, target) is not None and not is_allowed(folder, room(folder, module), target)
    }


def room(folder: str, module: str) -> str | None:
    """The room of a folder that a module lies in, `*` for outside of rooms, None for another folder."""
    path = PATHS[module].relative_to(REPOSITORY)
    if not path.is_relative_to(folder):
        return None
    inner = path.relative_to(folder).parts
    return inner[0] if len(inner) > 1 else "*"


def is_allowed(folder: str, source: str | None, target: str) -> bool:
    """Whether a room (None for another folder) may import a module."""
    target_room = room(folder, target)
    if source is None or target_room is None or source == target_room:
        return True
    allowed = ROOMS[folder][source]
    return target_room in allowed or (target_room == "*" and target.rpartition(".")[2] in allowed)


def circles() -> list[set[str]]:
    """The sets of modules that reach each other by imports that run at once."""
    reached: dict[str, set[str]] = {}
    for module in PATHS:
        seen: set[str] = set()
        queue = [module]
        while queue:
            new = (imports(queue.pop(), only_at_import=True) & PATHS.keys()) - seen
            seen |= new
            queue.extend(new)
        reached[module] = seen
    return [
        circle
        for module in PATHS
        if module in reached[module]
        for circle in [{other for other in reached[module] if module in reached[other]}]
        if module == min(circle)
    ]


@EACH_MODULE
def test_no_module_imports_against_the_direction(module: str) -> None:
    forbidden = FORBIDDEN[module.split(".")[1]]
    packages = {
        ".".join(name.split(".")[: 2 if name.startswith("diptych.") else 1]) for name in imports(module)
    }
    assert packages & forbidden == set()


@pytest.mark.parametrize("folder", ["benchmarks", "deploy", "diptych", "tests", *TOP_LEVEL])
def test_nothing_imports_the_folders_by_their_bare_names(folder: str) -> None:
    for path in (REPOSITORY / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            tops = {name.partition(".")[0] for name in import_names(node)}
            assert tops.isdisjoint(TOP_LEVEL), f"{path}: {ast.unparse(node)}"


def test_there_are_modules_to_look_at() -> None:
    assert {module.split(".")[1] for module in PATHS} == set(TOP_LEVEL)
    assert "diptych.transforms.read" in imports("diptych.pipelines.prepare")


@pytest.mark.parametrize("folder", sorted(ROOMS))
def test_the_table_names_the_rooms_that_there_are(folder: str) -> None:
    assert {path.parent.name for path in (REPOSITORY / folder).glob("*/__init__.py")} == set(
        ROOMS[folder]
    ) - {"*"}


def test_imports_between_rooms_are_those_of_the_table() -> None:
    assert set().union(*map(breaks, PATHS)) == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles() == []


@pytest.mark.parametrize("name", ["utils", "common", "helpers", "misc", "proto"])
def test_no_module_is_a_drawer_for_anything(name: str) -> None:
    assert [module for module in PATHS if name in module.split(".")] == []


@EACH_MODULE
def test_nothing_lies_deeper_than_two_folders_but_sources(module: str) -> None:
    folders = PATHS[module].relative_to(REPOSITORY).parent.parts
    assert len(folders) <= (3 if folders[:2] == ("transforms", "sources") else 2)


@pytest.mark.parametrize("top", TOP_LEVEL)
def test_a_test_lies_where_its_module_lies(top: str) -> None:
    tests = [
        path.relative_to(REPOSITORY / "tests") for path in (REPOSITORY / "tests" / top).rglob("test_*.py")
    ]
    strays = {
        path.as_posix()
        for path in tests
        if not (REPOSITORY / path.parent / path.name.removeprefix("test_")).is_file()
    }
    assert strays == {name for name in TESTS_OF_A_WHOLE if name.startswith(f"{top}/")}


# `isfile` and its like answer False to a time-out or a refusal; `find` and `glob` leave out what they cannot list
SILENT_CALLS = {"isfile", "isdir", "exists", "lexists", "find", "glob", "expand_path"}


def silent_calls(source: str) -> list[int]:
    """The lines of calls that take a failure of a store for the absence of a file.

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


@EACH_MODULE
def test_no_failure_of_a_store_is_taken_for_an_absence(module: str) -> None:
    assert silent_calls(PATHS[module].read_text(encoding="utf-8")) == []


def test_silent_calls_are_seen() -> None:
    assert silent_calls("fs.exists(p)\nfs.info(p)\nself.fs.isdir(p)\nfs.walk(p)\nos.path.exists(p)") == [
        1,
        3,
        4,
    ]
    assert silent_calls("fs.walk(p, on_error='raise')\nfs.glob(p, on_error='raise')") == []
