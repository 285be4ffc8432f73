"""Run by Airflow's Python: loads the example as Airflow does, prints its commands with
their environments, and checks the lines that come back.

python tests/airflow_loader.py deploy/airflow_dag.py '{"images": …}'
"""

import json
import sys

from airflow.dag_processing.dagbag import DagBag

bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
(dag,) = bag.dags.values()
given = {"ds": "2026-11-22", "params": {**dag.params.dump(), **json.loads(sys.argv[2])}}
jobs = [task for task in dag.tasks if hasattr(task, "bash_command")]
assert all(job.append_env and {"bash_command", "env"} <= {*job.template_fields} for job in jobs)
commands = {
    job.task_id: [job.render_template(part, given) for part in (job.bash_command, job.env)] for job in jobs
}
print("commands " + json.dumps(commands), flush=True)
for line in sys.stdin:
    task_id, max_rejected, summary = line.split(" ", 2)
    (check,) = (dag.get_task(name) for name in dag.get_task(task_id).downstream_task_ids)
    try:
        check.python_callable(summary, max_rejected)
        print(f"checked {task_id}: passed")
    except ValueError as error:
        print(f"checked {task_id}: {error}")
