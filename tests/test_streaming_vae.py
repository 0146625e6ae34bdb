"""Streamed decoding against the library's one-shot decode."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from pipeline.data.vae_clip import denormalise
from pipeline.generate.vae_stream import StreamingDecoder

FRAMES = 7  # latent


def small_vae(patch_size):
    torch.manual_seed(0)
    channels = 3 if patch_size is None else 3 * patch_size**2
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2] if patch_size is None else [1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True] if patch_size is None else [True, True],
        in_channels=channels,
        out_channels=channels,
        patch_size=patch_size,
        latents_mean=[0.5, -0.5, 1.0, 0.0],
        latents_std=[2.0, 1.0, 0.5, 1.5],
    )
    # The default start is so quiet that every clip decodes to nearly the same grey.
    for parameter in vae.decoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return vae.eval()


@pytest.fixture(scope="module", params=[None, 2], ids=["pixels", "patch2"])
def vae(request):
    return small_vae(request.param)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(1, 4, FRAMES, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def one_shot(vae, latents):
    vae = small_vae(vae.config.patch_size)  # the library's own, untouched
    with torch.no_grad():
        return vae.decode(denormalise(vae, latents)).sample


def stream(vae, latents, chunk):
    decoder = StreamingDecoder(vae)
    return [decoder.decode(piece) for piece in latents.split(chunk, dim=2)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, FRAMES])
def test_equals_one_shot_decode(vae, latents, one_shot, chunk):
    pieces = stream(vae, latents, chunk)
    assert [piece.shape[2] for piece in pieces[:-1]] == [4 * chunk - 3 * (i == 0) for i in range(len(pieces) - 1)]
    streamed = torch.cat(pieces, dim=2)
    assert streamed.shape == one_shot.shape == (1, 3, 4 * FRAMES - 3, 32, 48)
    assert one_shot.std() > 0.05  # else everything would be equal
    torch.testing.assert_close(streamed, one_shot, atol=1e-4, rtol=0)


def test_streams_side_by_side_do_not_disturb_each_other(vae, latents, one_shot):
    other = latents.flip(2)
    alone = torch.cat(stream(vae, other, 2), dim=2)
    first, second = StreamingDecoder(vae), StreamingDecoder(vae)
    outputs = ([], [])
    for piece, other_piece in zip(latents.split(2, dim=2), other.split(2, dim=2), strict=True):
        outputs[0].append(first.decode(piece))
        outputs[1].append(second.decode(other_piece))
        with torch.no_grad():
            vae.decode(other_piece)  # the library's own call in between, which resets the VAE's caches
    torch.testing.assert_close(torch.cat(outputs[0], dim=2), one_shot, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(outputs[1], dim=2), alone)


def test_state_does_not_grow(vae, latents):
    decoder = StreamingDecoder(vae)
    sizes = []
    for piece in latents.split(1, dim=2):
        decoder.decode(piece)
        features = decoder._tiles[0, 0].last
        sizes.append(sum(feature.numel() for feature in features if isinstance(feature, torch.Tensor)))
    assert sizes[2] == sizes[-1]


def test_denormalise(vae):
    latents = torch.zeros(1, 4, 1, 1, 1)
    latents[0, 1] = 2.0
    assert denormalise(vae, latents).flatten().tolist() == [0.5, 1.5, 1.0, 0.0]


def test_wrong_channels(vae):
    with pytest.raises(ValueError, match="3 channels"):
        StreamingDecoder(vae).decode(torch.zeros(1, 3, 1, 4, 6))


def test_in_bfloat16_it_is_as_near_to_float32_as_the_library(vae, latents, one_shot):
    ours, theirs = (small_vae(vae.config.patch_size).bfloat16() for _ in range(2))
    with torch.no_grad():
        theirs = theirs.decode(denormalise(theirs, latents)).sample
    ours = torch.cat(stream(ours, latents, 2), dim=2)
    assert ours.dtype == torch.bfloat16
    assert (ours - one_shot).abs().mean() < 1.1 * (theirs - one_shot).abs().mean()
