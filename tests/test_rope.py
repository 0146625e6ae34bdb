"""Rotary positions by formula, against complex exponentials and diffusers' table."""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from oracle import rotate, token_positions
from toy import randn

from model.geometry import ChunkGeometry
from model.rope import (
    chunk_rotation,
    frame_times,
    grid_positions,
    grid_rotation,
    rope_dims,
    time_rotation,
)

HEAD_DIMS = (12, 16, 20, 48, 64, 128)


def axis(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_channels_are_split_as_in_wan(dim):
    assert rope_dims(dim) == (dim - 4 * (dim // 6), 2 * (dim // 6), 2 * (dim // 6))
    assert rope_dims(128) == (44, 42, 42)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(
    "times", [axis(0, 1, 2), axis(-7, -6, -5), axis(-0.25, 0.5, 1.25), axis(1023, 1024, 250000.5)], ids=str
)
def test_rotation_is_the_complex_exponential(dim, times):
    rows, cols = axis(0, 1), axis(0.5, 2.5, 4.5)
    x = randn(1, 18, 2, dim, seed=1)
    expected = rotate(x[0], token_positions(times.tolist(), rows.tolist(), cols.tolist()))
    torch.testing.assert_close(grid_rotation(times, rows, cols, dim)(x)[0].double(), expected, atol=2e-6, rtol=0)


def test_angles_do_not_lose_precision_far_out():
    """float32 positions times float32 frequencies would be off by 1e-2 here."""
    x, far = torch.tensor([1.0, 0.0]).repeat(6).reshape(1, 1, 1, 12), 123456.0
    turned = time_rotation(axis(far), 12)(x)[0, 0, 0]
    assert turned[0].item() == pytest.approx(math.cos(far), abs=1e-6)
    assert turned[1].item() == pytest.approx(math.sin(far), abs=1e-6)
    assert turned[2].item() == pytest.approx(math.cos(far * 10000 ** (-2 / 4)), abs=1e-6)


@pytest.mark.parametrize("shift", [1000.0, -3.5, 1e6])
def test_only_differences_matter(shift):
    q, k = randn(1, 8, 2, 48, seed=1), randn(1, 8, 2, 48, seed=2)
    rows, cols = axis(0, 1), axis(0, 1)

    def scores(start):
        queries = grid_rotation(axis(start, start + 1), rows, cols, 48)(q)
        keys = grid_rotation(axis(start - 6, start - 2.5), rows, cols, 48)(k)
        return torch.einsum("bihd,bjhd->bhij", queries, keys)

    torch.testing.assert_close(scores(shift), scores(0.0), atol=2e-5, rtol=0)
    assert (scores(0.0) - torch.einsum("bihd,bjhd->bhij", q, k)).abs().max() > 0.1


@pytest.mark.parametrize("shift", [-3.0, 12.0, -0.75])
def test_rotating_rotated_keys_again_is_rotation_at_the_new_position(shift):
    """PackForcing eq. 10: a cached key moves in time by one more rotation, its spatial part untouched."""
    k, rows, cols = randn(1, 12, 2, 48, seed=3), axis(0, 1), axis(0, 1)
    old, new = axis(-9, -8, -7), axis(-9, -8, -7) + shift
    moved = time_rotation(torch.full((12,), shift), 48)(grid_rotation(old, rows, cols, 48)(k))
    torch.testing.assert_close(moved, grid_rotation(new, rows, cols, 48)(k), atol=1e-6, rtol=0)


def test_each_sample_may_have_times_of_its_own():
    x, rows, cols = randn(2, 8, 2, 12, seed=4), axis(0, 1), axis(0, 1)
    times = torch.stack((axis(0, 1), axis(-30, 4.5)))
    both = grid_rotation(times, rows, cols, 12)(x)
    for sample in range(2):
        assert torch.equal(both[sample], grid_rotation(times[sample], rows, cols, 12)(x)[sample])
    shifts = torch.stack((axis(*range(8)), axis(*range(8, 16))))
    both = time_rotation(shifts, 12)(x)
    for sample in range(2):
        assert torch.equal(both[sample], time_rotation(shifts[sample], 12)(x)[sample])


@pytest.mark.parametrize("dim", [12, 48, 128])
def test_diffusers_table_is_matched(dim):
    frames, h, w = 5, 3, 4
    cos, sin = WanRotaryPosEmbed(dim, (1, 2, 2), 1024)(torch.zeros(1, 4, frames, 2 * h, 2 * w))  # [1, L, 1, D]
    x = randn(1, frames * h * w, 2, dim, seed=5)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]  # each value stands there twice
    expected = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    rotation = grid_rotation(axis(*range(frames)), axis(*range(h)), axis(*range(w)), dim)
    torch.testing.assert_close(rotation(x), expected.flatten(-2), atol=2e-6, rtol=0)


def test_a_chunk_starts_where_it_is_told():
    geometry, x = ChunkGeometry(3, 4, 6), randn(1, 18, 1, 12, seed=6)
    expected = rotate(x[0], token_positions([-4.5, -3.5, -2.5], range(2), range(3)))
    turned = chunk_rotation(geometry, -4.5, 12, torch.device("cpu"))(x)
    torch.testing.assert_close(turned[0].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rotated_in_float32(dtype):
    x = randn(1, 4, 2, 12, seed=7).to(dtype)
    rotation = time_rotation(axis(0, 1, 2, 300.5), 12)
    assert rotation(x).dtype == dtype
    assert torch.equal(rotation(x), rotation(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotation_in_passes_is_the_same(dtype):
    rotation = chunk_rotation(ChunkGeometry(2, 4, 6), 5.0, 12, torch.device("cpu"))
    x = randn(2, 12, 3, 12, seed=4).to(dtype)
    exact = rotation(x.double().float())
    for rotated in (rotation(x), rotation._in_passes(x)):
        assert rotated.dtype == dtype
        torch.testing.assert_close(rotated.float(), exact, atol=0.51 * torch.finfo(dtype).eps * 4, rtol=0)


def test_rotation_under_compile_is_the_same():
    x = randn(1, 4, 2, 12, seed=8)
    rotation = time_rotation(axis(0, -1, 2.5, 300), 12)
    compiled = torch.compile(lambda y: rotation(y), backend="eager")
    torch.testing.assert_close(compiled(x), rotation(x), atol=1e-6, rtol=0)


def test_rotation_has_the_gradient_of_its_inverse():
    x, y = randn(1, 4, 2, 12, seed=9).requires_grad_(), randn(1, 4, 2, 12, seed=10)
    times = axis(0, -1, 2.5, 300)
    (time_rotation(times, 12)(x) * y).sum().backward()
    torch.testing.assert_close(x.grad, time_rotation(-times, 12)(y), atol=1e-6, rtol=0)


def test_positions_of_compressed_tokens():
    assert grid_positions(4, 30, aligned=False).tolist() == [0, 1, 2, 3]
    # 30 rows pooled to 7: each token stands for 30/7 patches
    expected = [(i + 0.5) * 30 / 7 - 0.5 for i in range(7)]
    assert grid_positions(7, 30, aligned=True).tolist() == pytest.approx(expected)
    assert grid_positions(5, 5, aligned=True).tolist() == [0, 1, 2, 3, 4]  # nothing pooled: its own place
    assert grid_positions(1, 4, aligned=True).tolist() == [1.5]  # all of the frame: its centre


def test_times_of_compressed_frames():
    assert frame_times(-6, 3, 3).tolist() == [-6, -5, -4]  # as many frames as it spans: nothing moves
    assert frame_times(-6, 4, 2).tolist() == [-5.5, -3.5]  # each stands for two frames, at their centre
    assert frame_times(0, 1.5, 3).tolist() == [-0.25, 0.25, 0.75]  # squeezed by `fit`
    assert frame_times(2, 3, 1).tolist() == [3]
