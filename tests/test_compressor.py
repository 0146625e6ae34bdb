"""Shapes of chunks and of their compressed form."""

import pytest
import torch
from oracle import OracleWan
from toy import LATENT, randn, toy_chunk, toy_model

from model.cache.selection import sampled_queries
from model.compressor import HRSpatialCompressor, compressed_grid
from model.geometry import ChunkGeometry


def test_wan_at_480p():
    geometry = ChunkGeometry(3, 60, 104)
    assert geometry.grid == (30, 52) and geometry.tokens_per_frame == 1560 and geometry.tokens == 4680
    assert compressed_grid("hr_spatial", geometry, [64, 256, 1024]) == (3, 7, 13)
    assert compressed_grid("identity", geometry, [64, 256, 1024]) == (3, 30, 52)


@pytest.mark.parametrize(
    ("latent", "stages", "grid"),
    [((60, 104), 3, (7, 13)), ((2, 2), 3, (1, 1)), ((8, 12), 2, (2, 3)), ((10, 14), 2, (2, 3)), ((6, 30), 3, (1, 3)),
     ((8, 12), 1, (4, 6))],
)  # fmt: skip
def test_grid_is_the_latents_over_a_power_of_two(latent, stages, grid):
    channels = (4,) * stages
    assert compressed_grid("hr_spatial", ChunkGeometry(3, *latent), channels)[1:] == grid
    for frames in (1, 3, 4):
        tokens = HRSpatialCompressor(4, channels, 10)(randn(2, 4, frames, *latent, seed=1))
        assert tokens.shape == (2, frames * grid[0] * grid[1], 10)


@pytest.mark.parametrize("latent", [LATENT, (2, 2), (10, 6)])
def test_layers_are_the_papers(latent):
    """k(1,3,3) s(1,2,2) p(0,1,1) convolutions with SiLU, a pointwise one, pooling; tokens frame after frame."""
    model = toy_model()
    latents = toy_chunk(0, latent=latent)
    expected = OracleWan(model).compress(latents[0])
    torch.testing.assert_close(model.pack_compressor(latents)[0].double(), expected, atol=1e-5, rtol=0)


def test_frames_are_compressed_apart():
    compressor = toy_model().pack_compressor
    latents = toy_chunk(0)
    per_frame = [compressor(latents[:, :, f : f + 1]) for f in range(3)]
    torch.testing.assert_close(compressor(latents), torch.cat(per_frame, dim=1), atol=1e-6, rtol=0)


def test_parameters_of_the_reference():
    names = set(HRSpatialCompressor(16, (64, 256, 1024), 1536).state_dict())
    assert names == {f"net.{i}.{kind}" for i in (0, 2, 4, 6) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((3, 7, 12), "latent height is 7: must be a positive multiple of the patch, 2"),
     ((3, 8, 0), "latent width is 0"), ((0, 8, 12), "frames per chunk is 0")],
)  # fmt: skip
def test_impossible_sizes(sizes, words):
    with pytest.raises(ValueError, match=words):
        ChunkGeometry(*sizes)


def test_a_time_patch_is_refused():
    with pytest.raises(ValueError, match="needs a time patch of 1"):
        ChunkGeometry(3, 8, 12, (2, 2, 2))


@pytest.mark.parametrize(
    ("tokens", "fraction", "minimum", "count"), [(4680, 0.125, 32, 585), (72, 0.125, 32, 32), (20, 0.125, 32, 20)]
)
def test_sampled_queries_are_spread_evenly(tokens, fraction, minimum, count):
    """index floor(n * N / target), at least `minimum` of them and never more than there are."""
    index = sampled_queries(tokens, fraction, minimum).tolist()
    assert index == [n * tokens // count for n in range(count)]
    assert len(set(index)) == count and index[-1] < tokens


def test_under_autocast_gradients_are_those_of_float32():
    """Autocast must not reach the convolutions: oneDNN's bfloat16 backward is wrong on tiny grids without AMX."""
    torch.manual_seed(0)
    compressor = HRSpatialCompressor(16, (64, 256), 256)
    latents = torch.randn(2, 16, 3, 4, 8)
    gradients = []
    for enabled in (False, True):
        compressor.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            compressor(latents).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in compressor.parameters()])
    for plain, autocast in zip(*gradients, strict=True):
        torch.testing.assert_close(autocast, plain)
