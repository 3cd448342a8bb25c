"""Disk cache of decoded images: later and concurrent runs map the arrays instead of decoding again."""

import hashlib
import math
import mmap
import os
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..files import cache_folder
from .images import available_cpus

_PIECE = 2**24


class ArrayCache:
    """Cache of uint8 arrays in files below `timm_sugar.files.cache_folder()`, shared by all processes of a machine.

    One process computes an array and renames its file into place, while others that need it wait. A file with a wrong
    size or checksum is computed again. The least recently used files are evicted, unless a process has them mapped.
    The first failure, such as a folder that is not writable, disables the cache.

    Args:
        limit: Total size of all files in bytes; 0 disables the cache.
        say: Called with a message about a wait or a failure.
    """

    def __init__(self, limit: float, say: Callable[[str], None] = lambda line: None):
        self._limit, self._say = limit, say
        try:
            self._folder = cache_folder() / "images"
        except RuntimeError as error:  # a user without a home directory
            self._give_up(str(error))

    def array(self, key: str | None, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the result of `make`, from the cache if possible, as a private copy of this process.

        Args:
            key: Identifies the content completely; None skips the cache.
            shape: Shape of the array.
            make: Function that computes the uint8 array.
        """
        if key is None or not self._limit:
            return make()
        path = self._folder / hashlib.sha256(f"{key} {shape}".encode()).hexdigest()[:32]
        found = self._map(path, shape)
        if found is not None:
            return found
        with self._exclusive(path.with_suffix(".part")) as part:
            found = self._map(path, shape)  # another process may have written it meanwhile
            if found is not None:
                return found
            made = make()
            if part is not None:
                self._write(made, part, path)
        found = self._map(path, shape)  # the mapping shared by processes
        return made if found is None else found

    def _map(self, path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
        """Map the array in a file; None if the file does not exist or is damaged."""
        import fcntl  # Unix only

        size = math.prod(shape)
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # held as long as the mapping, which duplicates the descriptor
                if os.fstat(file.fileno()).st_size == size + 4:
                    content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
                    if content[size:].tobytes() == _checksum(content[:size]):
                        with suppress(OSError):
                            os.utime(path)
                        return content[:size].reshape(shape)
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up(error.strerror)
            return None
        self._say(f"{path} is damaged; the images are decoded again")
        return None

    @contextmanager
    def _exclusive(self, path: Path) -> Iterator[BinaryIO | None]:
        """Open and lock a file, and remove it at the end if it still exists; None if that fails."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = self._lock(path)
        except OSError as error:
            self._give_up(error.strerror)
            yield None
            return
        with file:
            try:
                yield file
            finally:
                with suppress(OSError):
                    if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                        path.unlink()

    def _lock(self, path: Path) -> BinaryIO:
        told = False
        while True:
            # Reopen it each time: the lock holder renames the file and keeps it mapped, and so locked.
            file = path.open("ab", buffering=0)
            if _locked(file, path):
                return file
            file.close()
            if not told:
                self._say("waiting for another process that decodes the same images")
                told = True
            time.sleep(0.05)

    def _write(self, array: np.ndarray, part: BinaryIO, path: Path) -> None:
        """Write an array to its temporary file and rename that to `path`, if it fits into the cache."""
        try:
            if not self._make_room(array.nbytes + 4, besides=Path(part.name)):
                self._say(f"{array.nbytes / 2**30:.1f} GiB of decoded images are not kept: --cache-limit is too small")
                return
            part.truncate(0)
            # No fsync: the checksum detects files that a system crash damaged.
            for piece in (array.reshape(-1).data, memoryview(_checksum(array))):
                while piece:
                    piece = piece[part.write(piece) :]
            os.replace(part.name, path)
        except OSError as error:
            self._give_up(error.strerror)

    def _make_room(self, size: int, besides: Path) -> bool:
        if size > self._limit:
            return False
        files = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        room = self._limit - size - sum(used for _, used, path in files if path != besides)
        for _, used, path in sorted(files):
            if room < 0 and path != besides:
                with suppress(OSError), path.open("rb") as file:
                    if _locked(file, path):
                        path.unlink()
                        room += used
        return room >= 0

    def _give_up(self, reason: str | None) -> None:
        if self._limit:
            self._say(f"decoded images are not kept for the next start: {reason}")
        self._limit = 0


def _locked(file: BinaryIO, path: Path) -> bool:
    """Try to lock an open file; fail if another process has locked, renamed or removed it."""
    import fcntl

    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False


def _checksum(array: np.ndarray) -> bytes:
    flat = array.reshape(-1)
    with ThreadPoolExecutor(available_cpus()) as pool:  # zlib releases the GIL
        sums = [*pool.map(zlib.crc32, (flat[at : at + _PIECE] for at in range(0, len(flat), _PIECE)))]
    return zlib.crc32(np.array(sums, "<u4").tobytes()).to_bytes(4, "little")
