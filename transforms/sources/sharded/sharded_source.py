"""What the formats have in common whose files are shards."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from diptych.transforms.sources.archives.shard_file import input_files
from diptych.transforms.sources.base import InputFile, Shard, Source, shard_names


@dataclasses.dataclass(frozen=True)
class ShardedSource(Source):
    """Files that are shards: a worker reads one from its start to its end.

    Attributes:
        urls: The files, sorted.
        root: The input root; shards are named by their path below it.
        metadata_columns: Columns, features or fields to keep as metadata.
    """

    urls: tuple[str, ...]
    root: str
    metadata_columns: tuple[str, ...] = ()

    column_flags: ClassVar[frozenset[str]] = frozenset(
        {"image_column", "caption_column", "key_column", "metadata_columns"}
    )

    @abc.abstractmethod
    def shard(self, name: str, file: InputFile, url: str) -> Shard:
        """Returns the shard of a file."""

    def check(self, shards: Sequence[Shard]) -> None:
        """Checks the first shards for the columns that the user names.

        Raises:
            OptionError: A column is missing or of a type that cannot be used.
        """

    def inputs(self) -> list[InputFile]:
        """Returns the files with their sizes."""
        return input_files(self.urls, self.root)

    def shards(self, plan_folder: str, rows_per_shard: int) -> list[Shard]:
        """Returns a shard for each file; needs no plan."""
        files = self.inputs()
        names = shard_names(file.name for file in files)
        shards = [self.shard(*each) for each in zip(names, files, self.urls, strict=True)]
        self.check(shards)
        return shards
