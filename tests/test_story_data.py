"""Stories as training clips: a caption and a weight a chunk, beside clips of one shot."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny import vae as tiny_vae

from pipeline.data.latents import LatentData
from pipeline.data.vae_clip import encode_frames
from utils.config import ConfigError
from utils.distributed import World
from utils.load_config import load_config
from utils.sprites.story import render_stills, render_story, sample_story
from utils.train_config import StoryConfig


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return AutoencoderKLWan.from_pretrained(folder).eval()


def load(vae, folder, frames_per_chunk, clips=4):
    config = load_config("configs/tiny/ar_diffusion.yaml")
    config.video.height, config.video.width, config.video.frames_per_chunk = 32, 48, frames_per_chunk
    config.data.path, config.data.vae = str(folder), vae.config._name_or_path
    config.data.num_clips, config.data.num_stills, config.data.clip_frames = clips, 0, 45
    config.data.stories = StoryConfig(count=5, chunks=4, share=0.5, first_weight=0.25)
    return LatentData.load(config, torch.device("cpu"), World())


def test_samples_are_stories_with_a_caption_and_a_weight_a_chunk_or_clips(vae, tmp_path):
    data = load(vae, tmp_path, frames_per_chunk=3)
    stories = {tuple(sample_story(0, i, 4).captions): sample_story(0, i, 4) for i in range(5)}
    told = 0
    for index in range(40):
        clip = data.sample(0, index, 12)
        assert clip.latents.shape == (4, 12, 4, 6) and len(clip.captions) == 4
        if clip.weights is None:
            assert len(set(clip.captions)) == 1
            continue
        told += 1
        story = stories[tuple(clip.captions)]
        assert clip.weights == [1.0 if back else 0.25 for back in story.returning]
        direct = encode_frames(vae, render_story(story, 32, 48)[None])[0]
        assert (clip.latents.float() - direct).abs().max() < 0.05 * direct.std()
        assert data.sample(0, index, 6).captions == clip.captions[:2]
    assert 10 < told < 30


def test_stills_are_encoded_one_by_one(vae, tmp_path):
    data = load(vae, tmp_path, frames_per_chunk=1, clips=0)
    clip = data.sample(0, 3, 4)
    story = next(s for s in (sample_story(0, i, 4) for i in range(5)) if s.captions == clip.captions)
    stills = render_stills(story, 32, 48)
    assert np.array_equal(stills[0], render_story(story, 32, 48)[6])  # the middle of the first shot
    direct = torch.cat([encode_frames(vae, frame[None, None]) for frame in stills], dim=2)[0]
    assert (clip.latents.float() - direct).abs().max() < 0.05 * direct.std()


def test_other_chunks_than_a_storys_are_refused(vae, tmp_path):
    with pytest.raises(ConfigError, match="frames_per_chunk` is 2: stories are cut in chunks of 3"):
        load(vae, tmp_path, frames_per_chunk=2)
