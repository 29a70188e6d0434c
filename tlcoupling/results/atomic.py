"""Atomic file writes: a file is written completely or not at all."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".part"
# No write takes this long. Containers can share a hostname but not their process table, so even on this host a dead
# process id is not proof enough.
_ABANDONED_SECONDS, _ABANDONED_HERE_SECONDS = 24 * 3600.0, 3600.0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on exit, rename that file to ``path`` in one step.

    The data is flushed to disk before the rename, so even a power cut leaves the old file or the new one. The temporary
    name holds the host and process id, which ``remove_abandoned`` reads.

    Args:
        path: the file to write or to replace; its folder must exist.

    Raises:
        OSError: the file cannot be written. ``path`` is then unchanged.
    """
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}@{socket.gethostname()}-{os.getpid()}-", suffix=PARTIAL
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _to_disk(temporary, os.O_RDWR)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    with suppress(OSError):  # a file system that cannot sync a folder
        _to_disk(path.parent, os.O_RDONLY)


def remove_abandoned(folder: Path) -> int:
    """Delete the temporary files of killed processes in a folder, and return their number.

    A file from this host is deleted once its process is dead and it is an hour old. A file from another host is deleted
    once it is a day old.
    """
    removed, here = 0, socket.gethostname()
    for temporary in folder.glob(f".*{PARTIAL}"):
        owner = temporary.name.rpartition("@")[2].rpartition("-")[0]
        host, _, process = owner.rpartition("-")
        try:
            age = time.time() - temporary.stat().st_mtime
            if host == here and process.isdigit():
                abandoned = age > _ABANDONED_HERE_SECONDS and not _is_alive(int(process))
            else:
                abandoned = age > _ABANDONED_SECONDS
            if abandoned:
                temporary.unlink()
                removed += 1
        except FileNotFoundError:
            continue  # another process deleted it, or its writer has just renamed it
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
