"""Groups of Jacobians: which of them are held at the same time."""

from __future__ import annotations

from cases import CASES, TOKENS

import tlcoupling as tlc


def test_jacobians_that_no_later_group_needs_are_let_go():
    """Token-wise coupling compares tokens within a layer, so that three layers take hardly more memory than one."""
    one, three = (
        tlc.estimate(CASES[0].model(), TOKENS, 4, token_layers=layers).memory_bytes for layers in ([0], [0, 1, 2])
    )
    layer = 3 * len(TOKENS) * 32**2 * 8  # the matrices of one: of each sublayer and token
    assert one <= three < one + layer / 2
