"""Files that are written whole or not at all, whatever ends the process."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".part"
# No file is written for as long. Of a host's own processes it can be asked whether they live, but containers may share
# a host's name and not its processes.
_ABANDONED_SECONDS, _ABANDONED_HERE_SECONDS = 24 * 3600.0, 3600.0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; on leaving, what was written takes the place of ``path`` in one step.

    It is on the disk before it takes that place, so that even a power cut leaves the old file or the new one. Its name
    holds the host and the process, by which ``remove_abandoned`` knows what a killed process left.

    Args:
        path: the file to write or to replace; its folder must exist.

    Raises:
        OSError: it cannot be written; ``path`` is then as it was.
    """
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}@{socket.gethostname()}-{os.getpid()}-", suffix=PARTIAL
    )
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        _to_disk(partial, os.O_RDWR)
        partial.chmod(0o644)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    with suppress(OSError):  # a file system that cannot sync a folder
        _to_disk(path.parent, os.O_RDONLY)


def remove_abandoned(folder: Path) -> int:
    """Remove what killed processes left in a folder, and say how many files that was.

    A file of this host goes when its process is gone and it is an hour old; one of another host when it is a day old.
    """
    removed, here = 0, socket.gethostname()
    for partial in folder.glob(f".*{PARTIAL}"):
        owner = partial.name.rpartition("@")[2].rpartition("-")[0]
        host, _, process = owner.rpartition("-")
        try:
            age = time.time() - partial.stat().st_mtime
            if host == here and process.isdigit():
                gone = age > _ABANDONED_HERE_SECONDS and not _is_alive(int(process))
            else:
                gone = age > _ABANDONED_SECONDS
            if gone:
                partial.unlink()
                removed += 1
        except FileNotFoundError:
            continue  # another process tidies too, or the file has just taken its place
    return removed


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _to_disk(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
