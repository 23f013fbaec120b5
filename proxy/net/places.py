"""How many connections there are, of all workers together: in total, of one user, to one database.

Workers are processes of their own, and the kernel spreads clients among them as it likes; a limit on each
alone would be a limit on chance.  So all share a piece of memory, a file of the supervisor's, with a table
for each worker.  A worker writes to its own table only and reads them all: no locks, and a worker that
crashed takes its numbers with it when its table is cleared.

    table of a worker: `SLOTS` entries of 16 bytes, hash of a name (0: never used), how many

Rules
-----
- Names are found by linear probing and compared by a 64-bit hash.  An entry that has fallen to 0 may be taken
  by another name; the chain behind it stays intact.
- A worker counts itself in before it looks: two at the same moment may both be refused the last place, but
  never both get it.
- A name is looked for in `PROBES` entries, no further: entries keep the hash of a name that has left, and
  clients choose names, so that a search to the first unused entry could one day be one of the whole table.
- Where those are all in use, further names are not counted: their limit does not hold, and nobody is refused
  by mistake.  Thousands of names with open connections at the same time is what that takes.
"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from typing import Final

SLOTS: Final = 8192
PROBES: Final = 128
_SIZE: Final = 16 * SLOTS


class Places:
    """The tables of `workers` processes in `memory`; `number`, from 0, is this one's."""

    def __init__(self, memory: mmap.mmap, number: int, workers: int) -> None:
        words = memoryview(memory).cast("Q")
        self._tables = [words[2 * SLOTS * each : 2 * SLOTS * (each + 1)] for each in range(workers)]
        self._own = self._tables[number]
        self._entries: dict[bytes, int] = {}  # of the names that this worker has counted in
        self.clear(number)

    @classmethod
    def alone(cls) -> Places:
        """Return the places of a process that shares them with none."""
        return cls(mmap.mmap(-1, _SIZE), 0, 1)

    @classmethod
    def shared(cls, path: Path, number: int, workers: int) -> Places:
        """Return those in a file that `prepare` has made."""
        with path.open("r+b") as file:
            return cls(mmap.mmap(file.fileno(), _SIZE * workers), number, workers)

    @staticmethod
    def prepare(path: Path, workers: int) -> None:
        """Make the file; its pages exist only once they are written to."""
        with path.open("wb") as file:
            file.truncate(_SIZE * workers)

    def clear(self, number: int) -> None:
        """Forget what worker `number` has counted: it begins, or is gone."""
        table = self._tables[number]
        table[:] = memoryview(bytes(_SIZE)).cast("Q")

    def enter(self, name: bytes) -> int:
        """Count one in; return how many there are now, in all workers."""
        index = self._entries.get(name)
        hashed = _hash(name)
        if index is None:
            index = self._free(hashed)
            if index is None:
                return 0
            self._own[2 * index + 1] = 0
            self._own[2 * index] = hashed
            self._entries[name] = index
        self._own[2 * index + 1] += 1
        return sum(_count(table, hashed) for table in self._tables)

    def leave(self, name: bytes) -> None:
        """Count one out that was counted in."""
        index = self._entries.get(name)
        if index is None:
            return
        left = self._own[2 * index + 1] - 1
        self._own[2 * index + 1] = left
        if not left:
            del self._entries[name]

    def _free(self, hashed: int) -> int | None:
        """Return the entry of a name, else one that it may take; None: there is none."""
        free = None
        for step in range(PROBES):
            index = (hashed + step) % SLOTS
            found = self._own[2 * index]
            if found == hashed:
                return index
            if free is None and not self._own[2 * index + 1]:
                free = index
            if not found:
                break
        return free


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") or 1


def _count(table: memoryview, hashed: int) -> int:
    for step in range(PROBES):
        index = (hashed + step) % SLOTS
        found = table[2 * index]
        if found == hashed:
            return int(table[2 * index + 1])
        if not found:
            return 0
    return 0
