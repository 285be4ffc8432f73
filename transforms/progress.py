"""How far this process is: transforms tell it, the command line shows it. On a remote worker nobody looks."""

import dataclasses
import threading


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Progress at one moment.

    Attributes:
        rows: Rows committed, also by earlier runs.
        resumed: Rows of those that were found committed.
        rejects: Rows rejected, also by earlier runs.
        shards: Shards done, with the fraction of those that are being read.
    """

    rows: int = 0
    resumed: int = 0
    rejects: int = 0
    shards: float = 0.0


class Progress:
    """Counts of one process, from any of its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.start()

    def start(self) -> None:
        """Begins anew, for another run in the same process."""
        with self._lock:
            self._rows = self._resumed = self._rejects = 0
            self._fractions: dict[str, float] = {}
            self._num_chunks: dict[str, int] = {}

    def committed(self, shard: str, index: int, read: int, rejected: int, resumed: bool = False) -> None:
        """Adds the rows of a chunk that is safe in the output; one that a runner replays is added once."""
        with self._lock:
            if index < self._num_chunks.get(shard, 0):
                return
            self._num_chunks[shard] = index + 1
            self._rows += read
            self._rejects += rejected
            self._resumed += read if resumed else 0

    def reading(self, shard: str, fraction: float) -> None:
        """Sets how much of a shard is done, 0 to 1."""
        with self._lock:
            self._fractions[shard] = min(max(fraction, 0.0), 1.0)

    def snapshot(self) -> Snapshot:
        """Returns the counts as they are."""
        with self._lock:
            return Snapshot(self._rows, self._resumed, self._rejects, sum(self._fractions.values()))


progress = Progress()
