"""Where tests lie: tests of ``tlcoupling/a/b.py`` in ``tests/a/test_b.py``; at the top, what concerns many modules."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "tlcoupling"

# Modules that are tested through a caller, whose tests fail when they are wrong.
TESTED_IN = {
    "analysis/summary": "viz/test_page",
    "cli/environment": "cli/test_app",
    "cli/terminal": "cli/test_report",
    "coupling/options": "coupling/test_depth",
    "coupling/context": "coupling/test_token",
    "forward/cache": "forward/test_trace",
    "forward/inputs": "forward/test_split",
    "forward/hooked": "forward/test_user_hooks",
    "forward/lifting": "test_devices",
    "forward/stream": "forward/test_trace",
    "jacobian/analytic": "jacobian/test_engine",
    "jacobian/attention": "jacobian/test_engine",
    "jacobian/autograd": "jacobian/test_engine",
    "jacobian/cost": "coupling/test_schedule",
    "coupling/spectra": "coupling/test_method",
    "jacobian/evidence": "jacobian/test_certificate",
    "jacobian/flow": "slices/test_slice",
    "jacobian/formula": "jacobian/test_engine",
    "jacobian/frozen": "slices/test_detached",
    "jacobian/norms": "jacobian/test_engine",
    "jacobian/parts": "linalg/test_operator",
    "jacobian/readings": "jacobian/test_engine",
    "jacobian/runs": "jacobian/test_engine",
    "jacobian/scores": "jacobian/test_engine",
    "linalg/dense": "linalg/test_svd",
    "linalg/maps": "linalg/test_operator",
    "linalg/stack": "linalg/test_svd",
    "linalg/work": "analysis/test_estimate",
    "memory": "coupling/test_schedule",
    "forward/offline": "models/test_load",
    "progress": "analysis/test_analyze",
    "public": "test_public_names",
    "scores/clusters": "scores/test_correlate",
    "slices/flows": "slices/test_slice",
    "slices/routes": "slices/test_atlas",
    "slices/sites": "slices/test_slice",
    "slices/sweep": "slices/test_atlas",
    "sweeps/entries": "sweeps/test_store",
    "sweeps/plan": "sweeps/test_plan_file",
    "sweeps/shapes": "sweeps/test_forecast",
    "training/in_training": "training/test_monitor",
    "training/loops": "training/test_monitor",
    "training/means": "training/test_monitor",
    "training/record": "training/test_monitor",
    "trajectory/line": "trajectory/test_linearity",
    **{f"viz/figures/{path.stem}": "viz/test_figures" for path in PACKAGE.glob("viz/figures/[!_]*.py")},
    "viz/panes": "viz/test_page",
    "viz/payload": "viz/test_page",
    "viz/plain": "viz/test_page",
    "results/display": "viz/test_shown",
    "results/labelled": "viz/test_shown",
    "viz/plots": "viz/test_shown",
    "viz/thumbnail": "viz/test_shown",
}

# Test files in folders that are named after no module.
OF_SEVERAL_MODULES = {
    "forward/test_saelens": "points, hooks, traces and features, through SAELens itself",
    "sweeps/test_pools": "executors and runs, through Dask, executorlib and MPI",
    "sweeps/test_slurm": "executors and runs, through a real Slurm",
}


def test_each_module_has_its_tests():
    modules = {str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py")}
    modules = {name for name in modules if not name.endswith(("__init__", "__main__"))}
    files = {str(path.relative_to(TESTS).with_suffix("")) for path in TESTS.rglob("test_*.py")}
    own = {name: str(Path(name).parent / f"test_{Path(name).name}") for name in modules}
    assert modules - TESTED_IN.keys() == {name for name, file in own.items() if file in files}
    assert TESTED_IN.keys() <= modules
    assert {*TESTED_IN.values()} <= files


def test_each_file_in_a_folder_is_named_after_a_module():
    packages = {path.parent for path in PACKAGE.rglob("__init__.py")}
    for path in TESTS.rglob("*/test_*.py"):
        name, module = path.relative_to(TESTS), PACKAGE / path.parent.relative_to(TESTS) / path.stem[len("test_") :]
        if name.parts[0] == "smollm2" or str(name.with_suffix("")) in OF_SEVERAL_MODULES:
            continue
        assert module.with_suffix(".py").exists() or module in packages, f"{name} is named after no module"
