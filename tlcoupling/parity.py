r"""The published procedure, reproduced number for number, and a list of its known defects.

Source: arXiv 2407.07810, section 3, and the authors' released code. Text and code here are original.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import KSpec, check_index, check_name, resolve_k
from tlcoupling.coupling.metric import Bases, Normalizer, coupling, off_diagonal_mean
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.context import measured
from tlcoupling.forward.lifting import lifted
from tlcoupling.forward.offload import device_of
from tlcoupling.forward.trace import Trace, trace
from tlcoupling.jacobian.autograd import GraphJacobian, at_position
from tlcoupling.jacobian.differences import Function, leaning
from tlcoupling.jacobian.engine import EngineName, JacobianEngine
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.svd import truncated_svd
from tlcoupling.results.base import Result


@dataclass(frozen=True)
class Defect:
    """A known defect of the published procedure.

    Attributes:
        name: a short name; that of the switch in ``published``, if there is one.
        what: what the procedure does.
        effect: how that changes the numbers.
        instead: what this library does instead.
    """

    name: str
    what: str
    effect: str
    instead: str


DEFECTS = (
    Defect(
        "final_norm_in_last_block",
        "The output of the last block is taken from HuggingFace's hidden_states[-1], which includes the final norm.",
        "The last block's Jacobian becomes N (I + J) - I with N the final norm's Jacobian, which is no block's "
        "Jacobian. Its row and column of the matrix are wrong; all others are right. On SmolLM2-135M (landmarks, "
        "K = 10) block 29's s_1 falls from 5.06 to 1.22, and the mean over different layers rises from 0.0391 to "
        "0.0459.",
        "x^L is blocks[-1].hook_resid_post, before the final norm.",
    ),
    Defect(
        "subtract_identity_off_diagonal",
        "The identity is subtracted from the Jacobian of every pair of tokens, also for src < dest.",
        "No skip connection leads from a token to a later one, so -I remains in the Jacobian. If attention passes "
        "little on, the Jacobian is nearly -I: all its singular values are nearly 1, and its singular vectors are an "
        "arbitrary basis.",
        "The identity is subtracted only for src = dest.",
    ),
    Defect(
        "trace_normalizer",
        "The misalignment is divided by the sum of the singular values, tr S1, rather than by ||S1||_F.",
        "tr S1 is up to sqrt(K) times ||S1||_F. The misalignment of unrelated matrices falls to about 1 / sqrt(K), and "
        "the coupling rises with K and with the flatness of the spectrum, which depends on width.",
        "Frobenius by default. Both normalisers come with the coupling expected by chance.",
    ),
    Defect(
        "absolute_values",
        "Absolute values of U2^T J1 V2 are compared with S1; the paper's formula has none.",
        "Diagonal signs do not depend on the sign of a pair (u, v), so a negative diagonal means anti-alignment. The "
        "absolute value counts it as alignment, and raises the coupling expected by chance.",
        "absolute=True by default too, for comparability; absolute=False is the formula. The null follows the choice.",
    ),
    Defect(
        "diagonal_in_the_mean",
        "The mean coupling of a model is taken over all pairs of layers, including each layer with itself.",
        "c(l, l) = 1 adds (1 - c) / L to the mean c of different layers, so shallow models look more coupled. On "
        "SmolLM2-135M (landmarks, K = 10, 30 layers) 0.0391 becomes 0.0712.",
        "Means are over ordered pairs of different layers, and ``profile`` gives the mean by distance.",
    ),
    Defect(
        "no_chance_level",
        "No number is given for unrelated matrices.",
        "A reader cannot separate coupling from the effects of width, K and normaliser. A random model of SmolLM2's "
        "shape has coupling 0.011 with the Frobenius normaliser and 0.686 with the trace.",
        "Every coupling comes with its closed-form null and the excess over it.",
    ),
)


@dataclass(frozen=True, repr=False, eq=False)
class PublishedMisalignment(Result):
    r"""The published procedure's result for one prompt.

    Attributes:
        misalignment: m_K(J1, J2) = || abs(U2^T J1 V2) - S1 ||_F / norm(S1); ``layer`` gives J1, ``basis_layer`` the
            bases. ``[k, layer, basis_layer]``.
        singular_values: the top singular values of each Jacobian, ``[layer, rank]``.
        ks: number of singular vectors compared.
        normalizer: ``"frobenius"`` or ``"trace"``.
        bases: ``"uv"`` or ``"vu"``.
        final_norm_in_last_block: whether the last block's Jacobian includes the final norm.
        identity_subtracted: whether the identity was subtracted.
    """

    misalignment: Float[Tensor, "k layer layer"]
    singular_values: Float[Tensor, "layer rank"]
    ks: tuple[int, ...]
    normalizer: str
    bases: str
    final_norm_in_last_block: bool
    identity_subtracted: bool

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "misalignment": ("k", "layer", "basis_layer"),
        "singular_values": ("layer", "rank"),
    }

    def __repr__(self) -> str:
        """One line."""
        mean = self.mean_coupling(include_diagonal=True)[0]
        return f"PublishedMisalignment({len(self.singular_values)} layers, K={self.ks[0]}: mean coupling {mean:.4f})"

    def mean_coupling(self, include_diagonal: bool = True) -> Float[Tensor, " k"]:
        """Return the mean of 1 - m_K over all pairs of layers, as published; or over pairs of different layers."""
        values = 1 - self.misalignment
        return values.mean((-2, -1)) if include_diagonal else off_diagonal_mean(values)

    def _coords(self) -> dict[str, Sequence[Any]]:
        layers, ranks = (range(size) for size in self.singular_values.shape)
        return {"k": self.ks, "layer": layers, "basis_layer": layers, "rank": ranks}


@measured
def published(
    model: Any,
    prompt: Any,
    k: KSpec = 10,
    *,
    normalizer: Normalizer = "frobenius",
    bases: Bases = "uv",
    src: int = -1,
    dest: int = -1,
    final_norm_in_last_block: bool = False,
    subtract_identity_off_diagonal: bool = True,
    prepend_bos: bool | None = None,
    attention_mask: Any | None = None,
    engine: EngineName = "auto",
) -> PublishedMisalignment:
    r"""Return the depth-wise misalignment exactly as the published procedure computes it.

    Its conventions: the last token, absolute values, full SVDs, and misalignment m_K instead of coupling 1 - m_K. Its
    defects are listed in ``DEFECTS``. ``final_norm_in_last_block=True`` reproduces the authors' numbers. The default
    leaves the final norm out, so the last row and column describe a block. Only the Jacobians' computation differs.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge`` of a decoder, in eval mode, weights not processed.
        prompt: a string, token ids ``[pos]``, or a batch of one ``[1, pos]``.
        k: number of singular vectors to compare: an int, a fraction of d_model, or several of these.
        normalizer: ``"frobenius"`` or ``"trace"``.
        bases: ``"uv"`` or ``"vu"``.
        src: input position.
        dest: output position, not before src.
        final_norm_in_last_block: take the last block's output after the model's final norm, like HuggingFace's
            ``hidden_states[-1]``.
        subtract_identity_off_diagonal: subtract the identity also for src < dest.
        prepend_bos: as in ``trace``; the published procedure uses the tokenizer's default.
        attention_mask: as in ``trace``.
        engine: as in ``depth_coupling``.

    Raises:
        ArgumentError: an argument out of range, or a model without the requested final norm.
        UnsupportedModelError, NonFiniteActivationError, ResidualIdentityError: see ``trace``.
        HookError, DerivativeError: see ``residual_jacobian``.

    Example:
        >>> tlc.parity.published(model, prompt, final_norm_in_last_block=True).misalignment  # doctest: +SKIP
    """
    started = time.perf_counter()
    traced = trace(model, prompt, prepend_bos=prepend_bos, attention_mask=attention_mask)
    ks = resolve_k(k, traced.d_model)
    check_name("normalizer", normalizer, get_args(Normalizer))
    check_name("bases", bases, get_args(Bases))
    src, dest = check_index("src", src, traced.n_tokens), check_index("dest", dest, traced.n_tokens)
    if src > dest:
        raise ArgumentError("src", src, f"a position not after dest={dest}: attention is causal")
    subtracted = src == dest or subtract_identity_off_diagonal
    jacobians = JacobianEngine(traced, engine)
    eye = torch.eye(traced.d_model, dtype=traced.resid.dtype, device=traced.resid.device)
    matrices = []
    for layer in range(traced.n_layers):
        jacobian = jacobians.operator(layer, "block", src, dest).dense().to(eye)
        if final_norm_in_last_block and layer == traced.n_layers - 1:
            whole = jacobian + eye if src == dest else jacobian
            jacobian = _final_norm(traced, dest) @ whole
            jacobian = jacobian - eye if subtracted else jacobian
        elif src < dest and subtract_identity_off_diagonal:
            jacobian = jacobian - eye
        matrices.append(jacobian)
    triplets = [truncated_svd(Projection(jacobian), max(ks), "dense") for jacobian in matrices]
    u, s, v = (torch.stack([getattr(one, name) for one in triplets]) for name in "usv")
    left, right = (u, v) if bases == "uv" else (v, u)
    misalignment = [
        torch.stack(
            [
                1 - coupling(left[..., :k].mT @ jacobian @ right[..., :k], top[:k], normalizer, absolute=True)
                for jacobian, top in zip(matrices, s, strict=True)
            ]
        )
        for k in ks
    ]
    settings = {
        "k": list(ks),
        "src": src,
        "dest": dest,
        "normalizer": normalizer,
        "bases": bases,
        "final_norm_in_last_block": final_norm_in_last_block,
        "subtract_identity_off_diagonal": subtract_identity_off_diagonal,
        "engine": engine,
    }
    return PublishedMisalignment(
        provenance=traced.provenance(settings=settings, seconds=time.perf_counter() - started, engine=jacobians.used),
        misalignment=torch.stack(misalignment).cpu(),
        singular_values=s.cpu(),
        ks=ks,
        normalizer=normalizer,
        bases=bases,
        final_norm_in_last_block=final_norm_in_last_block,
        identity_subtracted=subtracted,
    )


def _final_norm(traced: Trace, pos: int) -> Float[Tensor, "d_model d_model"]:
    """Return the Jacobian of the model's own final norm at x^L of one token, held against central differences."""
    norm = getattr(traced.model, "ln_final", None)
    if norm is None:
        raise ArgumentError("final_norm_in_last_block", True, "False: this model has no ln_final")
    device = device_of(norm) if any(True for _ in norm.parameters()) else traced.resid.device
    leaf = traced.resid[-1, pos].to(device)[None, None].clone().requires_grad_()
    with torch.enable_grad(), lifted(traced.model, norm):
        out = norm(leaf)[0, 0]
    jacobian = GraphJacobian(out, leaf, at_position(0), 4.0 * traced.d_model)

    @torch.no_grad()
    def moved(moves: Float[Tensor, "move d_model"]) -> Float[Tensor, "move 1 d_model"]:
        with lifted(traced.model, norm):
            return (norm(leaf + moves[:, None]) - out).to(leaf)

    stream = leaf.detach()[0, 0]
    reason = Function(
        where="the final norm",
        moved=moved,
        product=lambda direction: jacobian.mv(direction)[None],
        size=float(stream.norm()) or 1.0,
        lengths=out.detach().norm()[None].to(leaf),
        hooked=traced.hooked_outside_blocks(),
    ).require(leaning(stream))
    if reason is not None:
        warnings.warn(reason, stacklevel=4)
    return jacobian.dense().to(traced.resid)
