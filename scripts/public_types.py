"""Fail unless the types of at least 95 % of the public names are complete (`pyright --verifytypes`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LEAST = 0.95
PACKAGE = Path(__file__).resolve().parent.parent / "tlcoupling"


def main() -> int:
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "--ignoreexternal"]
    # pyright looks for the package outside the folder that it runs in, and does not follow an editable installation
    with tempfile.TemporaryDirectory() as path, tempfile.TemporaryDirectory() as elsewhere:
        (Path(path) / "tlcoupling").symlink_to(PACKAGE)
        done = subprocess.run(
            [*command, "--verifytypes", "tlcoupling"],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
    report = json.loads(done.stdout)["typeCompleteness"]
    for symbol in report["symbols"]:
        if symbol["isExported"] and not symbol["isTypeKnown"]:
            print(symbol["name"], *(each["message"].splitlines()[0] for each in symbol["diagnostics"]), sep="  ")
    score = report["completenessScore"]
    print(f"{score:.1%} of the exported names have complete types; at least {LEAST:.0%} must.")
    return score < LEAST


if __name__ == "__main__":
    sys.exit(main())
