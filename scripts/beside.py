"""Which releases of neighbouring packages install and run with tlcoupling: docs/howto/beside.md, and its tests.

    python scripts/beside.py                       # resolve the releases, and write the table; installs nothing
    python scripts/beside.py --check               # fail where it differs from what is written
    python scripts/beside.py --run peft nnsight    # install these rows of the table, and run their tests
    python scripts/beside.py --run all

A row is installed in an environment of its own, ``.venv-beside/NAME``, on top of the environment that runs this
script: only what differs from that is installed. A test that is skipped is a failure here. Needs ``uv`` (in the extra
``dev``) for the table, and a package registry. UV_FIND_LINKS can name a folder with a build of torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "howto" / "beside.md"
PYTHON, TORCH = "3.11", "2.13.0"
COLUMNS = ("transformer-lens", "transformers", "numpy")


@dataclass(frozen=True)
class Neighbour:
    """A package, what it needs besides to run, and the tests where it meets tlcoupling, as pytest's arguments."""

    name: str
    tests: str
    needs: tuple[str, ...] = ()


_ROWS = (
    Neighbour("sae-lens", "tests/forward/test_saelens.py"),
    Neighbour("circuit-tracer", "tests/test_beside.py -k circuit_tracer"),
    Neighbour("nnsight", "tests/test_beside.py -k nnsight"),
    # imports what nnsight 0.8 has removed
    Neighbour("nnterp", "tests/test_beside.py -k nnterp", ("nnsight<0.8",)),
    # asks for HookedTransformer
    Neighbour("tuned-lens", "tests/test_beside.py -k tuned_lens", ("transformer-lens<4",)),
    Neighbour("peft", "tests/forward/test_bare.py -k lora"),
    Neighbour("bitsandbytes", "tests/forward/test_quantised.py -k 'not torchao'"),
    Neighbour("torchao", "tests/forward/test_quantised.py -k torchao"),
    Neighbour("llm-microscope", "tests/dynamics/test_depth_profile.py -k microscope"),
    Neighbour("accelerate", "tests/forward/test_offload.py tests/training/test_monitor.py -k 'offload or trainer'"),
    Neighbour("wandb", "tests/test_beside.py -k wandb"),
    Neighbour("tensorboard", "tests/test_beside.py -k tensorboard"),
    Neighbour("plotly", "tests/test_beside.py -k plotly"),
    Neighbour("distributed", "tests/sweeps/test_pools.py -k dask"),
    Neighbour("executorlib", "tests/sweeps/test_pools.py -k executorlib"),
    Neighbour("mpi4py", "tests/sweeps/test_pools.py -k mpi"),
)
NEIGHBOURS = {one.name: one for one in _ROWS}


def resolved(neighbour: Neighbour) -> dict[str, str]:
    """Return the newest releases that install together with tlcoupling and a neighbour; none where none do.

    Raises:
        RuntimeError: uv failed for another reason, such as a registry that does not answer.
    """
    command = ["uv", "--quiet", "pip", "compile", "-", "--python-version", PYTHON, "--no-header", "--no-annotate"]
    given = "\n".join([f"tlcoupling @ {ROOT.as_uri()}", f"torch=={TORCH}", neighbour.name, *neighbour.needs])
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True)
    if done.returncode and "No solution found" not in done.stderr:
        raise RuntimeError(f"uv cannot resolve {neighbour.name}: {done.stderr}")
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", done.stdout, re.MULTILINE))


def table() -> str:
    lines = [f"| package | newest beside tlcoupling | {' | '.join(COLUMNS)} | tests |", "|---|---|---|---|---|---|"]
    for neighbour in NEIGHBOURS.values():
        found = resolved(neighbour)
        needed = [re.match(r"[\w.-]+", one)[0] for one in neighbour.needs]  # pyright: ignore[reportOptionalSubscript]
        also = [f"{name} {found[name]}" for name in needed if name not in COLUMNS and name in found]
        version = ", ".join([found.get(neighbour.name, "none"), *also])
        versions = [found.get(name, "none") for name in COLUMNS]
        lines.append(f"| {' | '.join([neighbour.name, version, *versions])} | `{neighbour.tests}` |")
    return "\n".join(lines)


def requirements(name: str) -> list[str]:
    """Return what the page's row says to install, as pip takes it."""
    cells = re.search(rf"^\| {name} \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    if cells is None:
        raise SystemExit(f"docs/howto/beside.md has no row of {name!r}: one of {', '.join(NEIGHBOURS)}")
    version, *versions, _ = cells[1].split(" | ")
    own, *also = version.split(", ")
    pinned = [f"{column}=={one}" for column, one in zip(COLUMNS, versions, strict=True)]
    return [f"{name}=={own}", *(one.replace(" ", "==") for one in also), *pinned]


def run(name: str) -> float:
    """Install a row and run its tests; return the seconds that it took.

    Raises:
        SystemExit: the row does not install, or a test failed or was skipped.
    """
    began, folder = time.perf_counter(), ROOT / ".venv-beside" / name
    venv.create(folder, clear=True)
    base, own = (Path(prefix) / "lib" / f"python{PYTHON}" / "site-packages" for prefix in (sys.prefix, folder))
    (own / "base.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    # torch is a requirement too, so that it stays the build that the base has
    _must([*install, f"torch=={TORCH}", *requirements(name)], f"{name}: not installed")
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    tests = [python, "-m", "pytest", "-q", *shlex.split(NEIGHBOURS[name].tests)]
    shown = _must(tests, f"{name}: tests failed", environment)
    if not re.search(r"^\d+ passed[^,]*(, \d+ (deselected|warnings?))*", shown, re.MULTILINE) or " skipped" in shown:
        raise SystemExit(f"{name}: tests were skipped\n{shown[-2000:]}")
    return time.perf_counter() - began


def _must(command: Sequence[str], failed: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{failed}\n{done.stdout[-4000:]}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--run", nargs="+", metavar="NAME")
    options = parser.parse_args()
    if options.run:
        for name in NEIGHBOURS if options.run == ["all"] else options.run:
            print(f"{name}: {run(name):.0f} s", flush=True)
        return 0
    text = PAGE.read_text(encoding="utf-8")
    page = re.sub(r"^\| package .*(?:\n\|.*)*", lambda _: table(), text, flags=re.MULTILINE)
    if options.check:
        print(page if page != text else "docs/howto/beside.md is what uv resolves now")
        return page != text
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
