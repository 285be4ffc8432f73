"""Imports run one way, between folders and between rooms, and models know no Beam."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("models", "transforms", "pipelines")
FORBIDDEN = {
    "models": {"diptych.pipelines", "diptych.transforms", "apache_beam", "argparse"},
    "transforms": {"diptych.pipelines", "argparse"},
    "pipelines": set[str](),
}
# Of each room, the rooms of its folder that it may import; "" is the folder itself
ROOMS = {
    "models": {
        "": {"captioning", "files", "generation", "metrics", "text"},
        "captioning": {"", "files"},
        "files": {""},
        "generation": {"", "files", "text"},
        "metrics": {"", "captioning", "files"},
        "text": {"", "files"},
        "training": {"", "captioning", "files", "generation", "metrics", "text"},
    },
    "transforms": {
        "": {"inference", "sources", "sources.archives", "sources.sharded"},
        "images": {"", "sources"},
        "inference": {""},
        "sources": {"", "sources.archives", "sources.planned", "sources.sharded", "sources.text"},
        "sources.archives": {"", "sources"},
        "sources.planned": {"", "sources", "sources.archives", "sources.text"},
        "sources.sharded": {"", "sources", "sources.archives", "sources.text"},
        "sources.text": {"", "sources"},
    },
    "pipelines": {
        "": {"demo_data", "lifecycle", "options", "runners", "terminal", "training"},
        "demo_data": {""},
        "lifecycle": {"options", "runners", "terminal"},
        "options": {"lifecycle", "runners"},
        "runners": {"lifecycle", "options", "terminal"},
        "terminal": set[str](),
        "training": {"", "lifecycle", "options", "terminal"},
    },
}
PATHS = {
    ".".join(["diptych", *path.relative_to(REPOSITORY).with_suffix("").parts]).removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
}


def imported(source: str) -> set[str]:
    """The modules that a source imports, wherever in it; of this project's, the modules and not their names."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            module = node.module or ""
            names |= {name if (name := f"{module}.{alias.name}") in PATHS else module for alias in node.names}
    return names


IMPORTS = {name: imported(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}


def room_of(module: str) -> tuple[str, str]:
    """The folder of a module, and its room there."""
    _, folder, *rooms, _ = [*module.split("."), *([""] if PATHS[module].stem == "__init__" else [])]
    return folder, ".".join(rooms)


@pytest.mark.parametrize("module", PATHS)
def test_no_module_imports_against_the_direction(module: str) -> None:
    folder, room = room_of(module)
    roots = {
        ".".join(name.split(".")[:2] if name.startswith("diptych.") else name.split(".")[:1])
        for name in IMPORTS[module]
    }
    assert roots & (FORBIDDEN[folder] | {"tests", "benchmarks", "deploy", *FOLDERS}) == set()
    rooms = {other[1] for name in IMPORTS[module] & PATHS.keys() if (other := room_of(name))[0] == folder}
    assert rooms - {room} <= ROOMS[folder][room]


def test_every_room_is_there() -> None:
    rooms = {folder: {room_of(name)[1] for name in PATHS if room_of(name)[0] == folder} for folder in FOLDERS}
    assert rooms == {folder: set(rooms) for folder, rooms in ROOMS.items()}
    assert "diptych.transforms.read" in IMPORTS["diptych.pipelines.prepare"]
    assert imported("from diptych.models import spec") == {"diptych.models.spec"}
    assert imported("from models import spec") == {"models"}


def test_no_import_goes_in_a_circle() -> None:
    left = {name: IMPORTS[name] & PATHS.keys() for name in PATHS}
    while left:
        free = {name for name, others in left.items() if not others & left.keys()}
        assert free, f"in a circle, or above one: {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in free}


def test_no_room_is_deeper_than_two_folders_but_in_sources() -> None:
    for name in PATHS:
        room = room_of(name)[1]
        assert room.count(".") == (room.startswith("sources.")), name


@pytest.mark.parametrize("name", ["utils", "common", "helpers", "misc", "proto"])
def test_no_module_is_a_drawer_for_anything(name: str) -> None:
    assert [path for path in PATHS.values() if path.stem == name] == []


# Tests of jobs as a whole lie in the folder of the jobs
WHOLES = {"concurrent_jobs", "model_jobs", "nightly", "places", "repeatable", "retry_rejects", "runners"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_tests_lie_where_what_they_test_does(folder: str) -> None:
    for path in (REPOSITORY / "tests" / folder).rglob("test_*.py"):
        name = path.stem.removeprefix("test_")
        module = REPOSITORY / path.relative_to(REPOSITORY / "tests").with_name(f"{name}.py")
        assert module.exists() or name in WHOLES or name.endswith("_fuzz"), path


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


@pytest.mark.parametrize("module", PATHS)
def test_no_failure_of_a_store_is_taken_for_an_absence(module: str) -> None:
    assert silent_calls(PATHS[module].read_text(encoding="utf-8")) == []


def test_silent_calls_are_seen() -> None:
    assert silent_calls("fs.exists(p)\nfs.info(p)\nself.fs.isdir(p)\nfs.walk(p)\nos.path.exists(p)") == [
        1,
        3,
        4,
    ]
    assert silent_calls("fs.walk(p, on_error='raise')\nfs.glob(p, on_error='raise')") == []
