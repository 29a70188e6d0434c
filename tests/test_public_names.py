"""The public names: exactly these, and every dotted name that the text mentions exists."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

import tlcoupling as tlc

NAMES = [
    "Analysis",
    "CausalEffect",
    "Check",
    "ContextCoupling",
    "Correlations",
    "CouplingTest",
    "DepthCoupling",
    "DepthProfile",
    "DetachedComparison",
    "DetachedMap",
    "DirectionReadout",
    "EigenGeometry",
    "Estimate",
    "FeatureMap",
    "Growth",
    "HeadAlignment",
    "HeadCoupling",
    "HeadSteps",
    "Interval",
    "JacobianLens",
    "JacobianOperator",
    "LensCoupling",
    "Linearity",
    "LinearizationGap",
    "LyapunovSpectrum",
    "ManyAnalyses",
    "Plan",
    "ProjectedJacobians",
    "SensitivityAtlas",
    "SingularValueProfile",
    "SliceJacobian",
    "SliceRelations",
    "SlurmExecutor",
    "SteeringEffect",
    "SweepReport",
    "SweepStore",
    "TLCouplingError",
    "TokenCoupling",
    "Trace",
    "TrainingMonitor",
    "TrajectoryComponents",
    "TrajectoryRecorder",
    "Triplets",
    "add_direction",
    "analyze",
    "analyze_many",
    "causal_effect",
    "check",
    "compare_detached",
    "context_coupling",
    "correlate",
    "coupling_loss",
    "depth_coupling",
    "depth_profile",
    "detached_map",
    "eigen_geometry",
    "estimate",
    "estimate_atlas",
    "estimate_slice",
    "feature_map",
    "growth",
    "head_alignment",
    "head_coupling",
    "head_steps",
    "jacobian_lens",
    "keep_only",
    "lens_coupling",
    "lens_sweep",
    "linearity",
    "linearization_gap",
    "linearized",
    "load",
    "load_model",
    "lyapunov_spectrum",
    "parity",
    "project_out",
    "projected_jacobians",
    "random_baseline",
    "random_directions",
    "read_directions",
    "residual_jacobian",
    "sensitivity_atlas",
    "singular_value_profile",
    "slice_jacobian",
    "slice_relations",
    "steering_effect",
    "steering_vector",
    "sweep",
    "token_coupling",
    "trace",
    "trajectory_components",
    "truncated_svd",
    "viz",
]
ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("tlcoupling/**/*.py"), *ROOT.glob("demos/*.ipynb")]


def test_the_public_names_are_these():
    assert sorted(tlc.__all__) == NAMES
    assert dir(tlc) == NAMES
    assert all(hasattr(tlc, name) for name in NAMES)


def test_names_that_a_user_imports_from_submodules_are_there():
    for module in ("sweeps", "viz", "viz.figures", "parity", "errors"):
        importlib.import_module(f"tlcoupling.{module}")


def text_of(path: Path) -> str:
    """A file's text; of a notebook, what its cells say, not the pages that they print."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def mentioned() -> dict[str, Path]:
    """Dotted names below the package in the documentation and the sources, with a file that mentions each."""
    found = {}
    for path in TEXTS:
        for name in re.findall(r"(?<![\w./-])(?:tlcoupling|tlc)((?:\.[A-Za-z_]\w*)+)", text_of(path)):
            found.setdefault(f"tlcoupling{name}", path)
    return found


@pytest.mark.parametrize("name", sorted(mentioned()))
def test_a_name_in_the_text_exists(name: str):
    """``tlc.sweep`` is a function: a module of that name would not be reached through it."""
    if name.lower() == "tlcoupling.viz.live":
        pytest.importorskip("anywidget")
    target, path = tlc, "tlcoupling"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        if not hasattr(target, part):
            try:
                importlib.import_module(path)
            except ImportError:
                pytest.fail(f"{mentioned()[name]} mentions {name}: there is no {path}")
        target = getattr(target, part)
