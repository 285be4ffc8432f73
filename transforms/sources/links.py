"""Links inside an archive, followed without unpacking it."""

import posixpath

_MAX_HOPS = 40
# About 100,000 links, or fewer with long names.
_MAX_BYTES = 64 << 20
_LINK_BYTES = 500
# As the system's own limit; it also bounds the time that a path with many folders takes.
_MAX_PATH_CHARACTERS = 4096


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
        self._targets: dict[str, str] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._targets)

    def add(self, name: str, target: str) -> None:
        """Adds a link.

        Args:
            name: The link's path in the archive.
            target: The path in the archive that it leads to.
        """
        if max(len(name), len(target)) > _MAX_PATH_CHARACTERS:
            return
        self._num_bytes += _LINK_BYTES + len(name) + len(target)
        if self._num_bytes > _MAX_BYTES:
            self.num_passed_over += 1
            return
        self._targets[normalise(name)] = normalise(target)

    def resolve(self, target: str) -> str:
        """Returns the path that a link's target stands for, over other links, also of folders.

        Raises:
            LinkError: The links lead round in a circle.
        """
        path = normalise(target)
        for _ in range(_MAX_HOPS):
            if len(path) > _MAX_PATH_CHARACTERS:
                break
            head, tail = path, ""
            while head and head != "/" and head not in self._targets:
                head, _, last = head.rpartition("/")
                tail = f"/{last}{tail}"
            # tar writes a link to itself for a file that it was given twice
            if self._targets.get(head, head) == head:
                return path
            path = normalise(self._targets[head] + tail)
        raise LinkError("missing_image", f"a link to {target[:100]}, which leads round in a circle of links")

    def resolved(self) -> dict[str, list[str]]:
        """Returns the links' paths by the path of the file that they stand for; circles are left out."""
        names: dict[str, list[str]] = {}
        for name, target in self._targets.items():
            try:
                names.setdefault(self.resolve(target), []).append(name)
            except LinkError:
                continue
        return names


def normalise(name: str) -> str:
    """Returns the one spelling of a member's name that links are matched by."""
    return posixpath.normpath(name)
