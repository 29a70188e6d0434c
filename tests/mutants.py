"""Break single lines of the sources on purpose, and check that a test notices each break.

``make mutants`` applies the breaks of ``breaks.py`` one at a time to a copy of the repository and runs the tests that
should notice. If they all pass, the tests of the whole folder run. A break that no test notices is a gap in the tests:
write the test that is missing, in the test file of the broken module.

``make mutants BREAKS='stream dropped'`` tries only the breaks whose file or description contains one of the words.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from breaks import BREAKS, Break

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "out", "site", "*.ipynb")
# A fork of a process that has imported these starts ten times faster. The package itself is imported by each fork.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "transformer_lens", "pandas", "scipy.stats", "hypothesis", "pytest"])


class Failures:
    """A plugin of pytest that collects what failed."""

    def __init__(self) -> None:
        self.tests: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.tests.append(report.nodeid)


def main(words: Sequence[str]) -> int:
    """Try the breaks, print a table, and return 0 if a test noticed each of them."""
    chosen = [one for one in BREAKS if not words or any(word in f"{one.file} {one.slip}" for word in words)]
    stale = [reason for one in chosen if (reason := one.stale(ROOT)) is not None]
    if stale or not chosen:
        print("\n".join(stale) or "no such break")
        return 1
    with tempfile.TemporaryDirectory(prefix="tlcoupling-mutants-") as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
        noticed = {one: _noticed_by(one, copy) for one in chosen}
        survivors = [one for one, test in noticed.items() if test is None]
        # A test that also fails on the whole sources has noticed nothing.
        failures = failures_of(copy, [test for test in noticed.values() if test is not None])
    for test in failures:
        print(f"fails without any break: {test}")
    for one in survivors:
        print(f"nothing notices: {one.file}: {one.slip}")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} breaks are noticed")
    return 1 if survivors or failures else 0


def _noticed_by(one: Break, copy: Path) -> str | None:
    """Apply one break to the copy, print its line of the table, and return the first test that fails."""
    started = time.perf_counter()
    path, whole = copy / one.file, (copy / one.file).read_text(encoding="utf-8")
    path.write_text(whole.replace(one.old, one.new), encoding="utf-8")
    folder = Path("tests") / Path(one.file).relative_to("tlcoupling").parent
    for tests in (one.tests, [str(folder)]):
        if failures := failures_of(copy, tests):
            break
    path.write_text(whole, encoding="utf-8")
    test = failures[0] if failures else None
    seconds = time.perf_counter() - started
    print(f"{one.file} | {one.slip} | {test or 'NOTHING'} | {seconds:.0f} s", flush=True)
    return test


def failures_of(copy: Path, tests: Sequence[str]) -> list[str]:
    """Run tests in the copy until one fails, in a process of their own, and return what failed.

    Raises:
        RuntimeError: the tests could not be run.
    """
    if not tests:
        return []
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run_tests, args=(str(copy), [*tests], sender))
    process.start()
    sender.close()
    try:
        code, failures = receiver.recv()
    except EOFError:
        code, failures = "a crash", []
    process.join()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the tests {', '.join(tests)} could not be run: {code!r}")
    return failures


def _run_tests(copy: str, tests: list[str], sender: Connection) -> None:
    os.chdir(copy)
    sys.path.insert(0, copy)
    os.environ["PYTHONPATH"] = copy  # of the processes that tests start
    sys.dont_write_bytecode = False  # the copy goes through the compiler once, not once a break
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    failures = Failures()
    # With one seed, hypothesis draws the same examples every time.
    options = ["--exitfirst", "--quiet", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    code = pytest.main([*options, *tests], plugins=[failures])
    package = Path(str(sys.modules["tlcoupling"].__file__))
    assert package.is_relative_to(copy), f"{package} was tested, not the copy"
    sender.send((code, failures.tests))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
