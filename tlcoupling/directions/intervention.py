r"""Interventions as hooks: remove directions from a sublayer's write or the residual stream, or keep only them.

The functions return ``(hook_name, function)`` pairs for ``fwd_hooks=`` of ``tlc.trace`` or ``model.run_with_hooks``.
``random_directions`` is the control: a random subspace of the same dimension and the same share of the activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, SupportsIndex, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import as_list, check_int, check_name, resolve_indices
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.split import block_hook
from tlcoupling.linalg.haar import haar_of
from tlcoupling.precision import full_precision

Site = Literal["attn_out", "mlp_out", "resid_pre"]
Place = Literal["attn_out", "mlp_out", "resid_pre", "resid_post"]
Positions = SupportsIndex | Iterable[SupportsIndex] | None
Intervention = tuple[str, Callable[..., Any]]  # hook point and hook, as TransformerLens takes them


def project_out(
    directions: Float[Tensor, "*d"], layer: int, site: Site = "mlp_out", positions: Positions = None
) -> Intervention:
    r"""Return a hook that removes directions from an activation, a -> a - Q Q^T a.

    Args:
        directions: ``[d_model]``, ``[d_model, k]`` (columns span the subspace; they need not be orthonormal), or one
            subspace for each position, ``[pos, d_model, k]``.
        layer: block index.
        site: ``"attn_out"`` or ``"mlp_out"``, a sublayer's write; or ``"resid_pre"``, the residual stream.
        positions: one, several, or None for all; negative ones count from the end of the hooked activation.

    Returns:
        ``(hook_name, function)``, an item of ``fwd_hooks=``.

    Raises:
        ArgumentError: directions that are linearly dependent, not finite or of another shape, an unknown site, a
            negative layer. When the hook runs: another width, or an unknown position.

    Example:
        >>> u = tlc.truncated_svd(tlc.residual_jacobian(trace, 5, "mlp"), 10).u  # doctest: +SKIP
        >>> model.run_with_hooks(tokens, fwd_hooks=[tlc.project_out(u, 5, "mlp_out")])  # doctest: +SKIP
    """
    return _intervention(directions, layer, site, positions, lambda activation, part: activation - part)


def keep_only(
    directions: Float[Tensor, "*d"], layer: int, site: Site = "mlp_out", positions: Positions = None
) -> Intervention:
    """Return a hook that keeps only an activation's component along some directions, a -> Q Q^T a.

    Arguments, return value and errors are those of ``project_out``.
    """
    return _intervention(directions, layer, site, positions, lambda activation, part: part)


def add_direction(
    vector: Float[Tensor, " d_model"],
    layer: int,
    site: Place = "resid_post",
    positions: Positions = None,
    scale: float = 1.0,
) -> Intervention:
    r"""Return a hook that adds a vector to an activation, a -> a + scale v: steering.

    Args:
        vector: v.
        layer: block index.
        site: ``"resid_pre"`` or ``"resid_post"``, the residual stream; ``"attn_out"`` or ``"mlp_out"``, a sublayer's
            write.
        positions: one, several, or None for all; negative ones count from the end of the hooked activation.
        scale: by what the vector is multiplied.

    Returns:
        ``(hook_name, function)``, an item of ``fwd_hooks=``.

    Raises:
        ArgumentError: a vector that is not finite or of another shape, an unknown site, a negative layer. When the
            hook runs: another width, or an unknown position.

    Example:
        >>> steer = tlc.add_direction(vectors.v[:, 0], 5, scale=4.0)  # doctest: +SKIP
        >>> with model.hooks(fwd_hooks=[steer]):  # doctest: +SKIP
        ...     model.generate("I think", max_new_tokens=20)
    """
    check_name("site", site, get_args(Place))
    layer = check_int("layer", layer, 0, note="the index of a block")
    if vector.ndim != 1 or not vector.isfinite().all():
        raise ArgumentError("vector", tuple(vector.shape), "a vector [d_model] of finite numbers")
    name, chosen = block_hook(layer, f"hook_{site}"), None if positions is None else as_list(positions)
    moved = scale * vector.detach()

    def act(activation: Tensor, hook: Any) -> Tensor:
        n_tokens, width = activation.shape[-2:]
        if len(moved) != width:
            raise ArgumentError("vector", tuple(vector.shape), f"a vector of width {width}, that of {name}")
        rows = torch.tensor(resolve_indices("positions", chosen, n_tokens), device=activation.device)
        return activation.index_copy(-2, rows, activation.index_select(-2, rows) + moved.to(activation))

    return name, act


@full_precision()
def random_directions(
    directions: Float[Tensor, "d_model k"],
    activation: Float[Tensor, " d_model"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, "d_model k"]:
    r"""Return a random subspace with the same share of an activation's norm as given directions: their control.

    Let Q be an orthonormal basis of the directions and rho = ||Q^T a|| / ||a||. The random subspace is spanned by
    r_1 = rho a / ||a|| + sqrt(1 - rho^2) w, with w a uniformly random unit vector orthogonal to a, and by k - 1 random
    orthonormal vectors orthogonal to a and w. So R^T a = (rho ||a||, 0, ..., 0) exactly. This is the distribution of a
    Haar-random k-dimensional subspace, given its share of a: in any subspace, the normalised projection of a has the
    form of r_1, and the rest of the subspace is orthogonal to a.

    Args:
        directions: the directions to match.
        activation: a, the activation that the intervention changes.
        generator: source of the random numbers; by default torch's global one.

    Returns:
        An orthonormal basis R, of the dtype and on the device of ``directions``.

    Raises:
        ArgumentError: see ``project_out``; an activation of length zero, which has no share; or k = d_model, where the
            whole space is the only subspace.
    """
    basis = orthonormal(directions)
    width, k = basis.shape[-2:]
    if basis.ndim != 2 or activation.shape != (width,):
        shapes = f"{tuple(directions.shape)} and activation {tuple(activation.shape)}"
        raise ArgumentError("directions", shapes, "[d_model, k] with an activation [d_model]")
    if k >= width:
        raise ArgumentError("directions", f"{k} of them", f"fewer than d_model = {width}")
    size = activation.norm()
    if not (size > 0 and size.isfinite()):
        raise ArgumentError("activation", f"a vector of length {float(size)}", "a finite one, not zero")
    along = activation.to(basis) / size.to(basis)
    share = (basis.mT @ along).norm().clamp(max=1.0)
    noise = torch.randn(width, k, generator=generator, dtype=torch.float64).to(basis)
    frame = haar_of(torch.cat([along[:, None], noise], dim=1))[..., 1:]  # orthogonal to a
    first = share * along + (1 - share.square()).sqrt() * frame[:, 0]
    return torch.cat([first[:, None], frame[:, 1:]], dim=1)


def orthonormal(directions: Float[Tensor, "*d"]) -> Float[Tensor, "*batch d_model k"]:
    """Return an orthonormal basis of the span of directions, in float32 or float64.

    Raises:
        ArgumentError: no directions, or linearly dependent or non-finite ones.
    """
    columns = directions[:, None] if directions.ndim == 1 else directions
    if columns.ndim not in (2, 3) or not 1 <= columns.shape[-1] <= columns.shape[-2]:
        raise ArgumentError("directions", tuple(directions.shape), "[d_model], [d_model, k] or [pos, d_model, k]")
    columns = columns.detach().to(torch.float64)
    if not columns.isfinite().all():
        raise ArgumentError("directions", "NaN or infinite numbers", "finite numbers")
    values = torch.linalg.svdvals(columns)
    floor = values[..., 0] * columns.shape[-2] * torch.finfo(directions.dtype).eps
    if not (values[..., -1] > floor).all():
        raise ArgumentError("directions", f"{columns.shape[-1]} of them", "linearly independent directions, not zero")
    dtype = directions.dtype if directions.dtype == torch.float64 else torch.float32
    return torch.linalg.qr(columns).Q.to(dtype)


def _intervention(
    directions: Tensor, layer: int, site: str, positions: Positions, combine: Callable[[Tensor, Tensor], Tensor]
) -> Intervention:
    check_name("site", site, get_args(Site))
    layer = check_int("layer", layer, 0, note="the index of a block")
    basis, name = orthonormal(directions), block_hook(layer, f"hook_{site}")
    chosen = None if positions is None else as_list(positions)

    @full_precision()
    def act(activation: Tensor, hook: Any) -> Tensor:
        n_tokens, width = activation.shape[-2:]
        if basis.shape[-2] != width:
            raise ArgumentError("directions", tuple(directions.shape), f"directions of width {width}, that of {name}")
        rows = resolve_indices("positions", chosen, n_tokens)
        if basis.ndim == 3 and len(basis) != len(rows):
            raise ArgumentError(
                "directions", tuple(directions.shape), f"one subspace for each of {len(rows)} positions"
            )
        index = torch.tensor(rows, device=activation.device)
        picked = activation.index_select(-2, index)
        q = basis.to(picked)
        part = (q @ (q.mT @ picked[..., None]))[..., 0]
        return activation.index_copy(-2, index, combine(picked, part))

    return name, act
