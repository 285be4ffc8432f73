"""However Diptych is installed, it runs beside other people's `models`, `transforms` and `pipelines`."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from emulators import free_port
from foreign import FOLDERS, write_foreign_packages
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
PACKAGE_FILES = ("__init__.py", "__main__.py", "py.typed")
BUILD = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
MULTI_PROCESSING = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
POOL = """
import sys
sys.path.insert(0, {deploy!r})
import worker_pool
from diptych.pipelines.cli import main
if __name__ == "__main__":
    pool = worker_pool.WorkerPool()
    start = pool.StartWorker
    pool.StartWorker = lambda *request: (print("started a worker"), start(*request))[1]
    server = worker_pool._serve(pool, "localhost", {port})
    code = main(sys.argv[1:])
    server.stop(None)
    sys.exit(code)
"""


@dataclasses.dataclass(frozen=True)
class Environment:
    """A virtual environment with Diptych in it, used beside foreign packages of the same names.

    Attributes:
        bin: The folder of its commands.
        foreign: A folder with packages that must not be imported: on PYTHONPATH, and the working directory.
        source: The tree that was installed.
    """

    bin: Path
    foreign: Path
    source: Path

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Runs a command and returns what it prints."""
        return run([str(part) for part in command], cwd or self.foreign, str(self.foreign))


def run(command: Sequence[str], cwd: Path, python_path: str = "") -> str:
    env = {**os.environ, "PYTHONPATH": python_path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as a checkout without symbolic links has it, where git writes a link's target as text."""
    tree = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tree)
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "diptych").mkdir()
    for name in PACKAGE_FILES:
        shutil.copy(REPOSITORY / "diptych" / name, tree / "diptych")
    for folder in FOLDERS:
        (tree / "diptych" / folder).write_text(f"../{folder}")
    return tree


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds from the tree."""
    tree = shutil.copytree(source, tmp_path_factory.mktemp("wheel") / "tree")
    output = tree.parent
    run([sys.executable, "-m", "pip", "wheel", *BUILD, "--wheel-dir", str(output), str(tree)], output)
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution that Beam makes for Dataflow's workers from `--setup_file`."""
    tree = shutil.copytree(source, tmp_path_factory.mktemp("sdist") / "tree")
    stage = (
        "import sys; from apache_beam.runners.portability.stager import Stager\n"
        "print(Stager._build_setup_package(*sys.argv[1:]))"
    )
    run([sys.executable, "-c", stage, str(tree / "setup.py"), str(tree.parent)], tree)
    (built,) = tree.parent.glob("*.tar.gz")
    return built


@pytest.fixture(scope="session", params=["wheel", "sdist", "editable"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment of its own, with this one's dependencies, for each way to install Diptych."""
    tmp = tmp_path_factory.mktemp(request.param)
    run([sys.executable, "-m", "venv", "--without-pip", str(tmp / "venv")], tmp)
    (site,) = (tmp / "venv").glob("lib/python*/site-packages")
    # Folders that a .pth file names are searched, but .pth files in them, such as this checkout's own, are not read
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    source = Path(request.getfixturevalue("source"))
    if request.param == "editable":
        source = shutil.copytree(source, tmp / "tree")
        target = ["--editable", str(source)]
    else:
        target = [str(request.getfixturevalue(request.param))]
    python = tmp / "venv" / "bin" / "python"
    run([str(python), "-m", "pip", "install", *BUILD, "--ignore-installed", *target], tmp)
    foreign = tmp / "foreign"
    write_foreign_packages(foreign)
    (foreign / "photos").mkdir()
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i, 90, 120)).save(foreign / "photos" / f"{i}.jpg")
    return Environment(python.parent, foreign, source)


def module_files(tree: Path) -> set[str]:
    return {
        path.relative_to(tree).as_posix()
        for folder in FOLDERS
        for path in (tree / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_module_and_nothing_beside_diptych(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    expected = {f"diptych/{name}" for name in module_files(REPOSITORY)}
    assert names - info == expected | {f"diptych/{name}" for name in PACKAGE_FILES}


def test_every_module_comes_from_the_installed_package(environment: Environment) -> None:
    script = (
        "import importlib.util, sys, diptych\n"
        "for name in sys.argv[1:]:\n"
        "    print(importlib.util.find_spec(name).origin)"
    )
    names = sorted(
        "diptych." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in module_files(REPOSITORY)
    )
    origins = environment.run(environment.bin / "python", "-c", script, *names).split()
    root = environment.source if environment.source.name == "tree" else environment.bin.parent
    assert len(origins) == len(names)
    assert [origin for origin in origins if not Path(origin).is_relative_to(root)] == []


@pytest.mark.parametrize("command", [("diptych",), ("python", "-m", "diptych")], ids="-".join)
def test_both_commands_run_where_the_names_are_taken(
    environment: Environment, command: tuple[str, ...]
) -> None:
    assert "prepare" in environment.run(environment.bin / command[0], *command[1:], "--help")


def test_the_command_runs_in_the_repository(environment: Environment) -> None:
    assert "prepare" in environment.run(environment.bin / "diptych", "--help", cwd=REPOSITORY)
    assert "prepare" in environment.run(environment.bin / "python", "-m", "diptych", "--help", cwd=REPOSITORY)


def test_worker_processes_run_where_the_names_are_taken(environment: Environment, tmp_path: Path) -> None:
    check_prepare(environment, [environment.bin / "diptych"], MULTI_PROCESSING, tmp_path)


def test_a_worker_pool_runs_where_the_names_are_taken(environment: Environment, tmp_path: Path) -> None:
    port = free_port()
    script = tmp_path / "pool.py"
    script.write_text(POOL.format(deploy=str(REPOSITORY / "deploy"), port=port))
    flags = [
        "--runner=PortableRunner",
        "--job_endpoint=embed",
        "--environment_type=EXTERNAL",
        f"--environment_config=localhost:{port}",
    ]
    printed = check_prepare(environment, [environment.bin / "python", script], flags, tmp_path)
    assert "started a worker" in printed


def check_prepare(
    environment: Environment, command: Sequence[str | Path], flags: Sequence[str], tmp_path: Path
) -> str:
    output = tmp_path / "out"
    printed = environment.run(
        *command, "prepare", "--input", "photos", "--output", output, "--chunk_rows=3", "--quiet", *flags
    )
    assert sum(pq.read_metadata(path).num_rows for path in output.glob("images/*.parquet")) == 6
    return printed


def test_coverage_counts_the_modules_that_users_import(tmp_path: Path) -> None:
    report = tmp_path / "coverage.json"
    tests = "tests/models/test_errors.py"
    flags = ["-q", "-p", "no:cacheprovider", "--cov=diptych", f"--cov-report=json:{report}"]
    # Its own data file, and none of the settings of a run with coverage that this test may be part of
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV_CORE")}
    command = [sys.executable, "-m", "pytest", tests, *flags]
    env["COVERAGE_FILE"] = str(tmp_path / ".coverage")
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout
    files = json.loads(report.read_text())["files"]
    assert files["models/errors.py"]["summary"]["covered_lines"] > 0
