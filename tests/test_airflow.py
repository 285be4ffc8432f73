"""The example for Airflow: its own loader takes it, and its commands do what they say."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fake_models import TROUBLE, use_fakes

from pipelines.cli import main
from pipelines.scene_folders import write_data_set

REPOSITORY = Path(__file__).parents[1]
AIRFLOW = Path(sys.prefix) / "airflow" / "bin" / "python"  # its packages and ours do not go together


@pytest.mark.timeout(180)
def test_its_commands_run_and_its_checks_raise_an_alert(tmp_path, monkeypatch, capsys):
    if not AIRFLOW.exists():
        assert os.environ.get("CI") != "true", f"{AIRFLOW} is not there"
        pytest.skip("No Airflow: `make .venv/airflow/installed`")
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
    loader = [str(AIRFLOW), str(REPOSITORY / "tests" / "airflow_loader.py")]
    loader += [str(REPOSITORY / "deploy" / "airflow_dag.py"), json.dumps(parameters)]
    home = {"AIRFLOW_HOME": str(tmp_path / "airflow"), "AIRFLOW__CORE__LOAD_EXAMPLES": "false"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        loader, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **home}
    ) as airflow:
        try:
            assert airflow.stdout is not None
            found = next((line for line in airflow.stdout if line.startswith("commands ")), None)
            assert found is not None, airflow.communicate(timeout=60)[1]
            commands = json.loads(found.removeprefix("commands "))
            lines = {}
            for job, command in commands.items():
                capsys.readouterr()
                assert command.startswith("set -o pipefail; ")
                program, *argv = shlex.split(
                    command.removeprefix("set -o pipefail; ").removesuffix(" | tail -n 1")
                )
                assert (program, main(argv)) == ("diptych", 0)
                lines[job] = capsys.readouterr().out.splitlines()[-1]
            asked = [f"caption 0.0 {lines['caption']}", f"generate 0.05 {lines['generate']}"]
            asked.append(f"generate 0.04 {lines['generate']}")
            said, _ = airflow.communicate("".join(f"{line}\n" for line in asked), timeout=60)
        finally:
            airflow.kill()
    assert sorted(commands) == ["caption", "generate"]
    assert {path.name for path in (tmp_path / "nights").glob("*/*")} == {"2026-11-22"}
    assert [line for line in said.splitlines() if line.startswith("checked ")] == [
        "checked caption: passed",
        "checked generate: passed",
        "checked generate: 1 of 20 rows of generated were rejected: {'model_error': 1}",
    ]
