"""Scores of archived chunks."""

import torch

from model.cache.selection import affinity, top_chunks


def test_the_choice_under_autocast_is_that_without():
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 24, generator=draw)  # [B, h, D]
    keys = torch.randn(1, 1, 2, 24, generator=draw) + 0.01 * torch.randn(3, 40, 2, 24, generator=draw)  # close scores
    shifts = -3 * torch.arange(40, 0, -1)
    expected = affinity(query, keys, shifts)
    by_hand = affinity(query.double(), keys.double(), shifts)
    torch.testing.assert_close(expected.double(), by_hand, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found = affinity(query, keys, shifts)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    ids = list(range(40))
    assert torch.equal(top_chunks(found, ids, 8), top_chunks(expected, ids, 8))
