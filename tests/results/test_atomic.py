"""Files replaced whole or not at all."""

from __future__ import annotations

import os
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
