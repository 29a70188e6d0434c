r"""The top singular vectors of a layer, decoded as tokens.

J = U S V^T: the layer reads along v_i and writes along u_i, scaled by s_i. Writes are decoded through the model's final
norm, unembedding and logit soft-cap, linearised at the token: d logits / d x^L along u_i. This is a logit lens
(nostalgebraist 2020) on a direction rather than a state. Reads are compared with the embeddings of all tokens.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlcoupling.arguments import check_index, check_int, check_sublayer
from tlcoupling.errors import UnsupportedModelError
from tlcoupling.forward.context import measured
from tlcoupling.forward.hooked import attached
from tlcoupling.forward.lifting import lifted, lifted_model
from tlcoupling.forward.offload import device_of
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.autograd import GraphJacobian, at_position
from tlcoupling.jacobian.differences import Function, leaning
from tlcoupling.jacobian.engine import EngineName, JacobianEngine
from tlcoupling.linalg.svd import truncated_svd
from tlcoupling.linalg.triplets import Triplets
from tlcoupling.results.base import Result

if TYPE_CHECKING:
    import pandas

SIDES, ENDS = ("writes", "reads"), ("+", "-")
Readout = Literal["norm", "logits"]
RANDOM_DIRECTIONS = 64

_PLACES = ("side", "rank", "end", "place")
_BEFORE_UNEMBED = ("unembed.hook_in", "ln_final.hook_normalized")  # of a bridge, of a HookedTransformer


@dataclass(frozen=True, repr=False, eq=False)
class DirectionReadout(Result):
    r"""The tokens at both ends of a layer's top singular directions.

    (u, v) and (-u, -v) are the same singular pair, so both ends are given. They correspond: input along the ``"+"`` end
    of a pair's reads produces output along the ``"+"`` end of its writes.

    Attributes:
        scores: for ``"writes"``, the change of the token's logit per unit of movement of x^L along u (or -u). A shift
            shared by all logits changes no probability. For ``"reads"``, the cosine of v (or -v) with the token's
            embedding. Descending over places. ``[side, rank, end, place]``.
        ids: the tokens' ids. Same axes.
        null: the mean score at each place for random directions, ``[side, place]``.
        singular_values: s_i, ``[rank]``.
        left: U, the directions the layer writes along, ``[d_model, rank]``.
        right: V, the directions the layer reads along, ``[d_model, rank]``.
        texts: the tokens as text, nested like ``scores``.
        layer: the layer.
        sublayer: ``"block"``, ``"attn"`` or ``"mlp"``.
        position: the token whose Jacobian is decomposed and whose logits are used.
    """

    scores: Float[Tensor, "side rank end place"]
    ids: Int[Tensor, "side rank end place"]
    null: Float[Tensor, "side place"]
    singular_values: Float[Tensor, " rank"]
    left: Float[Tensor, "d_model rank"]
    right: Float[Tensor, "d_model rank"]
    texts: tuple[Any, ...]
    layer: int
    sublayer: str
    position: int

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "scores": _PLACES,
        "ids": _PLACES,
        "null": ("side", "place"),
        "singular_values": ("rank",),
        "left": ("d_model", "rank"),
        "right": ("d_model", "rank"),
    }

    def __repr__(self) -> str:
        """One line."""
        shown = ", ".join(repr(text) for text in self.texts[0][0][0][:3])
        return f"DirectionReadout({self.sublayer} of layer {self.layer}: +u_1 writes {shown})"

    def _coords(self) -> dict[str, Sequence[Any]]:
        width, ranks = self.left.shape
        return {
            "side": SIDES,
            "rank": range(ranks),
            "end": ENDS,
            "place": range(self.scores.shape[-1]),
            "d_model": range(width),
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """Return one row per token: ``side``, ``rank``, ``end``, ``place``, ``id``, ``token``, ``score`` and ``null``.

        The singular vectors are left out.
        """
        import pandas as pd

        coords = self._coords()
        index = pd.MultiIndex.from_product([list(coords[axis]) for axis in _PLACES], names=_PLACES)
        table = index.to_frame(index=False)
        table["id"] = self.ids.flatten().numpy()
        table["token"] = [text for side in self.texts for rank in side for end in rank for text in end]
        table["score"] = self.scores.double().flatten().numpy()
        table["null"] = self.null[:, None, None].expand_as(self.scores).double().flatten().numpy()
        return table


@measured
def read_directions(
    trace: Trace,
    layer: int,
    sublayer: str = "block",
    *,
    pos: int = -1,
    k: int = 3,
    top: int = 10,
    engine: EngineName = "auto",
) -> DirectionReadout:
    """Decode a layer's top singular vectors as tokens.

    Args:
        trace: a trace of the model.
        layer: block index.
        sublayer: ``"block"``, ``"attn"`` or ``"mlp"``.
        pos: the token whose Jacobian is decomposed and whose logits are used.
        k: number of singular pairs.
        top: number of tokens at each end.
        engine: as in ``residual_jacobian``.

    Raises:
        ArgumentError: an argument out of range.
        HookError: a user hook hides its effect from autograd.
        DerivativeError: the model itself hides its effect from autograd.
        UnsupportedModelError: the embeddings are not in the residual stream's space.
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> tlc.read_directions(trace, layer=20).to_dataframe()  # doctest: +SKIP
    """
    require_trace(trace)
    started = time.perf_counter()
    layer = check_index("layer", layer, trace.n_layers)
    pos = check_index("pos", pos, trace.n_tokens)
    check_sublayer("sublayer", sublayer, trace.sublayers, trace.refusal)
    read, null = reader(trace, pos, top)
    jacobians = JacobianEngine(trace, engine, {(pos, pos)})
    pairs = truncated_svd(jacobians.operator(layer, sublayer, pos, pos), k)
    (scores,), (ids,), (texts,) = read([pairs])
    return DirectionReadout(
        provenance=trace.provenance(
            settings={"layer": layer, "sublayer": sublayer, "pos": pos, "k": k, "top": top, "engine": engine},
            seconds=time.perf_counter() - started,
            engine=jacobians.used,
        ),
        scores=scores,
        ids=ids,
        null=null,
        singular_values=pairs.s.cpu(),
        left=pairs.u.cpu(),
        right=pairs.v.cpu(),
        texts=texts,
        layer=layer,
        sublayer=sublayer,
        position=pos,
    )


def reader(
    trace: Trace, pos: int, top: int
) -> tuple[Callable[[Sequence[Triplets]], tuple[Tensor, Tensor, tuple[Any, ...]]], Float[Tensor, "side place"]]:
    """Return what decodes singular vectors, as the scores, ids and texts of ``DirectionReadout``, and their null.

    It takes the triplets of several Jacobians, at the same K, and returns the three for each.

    Args:
        trace: a trace of the model.
        pos: the token whose logits are used.
        top: number of tokens at each end.

    Raises:
        ArgumentError: ``top`` is out of range.
        UnsupportedModelError: the embeddings are not in the residual stream's space.
    """
    embeddings = _embeddings(trace)
    logits = readout_jacobian(trace, pos)
    words = min(len(embeddings), logits.shape[0])
    top = check_int("top", top, 1, words, "the size of the vocabulary")
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(trace.d_model, RANDOM_DIRECTIONS, generator=generator, dtype=trace.resid.dtype)
    random = (random / random.norm(dim=0)).to(logits.device)
    sides = (logits.mm, embeddings.__matmul__)

    def read(pairs: Sequence[Triplets]) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        scores, ids = [], []
        for side, name in zip(sides, ("u", "v"), strict=True):
            vectors = torch.cat([getattr(one, name).to(random) for one in pairs], dim=1)
            # many at a time: each product reads the whole vocabulary
            every = (side(some).mT for some in vectors.split(RANDOM_DIRECTIONS, dim=1))  # [rank, vocabulary] each
            tops = [torch.stack([along, -along], dim=1).topk(top) for along in every]
            scores.append(torch.cat([one.values for one in tops]).cpu())
            ids.append(torch.cat([one.indices for one in tops]).cpu())
        # [Jacobian, side, rank, end, place] both
        found, which = (
            torch.stack(both, dim=1).unflatten(0, (len(pairs), -1)).transpose(1, 2) for both in (scores, ids)
        )
        return found, which, _texts(trace.model, which.tolist())

    return read, torch.stack([side(random).mT.topk(top).values.mean(0) for side in sides]).cpu()


def readout_jacobian(trace: Trace, pos: int, of: Readout = "logits") -> GraphJacobian:
    """Return d logits_pos / d x^L_pos through everything after the model's last block, ``[vocabulary, d_model]``.

    Or the same of the final norm's output, ``[d_model, d_model]``.

    Runs the model's own forward pass with the trace's x^L substituted. So final norm, unembedding and soft-cap are the
    model's own, and both the trace's hooks and attached hooks act.

    Raises:
        ArgumentError: a hook of the trace is on a point that the forward pass does not call.
        HookError: a user hook hides its effect from autograd.
        DerivativeError: the model itself hides its effect from autograd.
        StaleTraceError: the model now gives another x^L.

    Warns:
        UserWarning: a hook is not smooth at this point, so its derivative could not be checked.
    """
    leaf = trace.resid[-1][None].clone().requires_grad_()
    with trace.hooks_attached():
        # a hook expects all positions
        logits = logits_from(trace, pos, leaf, of, alone=not trace.hooked_outside_blocks())
        # the logits have a graph through the weights in any case, so test for a path to the stream
        ones = torch.ones_like(logits)
        if not logits.requires_grad or torch.autograd.grad(logits, leaf, ones, True, allow_unused=True)[0] is None:
            raise UnsupportedModelError(
                "the logits do not depend on the last block's output through autograd: a hook that detaches the graph, "
                "or a module that runs without gradients, hides the derivative"
            )
        weights = logits.numel() * trace.d_model
        jacobian = GraphJacobian(logits.to(leaf), leaf, at_position(pos), 4.0 * weights)
        _require_followed(trace, pos, of, jacobian, logits.detach())
    return jacobian


def logits_from(
    trace: Trace,
    pos: int,
    last_stream: Float[Tensor, "1 pos d_model"],
    of: Readout = "logits",
    alone: bool = False,
) -> Float[Tensor, " vocabulary"]:
    """Return the logits at a token with another x^L, or the final norm's output; with a graph from there on.

    Args:
        trace: a trace of the model.
        pos: the token.
        last_stream: x^L.
        of: which of the two.
        alone: whether the unembedding takes this token alone, so that a product with the derivative does not go through
            the vocabulary once for every token. Of a model without its hook point, it takes all.
    """
    model, last = trace.model, trace.n_layers - 1

    def swap(resid: Tensor) -> Tensor:
        trace.check_current("block", last, resid[0])
        torch.set_grad_enabled(True)  # from here on; earlier blocks need no graph
        return last_stream.to(resid.device)

    hooks = [(trace.point(last, "hook_resid_post"), swap)]
    end = next((model.hook_dict[name] for name in _BEFORE_UNEMBED if name in model.hook_dict), None)
    if alone and end is not None and of == "logits":
        hooks.append((end, lambda resid: resid[:, pos : pos + 1] if resid.shape == last_stream.shape else resid))
    tokens, normed = trace.tokens[None].to(device_of(model)), list[Tensor]()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # restores the grad mode on exit
        stack.enter_context(lifted_model(model))
        stack.enter_context(attached(hooks))
        if of == "norm":
            handle = model.ln_final.register_forward_hook(lambda module, inputs, output: normed.append(output))
            stack.callback(handle.remove)
        (logits,) = model(tokens, return_type="logits")
        if of == "norm":
            return normed[-1][0, pos]
        return logits[0 if len(logits) == 1 else pos]


def _require_followed(
    trace: Trace, pos: int, of: Readout, jacobian: GraphJacobian, logits: Float[Tensor, " vocabulary"]
) -> None:
    """Hold the derivative of the logits, or of the final norm's output, against central differences."""
    stream = trace.resid[-1][None]

    @torch.no_grad()
    def moved(moves: Float[Tensor, "move d_model"]) -> Float[Tensor, "move 1 vocabulary"]:
        changes = []
        for move in moves:
            other = stream.clone()
            other[0, pos] += move
            changes.append(logits_from(trace, pos, other, of).detach() - logits)
        return torch.stack(changes)[:, None].to(logits)

    reason = Function(
        where="the final norm" if of == "norm" else "the logits",
        moved=moved,
        product=lambda direction: jacobian.mv(direction)[None],
        size=float(stream[0, pos].norm()) or 1.0,
        lengths=logits.norm()[None],
        hooked=trace.hooked_outside_blocks(),
    ).require(leaning(stream[0, pos]).to(jacobian.device))
    if reason is not None:
        warnings.warn(reason, stacklevel=4)


def _embeddings(trace: Trace) -> Float[Tensor, "vocabulary d_model"]:
    """Return the tokens' embeddings, each of length 1."""
    embed = getattr(trace.model, "embed", None)
    with nullcontext() if embed is None else lifted(trace.model, embed):
        weight = getattr(trace.model, "W_E", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != trace.d_model:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else "none"
        raise UnsupportedModelError(
            f"the model's embedding matrix (W_E: {shape}) does not write into the residual stream of width "
            f"{trace.d_model}, so a layer's reads cannot be compared with tokens"
        )
    weight = weight.detach().to(trace.resid)
    return weight / weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)


def _texts(model: Any, ids: Any) -> Any:
    """Return nested token ids as text; the numbers themselves if there is no tokenizer."""
    if isinstance(ids, list):
        return tuple(_texts(model, item) for item in ids)
    tokenizer = getattr(model, "tokenizer", None)
    return str(ids) if tokenizer is None else tokenizer.decode([ids])
