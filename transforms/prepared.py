"""Rows of a finished `diptych prepare`, without Beam: what a training reads again and again, in one order.

The order is that of the data files by shard and number, and of the rows in them: it depends on the output alone.
"""

import concurrent.futures
import contextlib
import dataclasses
import posixpath
from collections.abc import Generator, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from diptych.models.errors import one_line
from diptych.transforms.errors import InputError, OutputError
from diptych.transforms.fingerprint import digest
from diptych.transforms.output_layout import (
    JOB,
    SUCCESS,
    RecordKind,
    data_files,
    read_finished,
    read_records,
    shard_of,
)
from diptych.transforms.storage import input_errors, is_file, join, locate

_DATASET = "images"
# Of a row group, so much is made into Arrow at a time
_BATCH_ROWS = 64


@dataclasses.dataclass(frozen=True)
class PreparedImages:
    """The data set `images` of a finished output.

    Attributes:
        url: Of its folder, `OUT/images`.
        files: Names of the data files, in their order.
        num_rows: Rows in all of them.
        fingerprint: 16 hexadecimal digits that stand for everything that decided the rows: input, options, versions.
    """

    url: str
    files: tuple[str, ...]
    num_rows: int
    fingerprint: str

    @classmethod
    def open(cls, url: str) -> "PreparedImages":
        """Opens the output of `diptych prepare`; reads no row yet.

        Args:
            url: `OUT` or `OUT/images`, local or any fsspec URL.

        Raises:
            InputError: There is no such output, it holds no images, or it is not finished.
        """
        root = _root(url)
        if root is None:
            raise InputError(
                f"{url} is not an output of Diptych: it has no {JOB}. Expected the --output of a job."
            )
        try:
            jobs, totals = read_records(root, RecordKind.JOB), read_finished(root)
        except OutputError as error:
            raise InputError(str(error)) from error
        if totals is None:
            raise InputError(
                f"{root} is not finished: it has no {SUCCESS}. Run the command that writes it again; it goes on where "
                "it stopped."
            )
        if _DATASET not in totals:
            raise InputError(f"{root} holds no {_DATASET}. Expected the --output of `diptych prepare`.")
        folder = join(root, _DATASET)
        files = [name for name in data_files(root, _DATASET) if shard_of(name)]
        try:
            num_files, num_rows = int(totals[_DATASET]["files"]), int(totals[_DATASET]["written"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(join(root, SUCCESS), error) from error
        if len(files) != num_files:
            raise InputError(
                f"{folder} has {len(files)} data files, and {SUCCESS} says {num_files}: some were deleted or added. "
                "Run the command that writes it again, or see `diptych verify`."
            )
        return cls(folder, tuple(files), num_rows, digest((jobs or {}).get(_DATASET, {})))

    def rows(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yields all rows, a batch at a time; the next batch is read while one is used.

        Memory does not grow with the data: it holds one row group, which is one chunk of `prepare`, and two batches.

        Args:
            columns: Names of the columns to read.

        Raises:
            InputError: A file is gone, cannot be read, or is damaged; or has no such column.
        """
        return _read_ahead(self._batches(list(columns)))

    def captions(self) -> Iterator[str]:
        """Yields every caption, row by row.

        Raises:
            InputError: As `rows`.
        """
        for batch in self.rows(["captions"]):
            for captions in batch.column(0).to_pylist():
                yield from captions or ()

    def _batches(self, columns: list[str]) -> Generator[pa.RecordBatch, None, None]:
        num_rows = 0
        for name in self.files:
            url = join(self.url, name)
            try:
                with input_errors(url):
                    fs, path = locate(url)
                    with (
                        fs.open(path, "rb") as handle,
                        pq.ParquetFile(handle, pre_buffer=True, page_checksum_verification=True) as file,
                    ):
                        if missing := sorted({*columns} - {*file.schema_arrow.names}):
                            raise InputError(
                                f"{url} has no column {missing[0]!r}. Expected the output of `diptych prepare`."
                            )
                        for batch in file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                            num_rows += len(batch)
                            yield batch.select(columns)
            except (pa.ArrowException, OSError) as error:
                raise _damaged(url, error) from error
        if num_rows != self.num_rows:
            raise InputError(
                f"{self.url} holds {num_rows} rows, and {SUCCESS} says {self.num_rows}: it was changed since. "
                "`diptych verify` names the file at fault."
            )


def is_output(url: str) -> bool:
    """Tells whether a URL is an output of Diptych, `OUT` or `OUT/images`, finished or not.

    Raises:
        InputError: It cannot be found out.
    """
    return _root(url) is not None


def _root(url: str) -> str | None:
    """Returns `OUT` of a URL that is that or `OUT/images`, None of any other."""
    url = url.rstrip("/") or "/"
    parent, _, name = url.rpartition("/")
    for root in [url, *([parent or "."] if name == _DATASET else [])]:
        fs, path = locate(join(root, JOB))
        with input_errors(root):
            fs.invalidate_cache(posixpath.dirname(path))
            if is_file(fs, path):
                return root
    return None


def _damaged(url: str, error: Exception) -> InputError:
    what = one_line(error)
    return InputError(
        f"{url} is damaged ({what}). `diptych verify` names every such file of an output: delete it, and run the "
        "command that writes it again."
    )


def _read_ahead(batches: Generator[pa.RecordBatch, None, None]) -> Iterator[pa.RecordBatch]:
    """Yields the same, having the next one read in a thread meanwhile; never more, so memory stays bounded."""
    with (
        contextlib.closing(batches),  # after the thread is done with it
        concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="read") as thread,
    ):
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch
