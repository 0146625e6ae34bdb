"""Scores of archived chunks, and policies that choose without them."""

import torch

from model.cache.selection import SELECTIONS, Candidates, affinity, top_chunks


def test_the_choice_under_autocast_is_that_without():
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 24, generator=draw)  # [B, h, D]
    keys = torch.randn(1, 1, 2, 24, generator=draw) + 0.01 * torch.randn(3, 40, 2, 24, generator=draw)  # close scores
    expected = affinity(query, keys)
    by_hand = affinity(query.double(), keys.double())
    torch.testing.assert_close(expected.double(), by_hand, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found = affinity(query, keys)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(top_chunks(found, 8), top_chunks(expected, 8))


def test_choices_without_scores():
    def choose(name, chunk, top_k=3):
        ids = SELECTIONS[name].choose(Candidates(range(4, 20), top_k, 2, None, (0, chunk, 0)))
        assert ids.shape == (2, top_k) and torch.equal(ids[0], ids[1]) and ids.dtype == torch.int64
        return ids[0].tolist()

    assert choose("recency", 0) == [17, 18, 19]
    drawn = [choose("random", chunk) for chunk in range(200)]
    assert drawn[7] == choose("random", 7) and all(ids == sorted(set(ids)) for ids in drawn)
    assert {i for ids in drawn for i in ids} == set(range(4, 20)), "some chunk is never drawn"
