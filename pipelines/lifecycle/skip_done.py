"""What a nightly job leaves out: rows that the outputs of earlier nights have."""

from collections.abc import Iterator

from fsspec.core import has_magic

from diptych.models.files.location import redacted
from diptych.pipelines.options.models import ModelJobOptions
from diptych.pipelines.terminal.console import console
from diptych.transforms.errors import InputError
from diptych.transforms.finish import read_success
from diptych.transforms.output_layout import MODEL_STAGES, data_files
from diptych.transforms.skip_done import write_done_keys
from diptych.transforms.storage import exists, glob, input_errors, is_same_place, join, locate


def check_earlier(options: ModelJobOptions, dataset: str, plan_folder: str) -> None:
    """Checks the earlier outputs before the run's own is touched, unless an earlier start of the run has used them.

    Raises:
        InputError: One is not there, or not complete.
    """
    if not options.skip_done_in or dataset in (read_success(options.output) or {}):
        return
    fs, path = locate(_keys(plan_folder, dataset))
    if not exists(fs, path):
        for _ in _earlier_files(options, dataset):
            pass


def find_done(options: ModelJobOptions, dataset: str, plan_folder: str) -> str | None:
    """Returns the URL of the keys that a run leaves out, brought together at its first start; None where it does not.

    Raises:
        InputError: An earlier output is not there, or not complete.
        OutputError: They cannot be written.
    """
    if not options.skip_done_in:
        return None
    url = _keys(plan_folder, dataset)
    fs, path = locate(url)
    if not exists(fs, path):  # else of the run that this one goes on with
        write_done_keys(_earlier_files(options, dataset), url)
    return url


def _keys(plan_folder: str, dataset: str) -> str:
    return join(plan_folder, f"done-{dataset}.keys")


def _earlier_files(options: ModelJobOptions, dataset: str) -> Iterator[str]:
    """Yields the data files of the earlier outputs, and those of the rows that their models rejected.

    Those would be rejected again, night after night.
    """
    for root in _earlier_outputs(options):
        totals = (read_success(root) or {}).get(dataset)
        names = data_files(root, dataset)
        if totals is None or totals.files != len(names):
            raise InputError(
                f"--skip_done_in names {root}, which holds no {dataset}, or not all: its run has not finished, or "
                "files were deleted since. Were this run to go on, rows could be made twice: run that one's command "
                "again first, or leave it out."
            )
        if totals.written:
            yield from (join(root, dataset, name) for name in names)
        if totals.rejected:
            folder = join("rejects", MODEL_STAGES[dataset])
            yield from (join(root, folder, name) for name in data_files(root, folder))


def _earlier_outputs(options: ModelJobOptions) -> list[str]:
    """Returns the outputs that are named, without the run's own; on the first night a glob may name none."""
    found: dict[str, None] = {}
    for url in options.skip_done_in:
        with input_errors(url):
            fs, path = locate(url)
            if has_magic(path):
                fs.invalidate_cache()
                matches = glob(fs, path).items()
                named = [
                    str(fs.unstrip_protocol(name)) for name, info in matches if info["type"] == "directory"
                ]
                found.update(dict.fromkeys(named))
                if not named:
                    console.line(f"--skip_done_in {redacted(url)} names no earlier output yet.")
            else:
                found[url] = None
    return [root for root in found if not is_same_place(root, options.output)]
