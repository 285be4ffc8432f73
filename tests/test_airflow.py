"""The example for Airflow: its own loader takes it, and its commands do what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_models import TROUBLE, use_fakes

from diptych.pipelines.cli import main
from diptych.pipelines.demo_data.layouts import write_data_set

REPOSITORY = Path(__file__).parents[1]
AIRFLOW = Path(sys.prefix) / "airflow" / "bin" / "python"  # its packages and ours do not go together


def arguments(command: str, environment: dict[str, str], folder: Path) -> list[str]:
    """Returns what `diptych` gets from a command that bash runs, as Airflow has it run."""
    program = folder / "bin" / "diptych"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, **environment, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return list(json.loads(done.stdout))


@pytest.fixture
def airflow() -> list[str]:
    """The command that loads the example, but for its parameters."""
    assert AIRFLOW.exists(), f"{AIRFLOW} is not there: `make .venv/airflow/installed` makes it"
    loader = REPOSITORY / "tests" / "airflow_loader.py"
    return [str(AIRFLOW), str(loader), str(REPOSITORY / "deploy" / "airflow_dag.py")]


def home(folder: Path) -> dict[str, str]:
    return {**os.environ, "AIRFLOW_HOME": str(folder / "airflow"), "AIRFLOW__CORE__LOAD_EXAMPLES": "false"}


@pytest.mark.long
@pytest.mark.timeout(180)
def test_a_parameter_is_never_a_command(airflow, tmp_path):
    bad = "gs://b/x'; touch run; echo '\" $(touch run) `touch run` ${HOME} %s \\ 数据 *\n; touch run #"
    parameters = {"images": bad, "prompts": bad, "outputs": bad, "captioner": bad, "generator": bad}
    parameters["flags"] = "--chunk_rows 7 $(touch run) ;touch run * `touch run`"
    done = subprocess.run(
        [*airflow, json.dumps(parameters)],
        env=home(tmp_path),
        input="",
        capture_output=True,
        text=True,
        check=False,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("commands "))
    for job, (command, environment) in json.loads(line.removeprefix("commands ")).items():
        assert bad not in command
        argv = arguments(command, environment, tmp_path)
        source = "--input" if job == "caption" else "--prompts"
        expected = [f"{source}={bad}", f"--output={bad}/{job}/2026-11-22", f"--model={bad}"]
        assert argv[:5] == [job, *expected, f"--skip_done_in={bad}/{job}/*"]
        flags = argv[8 : -2 if job == "generate" else None]
        assert flags == parameters["flags"].split()
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.timeout(180)
def test_its_commands_run_and_its_checks_raise_an_alert(airflow, tmp_path, monkeypatch, capsys):
    use_fakes(monkeypatch)
    scenes = write_data_set(str(tmp_path / "data"), 20, seed=1).webdataset
    assert main(["prepare", f"--input={scenes}", f"--output={tmp_path / 'prepared'}", "--quiet"]) == 0
    prompts = tmp_path / "prompts.jsonl"
    texts = ["a dog", TROUBLE, *(f"a cat {number}" for number in range(18))]
    prompts.write_text("".join(json.dumps({"key": text, "prompt": text}) + "\n" for text in texts))
    parameters = {
        "images": str(tmp_path / "prepared"),
        "prompts": str(tmp_path / "*.jsonl"),
        "outputs": str(tmp_path / "nights"),
        "captioner": "hf:fake",
        "generator": "diffusers:fake",
        "flags": "--chunk_rows 7 --max_failure_rate 0.5",
    }
    loader = [*airflow, json.dumps(parameters)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        loader, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=home(tmp_path)
    ) as process:
        try:
            assert process.stdout is not None
            found = next((line for line in process.stdout if line.startswith("commands ")), None)
            assert found is not None, process.communicate(timeout=60)[1]
            commands = json.loads(found.removeprefix("commands "))
            lines = {}
            for job, (command, environment) in commands.items():
                capsys.readouterr()
                assert main(arguments(command, environment, tmp_path)) == 0
                lines[job] = capsys.readouterr().out.splitlines()[-1]
            asked = [f"caption 0.0 {lines['caption']}", f"generate 0.05 {lines['generate']}"]
            asked.append(f"generate 0.04 {lines['generate']}")
            said, _ = process.communicate("".join(f"{line}\n" for line in asked), timeout=60)
        finally:
            process.kill()
    assert sorted(commands) == ["caption", "generate"]
    assert {path.name for path in (tmp_path / "nights").glob("*/*")} == {"2026-11-22"}
    assert [line for line in said.splitlines() if line.startswith("checked ")] == [
        "checked caption: passed",
        "checked generate: passed",
        "checked generate: 1 of 20 rows of generated were rejected: {'model_error': 1}",
    ]
