"""Links inside an archive, followed without unpacking it."""

import posixpath
from typing import NamedTuple

_MAX_HOPS = 40
# About 100,000 links, or fewer with long names.
_MAX_BYTES = 64 << 20
_LINK_BYTES = 500
# As the system's own limit; it also bounds the time that a path with many folders takes.
_MAX_PATH_CHARACTERS = 4096


class Link(NamedTuple):
    """What a member of an archive that is a link says.

    Attributes:
        target: The path in the archive that it leads to.
        before: Of a hard link, where it lies: of several members of the target's name, it is the last before that. None
            of a symbolic link, which is the last of all.
    """

    target: str
    before: int | None = None

    def may_be(self, offset: int) -> bool:
        """Tells whether a member of the target's name may be the one that is meant, by where it lies."""
        return self.before is None or offset < self.before


class LinkError(Exception):
    """A link in an archive that leads to no file that can be read.

    Attributes:
        reason: `missing_image` where there is no such file, else `record_corrupt`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Links:
    """The links of an archive, as far as they fit in 64 MiB.

    Attributes:
        num_passed_over: Links that did not fit; they lead nowhere.
    """

    def __init__(self) -> None:
        self.num_passed_over = 0
        self._targets: dict[str, Link] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._targets)

    def add(self, name: str, link: Link) -> None:
        """Adds a link by its path in the archive."""
        if max(len(name), len(link.target)) > _MAX_PATH_CHARACTERS:
            return
        self._num_bytes += _LINK_BYTES + len(name) + len(link.target)
        if self._num_bytes > _MAX_BYTES:
            self.num_passed_over += 1
            return
        self._targets[normalise(name)] = link._replace(target=normalise(link.target))

    def resolve(self, target: str) -> str:
        """Returns the path that a link's target stands for, over other links, also of folders.

        Raises:
            LinkError: The links lead round in a circle.
        """
        path = normalise(target)
        for _ in range(_MAX_HOPS + 1):
            if len(path) > _MAX_PATH_CHARACTERS:
                break
            head, tail = path, ""
            while head and head != "/" and head not in self._targets:
                head, _, last = head.rpartition("/")
                tail = f"/{last}{tail}"
            # tar writes a link to itself for a file that it was given twice
            if head not in self._targets or self._targets[head].target == head:
                return path
            path = normalise(self._targets[head].target + tail)
        raise LinkError(
            "missing_image",
            f"a link to {target[:100]}, which leads round in a circle of links, or over more than {_MAX_HOPS}",
        )

    def resolved(self) -> dict[str, list[tuple[str, Link]]]:
        """Returns the links and their paths by the path of the file that they stand for; circles are left out."""
        names: dict[str, list[tuple[str, Link]]] = {}
        for name, link in self._targets.items():
            try:
                names.setdefault(self.resolve(link.target), []).append((name, link))
            except LinkError:
                continue
        return names


def normalise(name: str) -> str:
    """Returns the one spelling of a member's name that links are matched by."""
    return posixpath.normpath(name)
