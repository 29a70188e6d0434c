"""Haar-random frames: orthonormal, and distributed as any rotation of them."""

from __future__ import annotations

import torch

from tlcoupling.linalg.haar import haar_of


def test_frames_are_orthonormal_and_have_the_signs_that_make_them_haar():
    normal = torch.randn(5, 12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frames = haar_of(normal)
    torch.testing.assert_close(frames.mT @ frames, torch.eye(4, dtype=torch.float64).expand(5, 4, 4))
    assert ((frames.mT @ normal).diagonal(dim1=-2, dim2=-1) > 0).all()


def test_a_rotated_sample_gives_the_rotated_frame():
    """So the distribution of frames is that of their rotations, as the entries' is."""
    normal = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = haar_of(torch.randn(12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    torch.testing.assert_close(haar_of(rotation @ normal), rotation @ haar_of(normal))
