"""What a job left."""

import dataclasses
from collections.abc import Collection

from diptych.pipelines.lifecycle.output_folder import State
from diptych.transforms import errors
from diptych.transforms.finish import Totals, read_success


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        output: The output folder.
        state: What it held before.
        totals: By data set that the job wrote.
        ran: Whether the job ran, rather than being translated for a service and not sent (`--dry_run`).
    """

    output: str
    state: State
    totals: dict[str, Totals]
    ran: bool = True

    @classmethod
    def of(cls, output: str, state: State, datasets: Collection[str], ran: bool = True) -> "Result":
        """Returns the result of a job that has finished some data sets.

        Raises:
            OutputError: It has, but there is no record of it any more.
        """
        found = read_success(output) or {}
        if ran and (gone := [dataset for dataset in datasets if dataset not in found]):
            raise errors.OutputError(
                f"{output} was finished by this run, but the record of its {', '.join(gone)} is gone since: another "
                "run took the output with --overwrite. What is there now is that run's."
            )
        return cls(output, state, {dataset: found.get(dataset, Totals()) for dataset in datasets}, ran)
