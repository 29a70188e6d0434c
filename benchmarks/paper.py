"""Measure each claim of the paper on models at hand, and write ``docs/paper.md``.

    make paper                                  # what is not measured yet; under an hour on two cores, in out/paper
    python benchmarks/paper.py --rows points trivial          # these again
    python benchmarks/paper.py --page                         # only the page, from the stored numbers

A claim is a function that returns numbers and draws a figure. Its numbers are kept in ``docs/paper/numbers.json`` and
its figure beside it. The page is the template ``benchmarks/paper.md`` with these numbers put in: none on it was typed.
The extra ``paper`` has what this needs beside ``dev``: scikit-learn, for its images of digits.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import paper_dynamics
import paper_networks
import paper_smollm2

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE, PAGE, FOLDER = ROOT / "benchmarks/paper.md", ROOT / "docs/paper.md", ROOT / "docs/paper"

Claim = Callable[[Path], Mapping[str, Any]]

CLAIMS: dict[str, Claim] = {
    claim.__name__: claim
    for claim in (
        paper_smollm2.aligned,
        paper_smollm2.tokens,
        paper_smollm2.trajectories,
        paper_smollm2.spectrum,
        paper_smollm2.points,
        paper_smollm2.pythia,
        paper_networks.convergence,
        paper_networks.regulariser,
        paper_networks.vision,
        paper_networks.trivial,
        paper_dynamics.rotation,
        paper_dynamics.exponents,
        paper_dynamics.layers,
    )
}


def stored() -> dict[str, dict[str, Any]]:
    """Return the numbers of each claim measured so far."""
    path = FOLDER / "numbers.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def rounded(value: Any) -> Any:
    """Return numbers with six digits, in whatever holds them."""
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def rendered(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page: the template with each ``{claim[name]:format}`` replaced."""
    return TEMPLATE.read_text(encoding="utf-8").format(**numbers)


def main() -> None:
    """Measure what is missing or asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=CLAIMS, default=[], help="claims to measure again")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    numbers = stored()
    for name, claim in CLAIMS.items():
        if (
            options.page
            or (name in numbers and name not in options.rows)
            or (options.rows and name not in options.rows)
        ):
            continue
        started = time.perf_counter()
        numbers[name] = rounded(claim(FOLDER))
        ordered = {each: numbers[each] for each in CLAIMS if each in numbers}
        (FOLDER / "numbers.json").write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {time.perf_counter() - started:.0f} s, {numbers[name]}", flush=True)
    if missing := [name for name in CLAIMS if name not in numbers]:
        print(f"No page yet: {', '.join(missing)} not measured.")
    else:
        PAGE.write_text(rendered(numbers), encoding="utf-8")
        print(f"The page: {PAGE}")


if __name__ == "__main__":
    main()
