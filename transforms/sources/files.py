"""Plain image files: a folder, a glob, or files one by one. There are no captions."""

import dataclasses
import hashlib
from collections.abc import Iterator

from fsspec.core import has_magic

from transforms import storage
from transforms.errors import InputError
from transforms.sources import folder
from transforms.sources.base import InputFile, Shard, Source, shard_names
from transforms.sources.draft import Draft, open_draft
from transforms.sources.folder import Member
from transforms.sources.parts import IMAGE_EXTENSIONS, Bad, is_image
from transforms.sources.planned import plan_shards, read_facts
from transforms.storage import relative_name


@dataclasses.dataclass(frozen=True)
class FilesSource(Source):
    """Image files. A row is a file, in the order of the bytes of their paths below `root`.

    A folder gives the files in it and below it that have an image's extension; a glob, or a named file, is
    taken whatever its extension. The key is the path below `root` without the extension (or with it where
    `a.jpg` and `a.png` are both there).

    Attributes:
        urls: Folders, globs and files, all below `root`.
        root: URL of the folder that keys and names are relative to.
    """

    urls: tuple[str, ...]
    root: str

    def inputs(self) -> list[InputFile]:
        """Returns one entry for all the files: their total size, and a digest of their names and sizes."""
        digest = hashlib.sha256()
        total_bytes = 0
        with open_draft() as draft:
            self._list(draft)
            for path, size_bytes in draft.files():
                digest.update(f"{path}\t{size_bytes}\n".encode())
                total_bytes += size_bytes or 0
        return [InputFile(self._name(), total_bytes, digest.hexdigest())]

    def shards(self, plan_folder: str, rows_per_shard: int) -> list[Shard]:
        """Plans the files, or takes up the plan that an earlier run left."""
        [plan_name] = shard_names([self._name()])
        plan = storage.join(plan_folder, f"{plan_name}.arrow")
        names = "\n".join(relative_name(url, self.root) for url in self.urls)
        made_from = {
            "source": type(self).__name__,
            "urls_sha256": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest(),
            "rows_per_shard": rows_per_shard,
        }
        facts = read_facts(plan)
        if facts is None or facts.made_from != made_from:
            with open_draft() as draft:
                self._list(draft)
                draft.list_files()
                facts = draft.publish(plan, made_from, rows_per_shard)
        return plan_shards(plan, facts, plan_name, self.root, None, ())

    def _name(self) -> str:
        names = {relative_name(url, self.root) for url in self.urls}
        return names.pop() if len(names) == 1 and "" not in names else "files"

    def _list(self, draft: Draft) -> None:
        nameless: list[str] = []
        for url in self.urls:
            with storage.input_errors(url):
                nameless += draft.add_files(_below(self.root, url))
        message = "its name is not UTF-8: rename it"
        draft.add(
            Bad(f"{name}: {message}", key=name, reason="missing_image") for name in sorted(set(nameless))
        )
        if not nameless and next(draft.files(), None) is None:
            raise InputError(
                f"There is no image in {', '.join(self.urls)}: expected files ending in "
                f"{', '.join(IMAGE_EXTENSIONS)}. Files with other names are taken from a glob, such as "
                f"{storage.join(self.urls[0], '*')}."
            )


def _below(root: str, url: str) -> Iterator[Member]:
    """Yields the files of a folder, a glob, or a single file, with paths below the root."""
    fs, path = storage.locate(url)
    try:
        found = {path: fs.info(path)}
    except FileNotFoundError:
        if not has_magic(path):
            raise
        found = fs.glob(path, detail=True)
    if path in found and found[path]["type"] == "directory":
        above = relative_name(url, root)
        for member in folder.members(url, sizes=True):
            if is_image(member.path):
                yield member._replace(path=f"{above}/{member.path}" if above else member.path)
        return
    start = len(storage.locate(root)[1].rstrip("/")) + 1
    for name, info in found.items():
        if info["type"] == "file":
            yield Member(name[start:], info["size"])
