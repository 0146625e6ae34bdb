"""Shapes of chunks and of their compressed form."""

import pytest
import torch
from oracle import OracleWan
from toy import LATENT, randn, toy_chunk, toy_model

from model.cache.selection import sampled_queries
from model.compressor import COMPRESSORS
from model.geometry import ChunkGeometry


def test_wan_at_480p():
    geometry = ChunkGeometry(3, 60, 104)
    assert geometry.grid == (30, 52) and geometry.tokens_per_frame == 1560 and geometry.tokens == 4680


PAPER, SEED = [128, 512, 2048], [64, 256, 1024]


@pytest.mark.parametrize(
    ("kind", "frames", "channels", "grid"),
    [("hr_spatial", 3, SEED, (3, 7, 13)), ("hr_spatial", 4, SEED, (4, 7, 13)), ("identity", 3, SEED, (3, 30, 52)),
     ("hr_spatiotemporal", 4, PAPER, (2, 7, 13)), ("hr_spatiotemporal", 3, PAPER, (1, 7, 13)),
     ("hr_spatiotemporal", 1, PAPER, (1, 7, 13))],
)  # fmt: skip
def test_tokens_of_a_wan_chunk(kind, frames, channels, grid):
    """Seed: 273 tokens of 3 frames. Paper: floor(B_f / 2) * floor(h / 4) * floor(w / 4) of 30x52, 182 of 4 frames."""
    assert COMPRESSORS[kind].grid(ChunkGeometry(frames, 60, 104), channels) == grid


@pytest.mark.parametrize(
    ("latent", "stages", "grid"),
    [((60, 104), 3, (7, 13)), ((2, 2), 3, (1, 1)), ((8, 12), 2, (2, 3)), ((10, 14), 2, (2, 3)), ((6, 30), 3, (1, 3)),
     ((8, 12), 1, (4, 6))],
)  # fmt: skip
def test_grid_is_the_latents_over_a_power_of_two(latent, stages, grid):
    channels = (4,) * stages
    for frames, halved in ((1, 1), (3, 1), (4, 2)):
        for kind, kept in (("hr_spatial", frames), ("hr_spatiotemporal", halved)):
            assert COMPRESSORS[kind].grid(ChunkGeometry(frames, *latent), channels) == (kept, *grid)
            tokens = COMPRESSORS[kind](4, channels, 10)(randn(2, 4, frames, *latent, seed=1))
            assert tokens.shape == (2, kept * grid[0] * grid[1], 10)


@pytest.mark.parametrize("latent", [LATENT, (2, 2), (10, 6)])
@pytest.mark.parametrize("kind", ["hr_spatial", "hr_spatiotemporal"])
def test_layers_are_the_papers(kind, latent):
    """Strided convolutions with SiLU, a pointwise one, pooling; tokens frame after frame."""
    model = toy_model(compressor=kind)
    latents = toy_chunk(0, latent=latent)
    expected = OracleWan(model).compress(latents[0])
    torch.testing.assert_close(model.pack_compressor(latents)[0].double(), expected, atol=1e-5, rtol=0)


def test_frames_are_compressed_apart():
    compressor = toy_model().pack_compressor
    latents = toy_chunk(0)
    per_frame = [compressor(latents[:, :, f : f + 1]) for f in range(3)]
    torch.testing.assert_close(compressor(latents), torch.cat(per_frame, dim=1), atol=1e-6, rtol=0)


def test_parameters_of_the_reference():
    names = set(COMPRESSORS["hr_spatial"](16, SEED, 1536).state_dict())
    assert names == {f"net.{i}.{kind}" for i in (0, 2, 4, 6) for kind in ("weight", "bias")}


def test_stages_of_the_papers_figure():
    """Figure 2d: 16 -> 32 at stride (2,1,1), -> 128 -> 512 -> 2048 at (1,2,2), -> D."""
    with torch.device("meta"):
        stages = [x for x in COMPRESSORS["hr_spatiotemporal"](16, PAPER, 1536).net if isinstance(x, torch.nn.Conv3d)]
    assert [(x.in_channels, x.out_channels) for x in stages] == [
        (16, 32), (32, 128), (128, 512), (512, 2048), (2048, 1536)
    ]  # fmt: skip
    assert [x.stride for x in stages] == [(2, 1, 1), *[(1, 2, 2)] * 3, (1, 1, 1)]


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
    compressor = COMPRESSORS["hr_spatial"](16, (64, 256), 256)
    latents = torch.randn(2, 16, 3, 4, 8)
    gradients = []
    for enabled in (False, True):
        compressor.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            compressor(latents).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in compressor.parameters()])
    for plain, autocast in zip(*gradients, strict=True):
        torch.testing.assert_close(autocast, plain)
