"""Operators compose by @, + and .T, a user's own among them: products from both sides are those of the matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError
from tlcoupling.jacobian.parts import HeadMap, NormMap
from tlcoupling.linalg.maps import Diagonal, Identity, Projection, Shared, Zero

F64 = torch.float64


class Outer(tlc.JacobianOperator):
    """A user's own: u v^T, with nothing but what has to be given."""

    def __init__(self, u: Tensor, v: Tensor) -> None:
        self.u, self.v = u, v
        self.shape, self.dtype, self.device = (len(u), len(v)), u.dtype, u.device

    def mm(self, x: Tensor) -> Tensor:
        return self.u[:, None] * (self.v @ x)

    def rmm(self, y: Tensor) -> Tensor:
        return self.v[:, None] * (self.u @ y)


def leaf(rows: int, columns: int, kind: int) -> tuple[tlc.JacobianOperator, Tensor]:
    """An elementary operator and its matrix, written down apart from it."""
    u, v, weight = torch.randn(rows, dtype=F64), torch.randn(columns, dtype=F64), torch.randn(rows, columns, dtype=F64)
    if rows != columns or kind < 3:
        return [
            (Projection(weight), weight),
            (Shared(Projection(weight)), weight),
            (Outer(u, v), torch.outer(u, v)),
        ][kind % 3]
    center = torch.eye(rows, dtype=F64) - 1 / rows
    unit = center @ u
    return [
        (Diagonal(u), torch.diag(u)),
        (Identity(rows, u), torch.eye(rows, dtype=F64)),
        (Zero(rows, u), torch.zeros(rows, rows, dtype=F64)),
        (
            NormMap(unit, torch.tensor(2.0, dtype=F64), v, True),
            torch.diag(v) @ (center - torch.outer(unit, unit) / rows) / 2,
        ),
        (HeadMap(weight[None], torch.tensor([0]), 1), weight),
    ][kind - 3]


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[tlc.JacobianOperator, Tensor]:
    """A composition of operators and the same composition of their matrices."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def grow(rows: int, columns: int, depth: int) -> tuple[tlc.JacobianOperator, Tensor]:
        how = draw(st.sampled_from(["leaf", "@", "+", "T"])) if depth else "leaf"
        if how == "leaf":
            return leaf(rows, columns, draw(st.integers(0, 7)))
        if how == "@":
            inner = draw(st.integers(1, 4))
            (a, left), (b, right) = grow(rows, inner, depth - 1), grow(inner, columns, depth - 1)
            return a @ b, left @ right
        if how == "+":
            (a, left), (b, right) = grow(rows, columns, depth - 1), grow(rows, columns, depth - 1)
            return a + b, left + right
        a, matrix = grow(columns, rows, depth - 1)
        return a.T, matrix.mT

    return grow(rows, columns, depth)


@given(expressions())
def test_an_expression_of_operators_is_that_of_their_matrices(made: tuple[tlc.JacobianOperator, Tensor]):
    operator, matrix = made
    m, n = matrix.shape
    x, y = torch.randn(n, 3, dtype=F64), torch.randn(m, 3, dtype=F64)
    # up to eight factors of size about 1 in float64: 1e-10 leaves six digits of room
    close = {"rtol": 1e-10, "atol": 1e-10}
    assert operator.shape == (m, n)
    torch.testing.assert_close(operator.mm(x), matrix @ x, **close)
    torch.testing.assert_close(operator.rmm(y), matrix.mT @ y, **close)
    torch.testing.assert_close(operator.mv(x[:, 0]), matrix @ x[:, 0], **close)
    torch.testing.assert_close(operator.rmv(y[:, 0]), matrix.mT @ y[:, 0], **close)
    torch.testing.assert_close(operator.dense(), matrix, **close)
    torch.testing.assert_close(operator.dense(), operator.T.dense().mT, **close)
    assert operator.product_flops >= 0 and operator.dense_flops >= 0


def test_an_operator_of_ones_own_costs_what_a_matrix_costs_until_it_says_otherwise():
    own = Outer(torch.ones(3), torch.ones(5))
    assert (own.product_flops, own.dense_flops) == (30, 150)
    own.product_flops = 8.0
    assert own.dense_flops == 150  # already known; a class that sets both does so from the start
    cheap = Outer(torch.ones(3), torch.ones(5))
    cheap.product_flops = 8.0
    assert cheap.dense_flops == 40
    assert (cheap @ cheap.T).product_flops == 16


def test_shapes_that_do_not_fit_are_refused():
    wide, tall = Outer(torch.ones(2), torch.ones(3)), Outer(torch.ones(3), torch.ones(2))
    with pytest.raises(ArgumentError, match="an operator of 3 rows"):
        wide @ wide
    with pytest.raises(ArgumentError, match=r"operators of one shape, here \(2, 3\)"):
        wide + tall
    for wrong in (lambda: wide @ torch.ones(3, 1), lambda: wide + 1):
        with pytest.raises(TypeError):
            wrong()


def test_a_solver_works_on_a_composition():
    torch.manual_seed(0)
    a, b = Projection(torch.randn(40, 30, dtype=F64)), Outer(torch.randn(40, dtype=F64), torch.randn(30, dtype=F64))
    whole = (a + b).T
    found = tlc.truncated_svd(whole, 3, solver="krylov")
    torch.testing.assert_close(found.s, torch.linalg.svdvals(whole.dense())[:3], rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_take_vectors_of_other_dtypes(dtype: torch.dtype):
    weight = torch.randn(3, 3, dtype=F64)
    whole = torch.tensor([[1, 2], [0, -3], [4, 1]], dtype=dtype)
    for operator in (Outer(weight[0], weight[1]), Projection(weight), Projection(weight).T @ Diagonal(weight[0])):
        for product in (operator.mm, operator.rmm):
            assert torch.equal(product(whole), product(whole.to(F64)))
        for product in (operator.mv, operator.rmv):
            assert torch.equal(product(whole[:, 0]), product(whole[:, 0].to(F64)))
