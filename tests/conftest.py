"""Shared by all tests: shapes checked at run time, one seed, and one loaded SmolLM2.

The import hook has to be there before anything imports tlcoupling: it makes beartype check every
jaxtyping annotation of the library while the tests run.
"""

from jaxtyping import install_import_hook

install_import_hook("tlcoupling", "beartype.beartype")

import json  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from cases import TOKENS, Case  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

import tlcoupling as tlc  # noqa: E402
import tlcoupling.models.smollm2  # noqa: E402

DATA = Path(__file__).parent / "data"

# A busy machine takes longer, and that is no failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests marked `device` run, such as cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the tests marked ``device`` run."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> torch.nn.Module:
    """SmolLM2-135M-Instruct, loaded once: a bridge, where TransformerLens has it. Tests leave it as it was."""
    return tlc.load_model("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_hooked(smollm2: torch.nn.Module) -> torch.nn.Module:
    """SmolLM2-135M-Instruct as a HookedTransformer, on a TransformerLens that has it."""
    if "TransformerBridge" not in type(smollm2).__name__:
        return smollm2
    return tlc.load_model("smollm2-135m", hooked=True)


@pytest.fixture(scope="session")
def smollm2_huggingface() -> torch.nn.Module:
    """SmolLM2-135M-Instruct as HuggingFace has it."""
    return tlcoupling.models.smollm2.smollm2_huggingface()[0]


@pytest.fixture(scope="session")
def prompts() -> dict[str, str]:
    """The named prompts that examples, tests and benchmarks share."""
    return json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Let wrongly typed arguments through to the library's own checks, as they come in a user's hands."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def case_trace(case: Case) -> tlc.Trace:
    """The shared tokens through the case that a test is parametrised with."""
    return tlc.trace(case.model(), TOKENS)
