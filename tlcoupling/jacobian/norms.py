r"""Norms: what a norm module does, read from its outputs for a few inputs.

n(x) = g * x_hat + b with x_hat = C x / r and r = sqrt(mean((C x)^2) + eps); C subtracts the mean (LayerNorm) or is the
identity (RMSNorm). Five probes and the actual inputs determine g, b, eps and C. The module's class does not matter, nor
how it stores them: a gain folded into the next weight, one kept as 1 + w (Gemma), a norm of queries or keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.block import Uncovered, close
from tlcoupling.jacobian.parts import NormMap

# Small enough that eps (1e-6 to 1e-5 in models) shows in what the norm makes of a probe of this size.
_SMALL = 1e-3


@dataclass(frozen=True)
class Norm:
    """n(x) = g * C x / sqrt(mean((C x)^2) + eps) + b.

    Attributes:
        gain, bias: g and b.
        eps: a number.
        centered: whether C subtracts the mean.
    """

    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    eps: Float[Tensor, ""]
    centered: bool

    @classmethod
    def read(cls, module: Callable[[Tensor], Tensor], inputs: Float[Tensor, "row d"], name: str) -> Norm:
        """Read a norm off its outputs for +s, -s, s + 3 and +-s / 1000 (s of alternating signs), and check ``inputs``.

        Raises:
            Uncovered: it is neither a LayerNorm nor an RMSNorm of those inputs.
        """
        signs = torch.ones_like(inputs[0])
        signs[::2] = -1.0
        probes = torch.stack([signs, -signs, signs + 3.0, _SMALL * signs, -_SMALL * signs])
        with torch.no_grad():
            out = module(torch.cat([probes, inputs])[None])[0].to(inputs)
        centered = close(out[2], out[0])
        inner = signs - signs.mean() if centered else signs
        square = inner.square().mean()
        large, small = (out[0] - out[1]) / 2, (out[3] - out[4]) / 2
        # |large|^2 / |small|^2 = (t^2 m + eps) / (t^2 (m + eps)), with t the size of the small probe, m its mean square
        ratio = large.square().sum() / small.square().sum()
        eps = _SMALL**2 * square * (ratio - 1) / (1 - _SMALL**2 * ratio)
        norm = cls(large * (square + eps).sqrt() / inner, (out[0] + out[1]) / 2, eps, centered)
        if not close(norm(inputs), out[5:]):
            raise Uncovered(f"{name} is neither a LayerNorm nor an RMSNorm of its input")
        return norm

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """n(x)."""
        normalized, _ = self._normalize(x)
        return self.gain * normalized + self.bias

    def derivative(self, x: Float[Tensor, " d"]) -> NormMap:
        """The Jacobian at x."""
        normalized, scale = self._normalize(x)
        return NormMap(normalized, scale[0], self.gain, self.centered)

    def parts(self, parts: Float[Tensor, "part row d"], x: Float[Tensor, "row d"]) -> Float[Tensor, "part row d"]:
        """Norm parts of x with the scale of x held fixed: where the parts sum to x, the results sum to n(x) - b."""
        _, scale = self._normalize(x)
        inner = parts - parts.mean(-1, keepdim=True) if self.centered else parts
        return self.gain * inner / scale

    def _normalize(self, x: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch 1"]]:
        """x_hat and r."""
        inner = x - x.mean(-1, keepdim=True) if self.centered else x
        scale = (inner.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return inner / scale, scale
