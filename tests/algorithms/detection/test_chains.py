"""What shares a walk through the blocks."""

from ppcl_engine.algorithms.detection.chains import ChainBatch, bytes_of
from ppcl_engine.algorithms.grouping import groups_within


def blocks_read(groups, blocks: int) -> int:
    """By the sweep and by all walks."""
    return blocks + sum(blocks - 1 - group[0].u for group in groups)


def test_parts_share_a_walk_as_far_as_their_states_fit():
    parts = [
        ChainBatch(u=u, end=u + 1, batch=batch, bytes=3.0) for u in range(3) for batch in range(2)
    ]
    by_limit = {
        limit: [len(group) for group in groups_within(limit, parts, bytes_of)]
        for limit in (0, 5, 6, 9, 18, 100)
    }
    assert by_limit == {0: [1] * 6, 5: [1] * 6, 6: [2, 2, 2], 9: [3, 3], 18: [6], 100: [6]}
    assert blocks_read(groups_within(100, parts, bytes_of), 10) == 10 + 9 and blocks_read(
        groups_within(0, parts, bytes_of), 10
    ) == 10 + 2 * (9 + 8 + 7)
