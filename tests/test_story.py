"""The story world: its rules, its captions, and a reader that is right on what was really drawn."""

import numpy as np
import pytest

from utils.sprites.read import look
from utils.sprites.story import CHANCE, first_frame, recall, render_story, sample_story, score_story
from utils.sprites.world import HELD_OUT_START, SHAPES, caption, parse_caption

STORIES = [sample_story(0, index, chunks=8) for index in range(40)]


def test_a_story_is_a_function_of_its_arguments():
    assert sample_story(0, 3, 8) == STORIES[3] != sample_story(1, 3, 8)


def test_a_character_keeps_its_looks_and_its_first_shot_says_them():
    for story in STORIES:
        seen = {}
        for shot in story.shots:
            spec, facts = shot.spec, parse_caption(caption(shot.spec))
            looks = (spec.colour, spec.background, spec.pattern, spec.diameter)
            assert shot.returning == (spec.shape in seen) and seen.setdefault(spec.shape, looks) == looks
            assert (facts.shape, facts.pattern, facts.motion) == (spec.shape, spec.pattern, spec.motion)
            hidden = (None, None) if shot.returning else (spec.colour, spec.background)
            assert (facts.colour, facts.background) == hidden
        colours, grounds, *_ = zip(*seen.values(), strict=True)
        assert len(set(colours)) == len(colours) and len(set(grounds)) == len(grounds)


def test_shots_are_cut_at_chunks_and_know_how_long_ago_they_were_seen():
    story = sample_story(5, 1, chunks=40, shot_chunks=(1, 6))
    assert sum(shot.chunks for shot in story.shots) == 40 == len(story.captions)
    for number, shot in enumerate(story.shots):
        assert shot.start == sum(before.chunks for before in story.shots[:number])
        if number:
            assert shot.spec.shape != story.shots[number - 1].spec.shape
        if shot.returning:
            last = max(k for k in range(number) if story.shots[k].spec.shape == shot.spec.shape)
            assert shot.between == number - last - 1 > 0
            assert shot.since == shot.start - story.shots[last].start - story.shots[last].chunks
    assert {shot.spec.shape for shot in story.shots} == set(SHAPES)


def test_frames_of_chunks():
    assert [first_frame(chunk) for chunk in range(4)] == [0, 9, 21, 33]
    assert render_story(STORIES[0]).shape == (93, 64, 96, 3)


def test_training_stories_show_no_held_out_pair():
    assert not any(shot.spec.pair_held_out for story in STORIES for shot in story.shots)
    held_out = [sample_story(0, HELD_OUT_START + index, 8) for index in range(40)]
    assert any(shot.spec.pair_held_out for story in held_out for shot in story.shots)


def test_the_reader_is_right_on_what_was_drawn():
    marks = [mark for story in STORIES for mark in score_story(render_story(story), story)]
    found = recall(marks)
    assert len(marks) > 500
    for attribute in ("colour", "background", "pattern", "shape", "size"):
        assert found[attribute] >= 0.99, attribute


@pytest.mark.parametrize("attribute", CHANCE)
def test_the_reader_tells_whose_colour_a_wrong_one_is(attribute):
    """Videos in which every shot shows the looks of the shot before."""
    found = {}
    for story in STORIES:
        shots, frames = story.shots, []
        for number, shot in enumerate(shots):
            spec = shots[max(number - 1, 0)].spec
            frames.append(render_story(type(story)((type(shot)(spec, shot.start, shot.chunks, False),))))
        for mark in score_story(np.concatenate(frames), story):
            if mark.attribute == attribute:
                found[mark.confused] = found.get(mark.confused, 0) + 1
    assert set(found) == {"last"}


def test_size_is_read_in_pixels():
    for story in STORIES[:10]:
        shot = story.shots[0]
        assert look(render_story(story)[:9]).diameter == pytest.approx(shot.spec.diameter * 64, rel=0.06)
