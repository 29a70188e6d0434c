"""The engines agree on whatever configuration is drawn: from the forward pass to both engines."""

from __future__ import annotations

from typing import Any

from cases import CASES, TOKENS, built_here, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tlcoupling as tlc

HOOKED = any(case.name.startswith("hooked") for case in CASES)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a small ``HookedTransformer``, or of a native ``TransformerBridge`` where there is none."""
    n_heads = draw(st.sampled_from([1, 2, 4]))
    positions = draw(st.sampled_from(["standard", "rotary", "alibi"] if HOOKED else ["standard", "rotary"]))
    drawn: dict[str, Any] = dict(
        n_layers=1,
        n_heads=n_heads,
        d_head=4,
        d_model=draw(st.sampled_from([8, 15])),
        d_mlp=draw(st.integers(3, 20)),
        normalization_type=draw(st.sampled_from(["LN", "LNPre", "RMS", "RMSPre", *([None] if HOOKED else [])])),
        n_key_value_heads=draw(st.sampled_from([heads for heads in (1, 2, 4) if n_heads % heads == 0])),
        gated_mlp=draw(st.booleans()),
        act_fn=draw(st.sampled_from(["gelu", "relu", "silu"])),
        positional_embedding_type=positions,
        attn_scores_soft_cap=draw(st.sampled_from([-1.0, 1.5])) if positions != "alibi" else -1.0,
    )
    if positions == "rotary":
        drawn["rotary_dim"] = draw(st.sampled_from([2, 4]))
    if HOOKED:
        drawn["parallel_attn_mlp"] = draw(st.booleans())
        drawn["use_qk_norm"] = draw(st.booleans())
        drawn["use_attn_scale"] = draw(st.booleans())
        if drawn["normalization_type"] is not None and not drawn["parallel_attn_mlp"]:
            drawn["use_normalization_before_and_after"] = draw(st.booleans())
    return drawn


@given(drawn=configurations(), dest=st.integers(0, 5), back=st.integers(0, 2))
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_the_engines_agree_on_any_configuration(drawn: dict[str, Any], dest: int, back: int):
    trace = tlc.trace(built_here(drawn), TOKENS[:6])
    src = max(dest - back, 0)
    for sublayer in trace.sublayers:
        if sublayer == "mlp" and src != dest:
            continue
        closed = tlc.residual_jacobian(trace, 0, sublayer, src, dest, engine="analytic").dense()
        truth = tlc.residual_jacobian(trace, 0, sublayer, src, dest, engine="autograd").dense()
        # TransformerLens's native RMSNorm casts to float32
        assert relative_error(closed, truth) < (1e-9 if HOOKED else 1e-5), sublayer
