"""One block at Llama-3-8B's width: our work for its coupling with 32 layers against the published procedure's.

    python benchmarks/wide_block.py

d_model 4096, MLP 14336, 32 query and 8 key heads, bfloat16 weights, random. Ours: the block's Jacobian as an operator
(certificate included), its top 10 triplets, ||J||_F, and its products with 320 base vectors. The published procedure
forms the Jacobian by 4096 vector-Jacobian products and decomposes it whole; it is timed on a part of its rows, and
extrapolated.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import transformers
from published import block_calls, block_jacobian
from rich.console import Console

import tlcoupling as tlc
from tlcoupling.coupling.spectra import prefers_products, product_spectrum
from tlcoupling.jacobian import JacobianEngine
from tlcoupling.smollm2 import smollm2_huggingface


def wide_model(dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A one-block Llama of that width with a small vocabulary."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=256,
        max_position_embeddings=128,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()


def peak_memory() -> float:
    """The largest that this process has been, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=28)
    parser.add_argument("--rows", type=int, default=24, help="rows of the published Jacobian to time")
    options = parser.parse_args()
    from transformer_lens.model_bridge import TransformerBridge

    console = Console()
    hf_model = wide_model(torch.bfloat16)
    tokenizer = smollm2_huggingface()[1]
    tokenizer.init_kwargs["add_bos_token"] = True  # or TransformerLens asks the hub for a tokenizer that adds it
    model = TransformerBridge.boot_transformers(
        "meta-llama/Llama-3.2-1B", hf_model=hf_model, tokenizer=tokenizer, dtype=torch.bfloat16
    )
    tokens = torch.arange(options.tokens)
    before = peak_memory()

    started = time.perf_counter()
    trace = tlc.trace(model, tokens)
    traced = time.perf_counter()
    engine = JacobianEngine(trace)
    last = options.tokens - 1

    def make() -> tlc.JacobianOperator:
        return engine.operator(0, "block", last, last)

    operator = make()
    made = time.perf_counter()
    assert prefers_products(operator, 10, 32)
    spectrum = product_spectrum(operator, make, 10, "auto")
    decomposed = time.perf_counter()
    spectrum.multiply(torch.randn(4096, 320))
    ours = time.perf_counter() - traced
    console.print(
        f"ours: {ours:.2f} s for the block (operator and certificate {made - traced:.2f}, triplets and norm "
        f"{decomposed - made:.2f}, 320 products {traced + ours - decomposed:.2f}), engine {engine.used['block']}, "
        f"residual {float(spectrum.triplets.residual.max()):.1e}, ||J||_F to {float(spectrum.frobenius_error):.1e}; "
        f"forward pass {traced - started:.2f} s; {peak_memory() - before:.2f} GiB beyond the weights"
    )

    plain = wide_model(torch.float32)  # the published procedure runs in float32
    (call,) = block_calls(plain, tokens[None])
    started = time.perf_counter()
    block_jacobian(*call, n_rows=options.rows)
    rows = (time.perf_counter() - started) * 4096 / options.rows
    started = time.perf_counter()
    torch.linalg.svd(torch.randn(1024, 1024))
    svd = (time.perf_counter() - started) * 4**3
    console.print(
        f"published: {rows + svd:.0f} s for the block, extrapolated ({rows:.0f} s from {options.rows} of 4096 rows, "
        f"{svd:.0f} s from an SVD of a quarter of the width); ratio {(rows + svd) / ours:.0f}"
    )


if __name__ == "__main__":
    main()
