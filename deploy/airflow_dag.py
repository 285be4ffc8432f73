"""An example for Apache Airflow 3: each night, captions of the images and images of the prompts that are new.

Put it into Airflow's folder of DAGs and set the parameters below; `diptych` must be installed where its tasks run. A
task that died, or ran out of time, is begun again by Airflow with the same command, which goes on where it stopped. An
earlier night that is not complete stops the next. Each command prints one line for machines, of which the checks raise
an alert where too many rows were rejected, though the command itself succeeded.
"""

import datetime
import json

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Param, task

with DAG(
    "diptych_nightly",
    description="Captions and images of what is new",
    schedule="0 3 * * *",
    start_date=datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    catchup=False,
    max_active_runs=1,
    default_args={
        "retries": 3,
        "retry_delay": datetime.timedelta(minutes=5),
        "execution_timeout": datetime.timedelta(hours=6),
    },
    params={
        "images": Param("gs://bucket/prepared", type="string", description="output of `diptych prepare`"),
        "prompts": Param("gs://bucket/prompts/*.jsonl", type="string"),
        "outputs": Param("gs://bucket/nights", type="string", description="folder of what each night makes"),
        "captioner": Param("cnn-lstm:gs://bucket/models/captioner", type="string"),
        "generator": Param("gan:gs://bucket/models/gan", type="string"),
        "flags": Param("", type="string", description="for every command, such as those of a runner"),
        "max_rejected": Param(0.05, type="number", description="share of the rows that may be rejected"),
    },
) as dag:

    @task(retries=0)
    def check(line: str, max_rejected: str) -> None:
        """Fails where a job lost more rows than it may, and says why they were."""
        for dataset, totals in json.loads(line)["datasets"].items():
            rejected = sum(totals["rejected"].values())
            if rejected > float(max_rejected) * totals["read"]:
                raise ValueError(
                    f"{rejected} of {totals['read']} rows of {dataset} were rejected: {totals['rejected']}"
                )

    for job, source, model, extra in (
        ("caption", '--input="$IMAGES"', "captioner", ""),
        ("generate", '--prompts="$PROMPTS"', "generator", " --format prompts"),
    ):
        made = BashOperator(
            task_id=job,
            # Parameters come by the environment: in the text of a command, a quote or $(…) in one would be run. Of
            # `flags` the shell makes words and nothing else (-f). The last line of all that is printed is what the
            # check gets.
            bash_command=f'set -f -o pipefail; diptych {job} {source} --output="$OUTPUTS/{job}/$NIGHT" '
            f'--model="$MODEL" --skip_done_in="$OUTPUTS/{job}/*" --summary json --quiet $FLAGS{extra} | tail -n 1',
            env={
                "IMAGES": "{{ params.images }}",
                "PROMPTS": "{{ params.prompts }}",
                "OUTPUTS": "{{ params.outputs }}",
                "MODEL": f"{{{{ params.{model} }}}}",
                "FLAGS": "{{ params.flags }}",
                "NIGHT": "{{ ds }}",
            },
            append_env=True,
        )
        check.override(task_id=f"check_{job}")(made.output, "{{ params.max_rejected }}")
