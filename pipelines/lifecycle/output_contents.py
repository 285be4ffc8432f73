"""What an output folder holds, read once before a job decides whether it may write there."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diptych.transforms.errors import InputError, OutputError
from diptych.transforms.finish import Totals, totals_of
from diptych.transforms.output_layout import (
    DATASETS,
    JOB,
    MODEL_STAGES,
    RECORDS,
    SUCCESS,
    RecordKind,
    data_file_sizes,
    data_files,
    list_names,
    read_named_records,
    read_view,
)
from diptych.transforms.storage import is_file, join, locate, output_errors


@dataclasses.dataclass(frozen=True)
class OutputContents:
    """The records and the names of an output folder.

    Attributes:
        jobs: The fingerprints by data set, None where no job owns the folder.
        shown_jobs: What `_job.json` says of them, None where it is not there.
        success: The totals of the data sets that are complete.
        success_records: The data sets that have a record of being complete.
        files: The sizes of the data files in bytes, by data set and name, sorted by shard and number.
        rejects: The names of the files of rejects, by stage.
        is_of_earlier_version: Whether it has no records, as earlier versions left it.
    """

    jobs: Mapping[str, Any] | None = None
    shown_jobs: Mapping[str, Any] | None = None
    success: Mapping[str, Totals] = dataclasses.field(default_factory=dict)
    success_records: frozenset[str] = frozenset()
    files: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    rejects: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    is_of_earlier_version: bool = False

    @classmethod
    def read(cls, root: str) -> "OutputContents":
        """Reads an output folder: each record, and one listing of each folder in it.

        Raises:
            OutputError: The folder is a file, or a record is damaged.
            InputError: Something cannot be read.
        """
        names = _names_in(root)
        records = list_names(join(root, RECORDS)) if RECORDS in names else []
        jobs = read_named_records(root, records, RecordKind.JOB)
        complete = read_named_records(root, records, RecordKind.SUCCESS)
        shown = read_view(root, RecordKind.SUCCESS) if SUCCESS in names else None
        shown_jobs = None
        if not records:
            jobs, complete = read_view(root, RecordKind.JOB), shown
        elif JOB in names:
            with contextlib.suppress(OutputError):  # damaged: it decides nothing, and is made anew
                shown_jobs = read_view(root, RecordKind.JOB)
        # who deletes `_SUCCESS.json`, as people do, wants to have it made again
        finished = {
            name: totals
            for name, totals in (shown or {}).items()
            if name in (complete or {}) and name in DATASETS
        }
        # rejects first: what a run at work commits meanwhile is no orphan then
        stages = list_names(join(root, "rejects")) if "rejects" in names else []
        rejects = {
            stage: data_files(root, join("rejects", stage)) for stage in stages if stage[0] not in "._"
        }
        files = {dataset: data_file_sizes(root, dataset) for dataset in DATASETS if dataset in names}
        return cls(
            jobs,
            shown_jobs,
            totals_of(root, finished),
            frozenset(complete or {}),
            files,
            rejects,
            not records,
        )

    def files_of(self, dataset: str) -> Mapping[str, int]:
        """Returns the sizes of a data set's files by name."""
        return self.files.get(dataset, {})

    def rejects_of(self, dataset: str) -> list[str]:
        """Returns the files of rejects, below the output folder, that belong to a data set.

        Those of its model are in a folder of their own. Of the others, what shares its name with a data file of another
        data set is that one's.
        """
        others = {name for other, names in self.files.items() if other != dataset for name in names}
        own = []
        for stage, names in self.rejects.items():
            folder = join("rejects", stage)
            if stage == MODEL_STAGES.get(dataset):
                own += [join(folder, name) for name in names]
            elif stage not in MODEL_STAGES.values():
                own += [join(folder, name) for name in names if name not in others]
        return own

    def is_complete(self, dataset: str) -> bool:
        """Tells whether a data set has a record of being complete, and its files are those of the record."""
        return dataset in self.success and self.success[dataset].are_of(self.files_of(dataset))

    def others_than(self, dataset: str) -> list[str]:
        """Returns the other data sets, without those whose runs wrote nothing.

        Where the images are the data set in question, the others are made from them.
        """
        jobs = self.jobs or {}
        if dataset == "images" and "images" in jobs:
            return []
        return [name for name in jobs if name != dataset and (self.files_of(name) or self.rejects_of(name))]


def _names_in(root: str) -> set[str]:
    """Returns the names of what is in an output folder; a store that refuses is an error of the output."""
    with output_errors(root):
        try:
            names = set(list_names(root))
        except InputError as error:
            raise error.__cause__ or error from None
        fs, path = locate(root)
        if not names and is_file(fs, path):
            raise OutputError(f"{root} is a file. --output must be a folder; it is made where there is none.")
    return names
