"""What is measured on a device is what the host measures; the work is done there; nothing changes between two calls.

``pytest -m device --device cuda`` runs these on a GPU. On the CPU they compare the host with itself.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case
from devices import MEASUREMENTS, require_same

import tlcoupling as tlc
from tlcoupling.linalg.krylov import krylov_svd
from tlcoupling.linalg.maps import Projection
from tlcoupling.memory import free_memory

pytestmark = pytest.mark.device

# gated, rotary, grouped queries; learned positions; parallel; soft-caps and norms behind; QK-norm; experts by autograd
_NAMES = [
    *("bridge-llama", "bridge-gpt2", "bridge-pythia", "bridge-gemma2", "bridge-qwen3", "bridge-mixtral"),
    *("hooked-gated", "hooked-parallel", "hooked-layernorm"),
]
ON = [case for name in _NAMES for case in CASES if case.name == name]
FIRST = pytest.mark.parametrize("case", ON[:1], ids=str)
# An SVD may turn the sign of a pair of vectors, and another library may turn another one.
SIGNED = {"read directions", "components"}


@pytest.fixture(params=ON, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def on(device: torch.device, case: Case, dtype: torch.dtype = torch.float64) -> Any:
    """A case's model on the device."""
    return case.build(dtype).eval().to(device)


def tensors(result: Any) -> dict[str, torch.Tensor]:
    values = {each.name: getattr(result, each.name) for each in fields(result)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


@FIRST
@pytest.mark.parametrize("name", [name for name in MEASUREMENTS if name not in SIGNED])
def test_measurements_are_those_of_the_host(case: Case, device: torch.device, name: str):
    """In float64 to 1e-5: HuggingFace's modules cast to float32 inside. A gap of a small move magnifies it."""
    measure, tolerance = MEASUREMENTS[name], 1e-2 if name == "linearization gap" else 1e-5
    found, expected = measure(tlc.trace(on(device, case), TOKENS)), measure(tlc.trace(case.model(), TOKENS))
    require_same(found, expected, tolerance)


@pytest.mark.parametrize("case", ON[1:], ids=str)
def test_so_they_are_on_other_architectures(case: Case, device: torch.device):
    there, here = tlc.trace(on(device, case), TOKENS), tlc.trace(case.model(), TOKENS)
    for name in ("depth", "tokens", "heads", "growth"):
        require_same(MEASUREMENTS[name](there), MEASUREMENTS[name](here), 1e-5)


@pytest.mark.parametrize("engine", ["analytic", "autograd"])
@FIRST
def test_products_are_taken_on_the_device(case: Case, device: torch.device, engine: Any):
    there, here = tlc.trace(on(device, case), TOKENS), tlc.trace(case.model(), TOKENS)
    for sublayer in there.sublayers:
        ours, truth = (tlc.residual_jacobian(each, 1, sublayer, 3, 5, engine=engine) for each in (there, here))
        x = torch.randn(truth.shape[1], 2, dtype=truth.dtype)
        products = ours.mm(x.to(ours.device)), ours.rmm(x.to(ours.device)), ours.dense()
        for found, expected in zip(products, (truth.mm(x), truth.rmm(x), truth.dense()), strict=True):
            assert found.device.type == ours.device.type == device.type
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"solver": "krylov"}, {"engine": "autograd"}], ids=str)
@FIRST
def test_two_calls_give_the_same_bits(case: Case, device: torch.device, options: dict[str, Any]):
    """Sums by atomic additions do not: several heads read one group of keys, and their products are added up."""
    model = on(device, case, torch.float32)
    one, two = (tlc.token_coupling(tlc.trace(model, TOKENS), 3, tokens=[1, 6], **options) for _ in range(2))
    for name, value in tensors(one).items():
        assert torch.equal(value.nan_to_num(), getattr(two, name).nan_to_num()), name


@FIRST
def test_half_precision_is_lifted_on_the_device(case: Case, device: torch.device):
    model = on(device, case, torch.bfloat16)
    found = tlc.depth_coupling(tlc.trace(model, TOKENS), 3)
    require_same(found, tlc.depth_coupling(tlc.trace(case.model(torch.bfloat16), TOKENS), 3), 1e-3)
    assert {(each.dtype, each.device.type) for each in model.blocks.parameters()} == {(torch.bfloat16, device.type)}


@FIRST
def test_neither_a_default_device_nor_a_stream_matters(case: Case, device: torch.device):
    model = on(device, case)
    expected = tlc.depth_coupling(tlc.trace(model, TOKENS), 3, solver="krylov")
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
    with torch.device(device), stream:
        found = tlc.depth_coupling(tlc.trace(model, TOKENS), 3, solver="krylov")
    require_same(found, expected)


@FIRST
def test_the_random_state_of_the_device_is_kept(case: Case, device: torch.device):
    model = on(device, case)
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    fresh = tlc.random_baseline(model)
    tlc.depth_coupling(tlc.trace(fresh, TOKENS), 3, solver="krylov")
    tlc.causal_effect(model, [TOKENS], 1)
    assert {each.device.type for each in fresh.blocks.parameters()} == {device.type}
    assert torch.equal(torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state(), state)


@FIRST
def test_the_gradient_of_the_loss_lies_on_the_device(case: Case, device: torch.device):
    there, here = on(device, case), case.build(torch.float64).eval()
    for model in (there, here):
        tlc.coupling_loss(model, TOKENS, 3, layers=[0, 2], quantity="excess").backward()
    pairs = list(zip(there.blocks.parameters(), here.blocks.parameters(), strict=True))
    assert any(truth.grad is not None and truth.grad.norm() > 0 for _, truth in pairs)
    for ours, truth in pairs:
        if truth.grad is not None:
            assert ours.grad.device.type == device.type
            torch.testing.assert_close(ours.grad.cpu(), truth.grad, rtol=1e-3, atol=1e-5 * float(truth.grad.norm()))


@FIRST
def test_a_report_a_check_and_the_published_procedure(case: Case, device: torch.device, tmp_path: Path):
    there, here = on(device, case), case.model()
    analysis = tlc.analyze(there, TOKENS, k=3, token_layers=[1])
    require_same(tlc.load(analysis.save(tmp_path / "result.safetensors")).coupling, analysis.coupling)
    assert (
        "<svg" in tlc.viz.write_html(analysis, tmp_path / "report.html").read_text() or analysis.attention is not None
    )
    assert tlc.check(there).passed == tlc.check(here).passed
    found, expected = (tlc.parity.published(model, TOKENS, 3) for model in (there, here))
    torch.testing.assert_close(found.misalignment, expected.misalignment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["decaying", "of rank 8", "pairs of equal values"])
def test_solvers_agree_with_the_hosts_float64(device: torch.device, kind: str):
    """The largest eight values of matrices of width 96, to 200 eps of the first; vectors reproduce them."""
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    s = 0.8 ** torch.arange(96, dtype=torch.float64)
    s = {
        "decaying": s,
        "of rank 8": s * (torch.arange(96) < 8),
        "pairs of equal values": 0.8 ** (torch.arange(96) // 2),
    }[kind]
    matrix = (u * s @ v.mT).float().to(device)
    dense = tlc.truncated_svd(Projection(matrix), 8, "dense")
    for triplets in (dense, *krylov_svd([Projection(matrix)] * 3, 8, 3e-5)):
        assert triplets.converged.all() and triplets.u.device.type == device.type
        torch.testing.assert_close(triplets.s.cpu().double(), s[:8].double(), rtol=0, atol=2.5e-5)
        torch.testing.assert_close(matrix @ triplets.v, triplets.u * triplets.s, rtol=0, atol=1e-4)


@FIRST
def test_a_measurement_leaves_no_memory_on_the_device(case: Case, device: torch.device):
    if device.type != "cuda":
        pytest.skip("counted by the device's allocator")
    model = on(device, case)

    def allocated() -> int:
        tlc.depth_coupling(tlc.trace(model, TOKENS), 3)
        return torch.cuda.memory_allocated(device)

    assert allocated() == allocated()
    before = free_memory(device)
    held = torch.empty(2**26, device=device)
    assert free_memory(device) <= before - held.nbytes / 2
    del held  # kept by the allocator, for the next tensor
    assert free_memory(device) >= before - 2**22
