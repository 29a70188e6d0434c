"""Fail unless the types of at least 95 % of the public names are complete (`pyright --verifytypes`)."""

from __future__ import annotations

import json
import subprocess
import sys

LEAST = 0.95


def main() -> int:
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "--ignoreexternal"]
    done = subprocess.run([*command, "--verifytypes", "tlcoupling"], capture_output=True, text=True)
    report = json.loads(done.stdout)["typeCompleteness"]
    for symbol in report["symbols"]:
        if symbol["isExported"] and not symbol["isTypeKnown"]:
            print(symbol["name"], *(each["message"].splitlines()[0] for each in symbol["diagnostics"]), sep="  ")
    score = report["completenessScore"]
    print(f"{score:.1%} of the exported names have complete types; at least {LEAST:.0%} must.")
    return score < LEAST


if __name__ == "__main__":
    sys.exit(main())
