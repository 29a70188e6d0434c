"""Write docs/howto/beside.md: which releases of neighbouring packages install together with tlcoupling.

    python scripts/beside.py             # write the table
    python scripts/beside.py --check     # fail where it differs from what is written

Nothing is installed. Needs ``uv`` (in the extra ``dev``) and a package registry. UV_FIND_LINKS can name a folder with a
build of torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "howto" / "beside.md"
PYTHON, TORCH = "3.11", "2.13.0"
NEIGHBOURS = (
    *("sae-lens", "circuit-tracer", "nnsight", "nnterp", "tuned-lens", "peft", "bitsandbytes", "accelerate"),
    *("wandb", "tensorboard"),
)
COLUMNS = ("transformer-lens", "transformers", "numpy")


def resolved(neighbour: str) -> dict[str, str]:
    """Return the newest releases that install together with tlcoupling and a neighbour; none where none do.

    Raises:
        RuntimeError: uv failed for another reason, such as a registry that does not answer.
    """
    command = ["uv", "--quiet", "pip", "compile", "-", "--python-version", PYTHON, "--no-header", "--no-annotate"]
    given = f"tlcoupling @ {ROOT.as_uri()}\ntorch=={TORCH}\n{neighbour}\n"
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True)
    if done.returncode and "No solution found" not in done.stderr:
        raise RuntimeError(f"uv cannot resolve {neighbour}: {done.stderr}")
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", done.stdout, re.MULTILINE))


def table() -> str:
    lines = [f"| package | newest beside tlcoupling | {' | '.join(COLUMNS)} |", "|---|---|---|---|---|"]
    for neighbour in NEIGHBOURS:
        found = resolved(neighbour)
        versions = [found.get(name, "none") for name in (neighbour, *COLUMNS)]
        lines.append(f"| {' | '.join([neighbour, *versions])} |")
    return "\n".join(lines)


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    page = re.sub(r"^\| package .*(?:\n\|.*)*", lambda _: table(), text, flags=re.MULTILINE)
    if "--check" in sys.argv[1:]:
        print(page if page != text else "docs/howto/beside.md is what uv resolves now")
        return page != text
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
