"""Time coupling of blocks of Llama-3-8B's width, random and in bfloat16, against the published procedure.

d_model 4096, MLP 14336, 32 query and 8 key heads. Our work for one block is its Jacobian as an operator (with its
certificate), its top 10 triplets, ||J||_F, and its products with the 320 basis vectors of a model of 32 layers. The
published procedure forms the Jacobian by 4096 vector-Jacobian products and computes its full SVD; some of its rows are
timed and extrapolated. On a GPU, a whole model of 32 layers is timed too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import transformers
from measure import Row, alternating, measured
from published import block_calls, block_jacobian

import tlcoupling as tlc
from tlcoupling.coupling.method import cheapest
from tlcoupling.coupling.spectra import Decomposition, spectra_of
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.models.smollm2 import smollm2_huggingface

K, WIDTH, TOKENS, LAYERS = 10, 4096, 28, 32
PUBLISHED_ROWS = 24


def rows(device: torch.device) -> Iterator[Row | str]:
    """Yield rows of the table, and remarks about them."""
    model = _bridge(1, device)
    tokens = torch.arange(TOKENS)
    trace = tlc.trace(model, tokens)
    seconds, peak, (spectrum, flops) = alternating([partial(_one_block, trace)], 1, device)[0]
    theirs = _published_seconds(device)
    yield Row("Llama-3-8B's width, one block, 28 tokens", theirs, None, seconds, peak, flops)
    yield (
        f"Llama-3-8B's width: published extrapolated from {PUBLISHED_ROWS} of {WIDTH} rows and an SVD of a quarter of "
        f"the width; residual {float(spectrum.triplets.residual.max()):.1e}, ||J||_F to "
        f"{float(spectrum.frobenius_error):.1e}"
    )
    if device.type == "cuda":
        del model, trace, spectrum
        deep = _bridge(LAYERS, device)

        def whole() -> tlc.DepthCoupling:
            return tlc.depth_coupling(tlc.trace(deep, tokens), K, sublayers="block")

        whole()
        seconds, peak, _ = alternating([whole], 1, device)[0]
        yield Row(f"the same, {LAYERS} layers, whole call", LAYERS * theirs, None, seconds, peak)


def _huggingface(n_layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a random Llama of that width with a small vocabulary."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=14336,
        num_hidden_layers=n_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=256,
        max_position_embeddings=128,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    torch.manual_seed(0)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()


def _bridge(n_layers: int, device: torch.device) -> Any:
    """Return such a model in bfloat16 as a bridge."""
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = smollm2_huggingface()[1]
    tokenizer.init_kwargs["add_bos_token"] = True  # otherwise TransformerLens asks the hub for a tokenizer that adds it
    return TransformerBridge.boot_transformers(
        "meta-llama/Llama-3.2-1B",
        hf_model=_huggingface(n_layers, torch.bfloat16, device),
        tokenizer=tokenizer,
        dtype=torch.bfloat16,
        device=str(device),
    )


def _one_block(trace: tlc.Trace) -> tuple[Any, float]:
    """Do one block's share of the work of coupling 32 layers; return its spectrum and floating-point operations."""
    engine, last = JacobianEngine(trace), trace.n_tokens - 1

    def make() -> tlc.JacobianOperator:
        return engine.operator(0, "block", last, last)

    operator = make()
    method = cheapest(operator, WIDTH, K, LAYERS, "auto", keep=True)
    (spectrum,) = spectra_of([Decomposition(operator, make, method.name, "block")], K, "auto")
    spectrum.multiply(torch.randn(WIDTH, LAYERS * K, dtype=operator.dtype, device=operator.device))
    work = method.forming + method.decomposing + method.comparing * LAYERS
    return spectrum, work.flops


def _published_seconds(device: torch.device) -> float:
    """Return the published procedure's extrapolated time for one block, in float32."""
    (call,) = block_calls(_huggingface(1, torch.float32, device), torch.arange(TOKENS, device=device)[None])
    some = measured(partial(block_jacobian, *call, n_rows=PUBLISHED_ROWS), device).seconds
    quarter = torch.randn(WIDTH // 4, WIDTH // 4, device=device)
    return some * WIDTH / PUBLISHED_ROWS + 4**3 * measured(partial(torch.linalg.svd, quarter), device).seconds
