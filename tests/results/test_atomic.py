"""Files replaced whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tlcoupling.results.atomic import remove_abandoned, replacing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("new, but not all of it")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_the_data_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Otherwise a power cut could leave an empty file under the name."""
    done: list[str] = []
    sync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else os.pread(handle, 9, 0).decode())
        sync(handle)

    def renamed(source: Path, target: Path) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("the data")
    assert done == ["the data", "rename", "folder"]
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644  # mkstemp's own is 0o600


def test_only_what_dead_processes_left_is_removed(tmp_path: Path):
    script = (
        "import sys, os, pathlib\nfrom tlcoupling.results.atomic import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as partial:\n    partial.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")]).returncode == 9
    (left,) = tmp_path.iterdir()
    elsewhere = tmp_path / left.name.replace("@", "@elsewhere.")
    elsewhere.write_text("another host's")
    hour = time.time() - 3700
    with replacing(tmp_path / "mine") as partial:
        for path in (partial, elsewhere):
            os.utime(path, (hour, hour))
        assert remove_abandoned(tmp_path) == 0, "a container of this host's name may still write what is new"
        os.utime(left, (hour, hour))
        assert remove_abandoned(tmp_path) == 1
        assert set(tmp_path.iterdir()) == {partial, elsewhere}
    os.utime(elsewhere, (hour - 24 * 3600, hour - 24 * 3600))
    assert remove_abandoned(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
