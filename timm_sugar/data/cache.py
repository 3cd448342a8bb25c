"""Arrays made from images, kept on disk: the next start, and other runs, map them instead of decoding again."""

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
    """Keeps uint8 arrays in files below `timm_sugar.files.cache_folder()`, one copy for all processes of a machine.

    One process makes an array and renames its file into place, while others that want the same one wait. A file whose
    size or checksum is wrong is made again. Those used longest ago make room for new ones, except where a process has
    them mapped. After the first failure, such as a folder that cannot be written, nothing more is kept or looked up.

    Args:
        limit: Bytes of all files together; 0 keeps nothing.
        say: Takes a line about a wait or a failure.
    """

    def __init__(self, limit: float, say: Callable[[str], None] = lambda line: None):
        self._limit, self._say = limit, say
        try:
            self._folder = cache_folder() / "images"
        except RuntimeError as error:  # a user without a home
            self._give_up(str(error))

    def array(self, key: str | None, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return what `make` returns, from disk where it is kept; what is written to the result stays in this process.

        Args:
            key: Says everything that decides the content; None where that is not known, and nothing is kept.
            shape: Of the array.
            make: Returns it, uint8.
        """
        if key is None or not self._limit:
            return make()
        path = self._folder / hashlib.sha256(f"{key} {shape}".encode()).hexdigest()[:32]
        found = self._map(path, shape)
        if found is not None:
            return found
        with self._alone(path.with_suffix(".part")) as part:
            found = self._map(path, shape)  # another process may have made it meanwhile
            if found is not None:
                return found
            made = make()
            if part is not None:
                self._write(made, part, path)
        found = self._map(path, shape)  # the copy that processes share
        return made if found is None else found

    def _map(self, path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
        """Return the array in a file, None where it is not there or not whole."""
        import fcntl  # Unix only

        size = math.prod(shape)
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # held until the mapping, which has a duplicate of `file`, is gone
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
    def _alone(self, path: Path) -> Iterator[BinaryIO | None]:
        """Open a file for one process at a time, None where that fails; removed at the end if it is still there."""
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
            # Opened anew each time: whoever has the lock renames the file and keeps it mapped, and so locked.
            file = path.open("ab", buffering=0)
            if _locked(file, path):
                return file
            file.close()
            if not told:
                self._say("waiting for another process that decodes the same images")
                told = True
            time.sleep(0.05)

    def _write(self, array: np.ndarray, part: BinaryIO, path: Path) -> None:
        """Write an array to its temporary file and rename that to `path`, where there is room."""
        try:
            if not self._make_room(array.nbytes + 4, besides=Path(part.name)):
                self._say(f"{array.nbytes / 2**30:.1f} GiB of decoded images are not kept: --cache-limit is too small")
                return
            part.truncate(0)
            # No fsync: what a crash of the machine leaves is found by its checksum.
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
    """Lock a file that was opened by its path, unless another process has locked, renamed or removed it."""
    import fcntl

    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False


def _checksum(array: np.ndarray) -> bytes:
    flat = array.reshape(-1)
    with ThreadPoolExecutor(available_cpus()) as pool:  # zlib computes without the interpreter's lock
        sums = [*pool.map(zlib.crc32, (flat[at : at + _PIECE] for at in range(0, len(flat), _PIECE)))]
    return zlib.crc32(np.array(sums, "<u4").tobytes()).to_bytes(4, "little")
