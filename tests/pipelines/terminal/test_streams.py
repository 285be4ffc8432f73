"""Standard streams that are closed, full, or of few characters cost no job its work."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.pipelines.cli import main
from diptych.pipelines.demo_data.layouts import write_data_set

REPOSITORY = Path(__file__).parents[3]
DIPTYCH = f"{shlex.quote(sys.executable)} -m diptych"
SUMMARY = "written   9 to"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tar file, its name and its folder's in Chinese."""
    folder = tmp_path_factory.mktemp("scenes")
    tar = sorted(write_data_set(str(folder / "data"), 10, seed=1).webdataset.glob("train*.tar"))[0]
    (folder / "数据").mkdir()
    return tar.rename(folder / "数据" / "甲.tar").parent


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.parametrize(
    ("streams", "stdout", "stderr"),
    [
        (">&-", "", ""),
        ("2>&-", SUMMARY, ""),
        ("<&-", SUMMARY, ""),
        ("<&- >&- 2>&-", "", ""),
        (">/dev/full", "", "diptych: standard output cannot be written (No space left on device).\n"),
        (">/dev/full 2>/dev/full", "", ""),
        ("| true; exit ${PIPESTATUS[0]}", "", ""),
        ("2>&1 >&- | true; exit ${PIPESTATUS[0]}", "", ""),
    ],
)
def test_the_work_is_done(streams, stdout, stderr, data, tmp_path):
    out = tmp_path / "出 out"
    flags = f"--input {shlex.quote(str(data))} --output {shlex.quote(str(out))}"
    done = shell(f"{DIPTYCH} prepare {flags} {streams}")
    assert (done.returncode, done.stderr) == (0, stderr)
    assert stdout in done.stdout
    assert bool(stdout) == bool(done.stdout)
    assert (out / "_SUCCESS.json").exists()


@pytest.mark.parametrize("streams", [">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_failures_keep_their_exit_code(streams, tmp_path):
    assert shell(f"{DIPTYCH} prepare --input {tmp_path}/none --output {tmp_path}/o {streams}").returncode == 1
    assert shell(f"{DIPTYCH} prepare --output {tmp_path}/o {streams}").returncode == 2
    assert shell(f"{DIPTYCH} verify {tmp_path} {streams}").returncode == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1:strict"},
    ],
)
def test_names_in_any_script_go_with_any_encoding(environment, data, tmp_path):
    out = tmp_path / "出"
    done = shell(f"{DIPTYCH} prepare --input '{data}' --output '{out}'", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert SUMMARY in done.stdout
    assert main(["verify", str(out)]) == 0
    done = shell(f"{DIPTYCH} verify '{data}/无'", **environment)
    assert done.returncode == 1
    assert done.stderr.startswith("diptych: ")
    assert "Traceback" not in done.stderr


def test_a_data_file_does_not_get_what_is_printed(data, tmp_path):
    """With descriptor 1 closed, the next file that is opened would have its number."""
    out = tmp_path / "out"
    code = "import os, sys; from diptych.pipelines.cli import main; code = main(sys.argv[1:]); os.write(1, b'printed')"
    python = f"{shlex.quote(sys.executable)} -c {shlex.quote(code + '; sys.exit(code)')}"
    command = f"{python} prepare --input '{data}' --output {out} >&- 2>&-"
    assert shell(command).returncode == 0
    assert all(b"printed" not in file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert main(["verify", str(out)]) == 0
