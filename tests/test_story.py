"""The story world: its rules, its captions, and a reader that is right on what was really drawn."""

from dataclasses import replace

import numpy as np
import pytest

from utils.sprites.look import look
from utils.sprites.recall import LEFT_OUT, SINCE, recall, recall_table, score_story
from utils.sprites.story import (
    Story,
    first_frame,
    num_chunks,
    read_story,
    render_story,
    sample_return,
    sample_story,
)
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
    assert [num_chunks(frames) for frames in (8, 9, 20, 21, 93)] == [0, 1, 1, 2, 8]
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


@pytest.mark.parametrize("attribute", LEFT_OUT)
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


@pytest.mark.parametrize(("since", "between", "lengths"), [
    (1, None, [1]), (4, None, [2, 2]), (16, None, [8, 8]), (64, None, [16] * 4), (7, 3, [2, 2, 3]), (5, 1, [5]),
])  # fmt: skip
def test_a_return_comes_after_the_gap_asked_for(since, between, lengths):
    story = sample_return(0, HELD_OUT_START, since, between)
    first, *fill, last = story.shots
    assert [shot.chunks for shot in fill] == lengths and first.spec.shape == last.spec.shape
    assert (last.since, last.between, last.returning, first.returning) == (since, len(lengths), True, False)
    assert first.spec.shape not in {shot.spec.shape for shot in fill}
    assert all(one.spec.shape != other.spec.shape for one, other in zip(fill[:-1], fill[1:], strict=True))
    assert sample_return(0, HELD_OUT_START, since, between) == story != sample_return(1, HELD_OUT_START, since, between)


def test_a_schedule_tells_the_story():
    """All but sizes, speeds and places: what a sidecar holds is enough to score a video."""
    for story in STORIES[:10]:
        told = read_story(story.schedule, 8)
        for shot, original in zip(told.shots, story.shots, strict=True):
            looks = ("colour", "shape", "background", "pattern", "motion", "say_colour", "say_background")
            assert all(getattr(shot.spec, name) == getattr(original.spec, name) for name in looks)
            assert vars(shot) | {"spec": 0} == vars(original) | {"spec": 0}
        frames = render_story(story)
        assert score_story(frames, told) == score_story(frames, story)
    assert len(read_story(story.schedule, 3).shots) == sum(shot.start < 3 for shot in story.shots)
    with pytest.raises(ValueError, match="leaves out what no shot"):
        read_story([{"at": 0, "prompt": "a circle bounces over a plain"}], 1)


def test_size_is_recalled_from_the_first_shot_that_was_made():
    story = sample_return(0, HELD_OUT_START, 1)
    first, other, last = story.shots

    def scored(*factors):
        shots = [replace(shot, spec=replace(shot.spec, diameter=shot.spec.diameter * factor))
                 for shot, factor in zip(story.shots, factors, strict=True)]  # fmt: skip
        return recall(score_story(render_story(Story(tuple(shots))), story))["size"]

    assert (scored(0.9, 1, 0.9), scored(0.85, 1, 1), scored(1, 0.8, 1)) == (1.0, 0.0, 1.0)


def test_recall_is_told_apart_by_time_and_shots_between():
    marks = []
    for since in (1, 2, 16, 17, 65):
        story = sample_return(0, HELD_OUT_START, since, 1)
        told = Story(tuple(replace(shot, spec=replace(shot.spec, background="white")) for shot in story.shots))
        marks += score_story(render_story(told), story)  # no ground is right, but that of one who had a white one
    table = recall_table(marks)
    assert {name: found["shots"] for name, found in table["since"].items()} == dict.fromkeys(
        ("1", "4", "16", "64", "over 64"), 1
    )
    assert list(table["between"]) == ["1"] and table["all"][""]["shots"] == 5 and SINCE == (1, 4, 16, 64)
    assert table["all"][""]["background"] == sum(m.right for m in marks if m.attribute == "background") / 5 < 1
    assert recall_table([]) == {}


def test_first_shots_are_scored_apart():
    marks = score_story(render_story(STORIES[0]), STORIES[0], returning=False)
    assert len(marks) == 5 * 3 and all(mark.right for mark in marks)


def test_an_opening_keeps_the_character_that_returns_out_of_the_sink():
    opening, first, *fill, last = sample_return(0, HELD_OUT_START, 4, opening=2).shots
    assert opening.chunks == 2 and opening.spec.shape != first.spec.shape == last.spec.shape
    assert first.start == 2 and last.since == 4 == sum(shot.chunks for shot in fill)
    assert not first.returning and last.returning
