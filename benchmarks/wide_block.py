"""Time coupling in models of Llama-3-8B's and -70B's width, random and in bfloat16, against the published procedure.

Our work for one block is its Jacobian as an operator (with its certificate), its top 10 triplets, ||J||_F, and its
products with the bases of a model of 32 layers (80 at the width of Llama-3-70B). The published procedure forms the
Jacobian by one vector-Jacobian product for each coordinate and computes its full SVD. Some of its rows are timed and
extrapolated. On a GPU, a whole model of 32 layers of Llama-3-8B's width is timed too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from llamas import bridge, shaped
from measure import Row, alternating, measured
from published import block_jacobians, chunks

import tlcoupling as tlc
from tlcoupling.coupling.method import THIN, THIN_ON_DEVICE, cheapest
from tlcoupling.coupling.spectra import Decomposition, spectra_of
from tlcoupling.jacobian.engine import JacobianEngine

K, WIDTH, TOKENS, LAYERS = 10, 4096, 28, 32
PUBLISHED_ROWS = 64


def rows(device: torch.device, widths: Sequence[int] = (WIDTH,)) -> Iterator[Row | str]:
    """Yield a row for one block of each width, and remarks."""
    for width in widths:
        trace = tlc.trace(bridge(shaped(width, 1, device, torch.bfloat16)), torch.arange(TOKENS))
        columns = LAYERS if width <= WIDTH else 80
        seconds, peak, (spectrum, flops) = alternating([partial(_one_block, trace, columns)], 1, device)[0]
        del trace
        work = f"one block of d = {width}, {TOKENS} tokens"
        yield Row(work, _published_seconds(device, width), None, seconds, peak, flops)
        yield (
            f"d = {width}: published extrapolated from some of its rows and an SVD of a quarter of the width; "
            f"residual {float(spectrum.triplets.residual.max()):.1e}, ||J||_F to {float(spectrum.frobenius_error):.1e}"
        )


def whole_model(device: torch.device, width: int = WIDTH, layers: int = LAYERS) -> Iterator[Row]:
    """Yield the row of a whole model, made on the device."""
    deep, tokens = bridge(shaped(width, layers, device, torch.bfloat16)), torch.arange(TOKENS)

    def whole() -> tlc.DepthCoupling:
        return tlc.depth_coupling(tlc.trace(deep, tokens), K, sublayers="block")

    whole()
    seconds, peak, _ = alternating([whole], 1, device)[0]
    flops = tlc.estimate(deep, tokens, K, sublayers="block").flops
    work = f"{layers} layers of d = {width}, bfloat16, whole call, {TOKENS} tokens"
    yield Row(work, layers * _published_seconds(device, width), None, seconds, peak, flops)


def _one_block(trace: tlc.Trace, columns: int) -> tuple[Any, float]:
    """Do one block's share of the work of coupling a model; return its spectrum and floating-point operations."""
    engine, last, width = JacobianEngine(trace), trace.n_tokens - 1, trace.d_model

    def make() -> tlc.JacobianOperator:
        return engine.operator(0, "block", last, last)

    operator = make()
    thin = THIN if operator.device.type == "cpu" else THIN_ON_DEVICE
    method = cheapest(operator, width, K, columns, "auto", keep=True, thin=thin)
    (spectrum,) = spectra_of([Decomposition(operator, make, method.name, "block")], K, "auto")
    spectrum.multiply(torch.randn(width, columns * K, dtype=operator.dtype, device=operator.device))
    work = method.forming + method.decomposing + method.comparing * columns
    return spectrum, work.flops


def _published_seconds(device: torch.device, width: int) -> float:
    """Return the published procedure's extrapolated time for one block, in float32."""
    model, ids = shaped(width, 1, device), torch.arange(TOKENS, device=device)[None]

    def seconds(n_rows: int) -> float:
        return measured(lambda: list(block_jacobians(model, ids, n_rows=n_rows)), device).seconds

    n_rows = PUBLISHED_ROWS if device.type == "cpu" else width // chunks(TOKENS)
    seconds(1)  # pays for thread pools and handles
    alone = seconds(1)
    quarter = torch.randn(width // 4, width // 4, device=device)
    svd = 4**3 * measured(partial(torch.linalg.svd, quarter), device).seconds
    return alone + (seconds(n_rows) - alone) * width / n_rows + svd
