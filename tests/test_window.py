"""Windows: distances that count attended tokens, slabs that miss no key, rings that keep the last ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hhbench.errors import UsageError
from hhbench.window import BLOCK, Blocks, WindowState, check_window, distances, far, last_attended, near, num_pairs

CPU = torch.device("cpu")
MASK = torch.tensor([[0, 1, 1, 0, 1, 0]], dtype=torch.bool)  # attended tokens 0, 1 and 2 are 1, 2 and 4


def dense(key_mask, window, causal, num_queries, num_keys):
    """Which keys are near and which far, [R, N, M], from all pairs."""
    distance, attended = distances(key_mask, causal=causal, num_queries=num_queries, num_keys=num_keys, device=CPU)
    found = [f(distance, window, causal=causal) for f in (near, far)]
    return found if attended is None else [f & attended for f in found]


def test_near_and_far_by_hand():
    distance = torch.arange(-3, 4)
    assert near(distance, 2, causal=True).tolist() == [False, False, False, True, True, False, False]
    assert far(distance, 2, causal=True).tolist() == [False, False, False, False, False, True, True]
    assert near(distance, 2, causal=False).tolist() == [False, False, True, True, True, False, False]
    assert far(distance, 2, causal=False).tolist() == [True, True, False, False, False, True, True]


def test_distances_count_attended_tokens():
    distance, attended = distances(MASK, causal=True, num_queries=6, num_keys=6, device=CPU)
    assert torch.equal(attended[0], MASK)
    assert distance[0][MASK[0]][:, MASK[0]].tolist() == [[0, -1, -2], [1, 0, -1], [2, 1, 0]]
    plain, attended = distances(None, causal=True, num_queries=2, num_keys=3, device=CPU)
    assert attended is None
    assert plain.tolist() == [[[1, 0, -1], [2, 1, 0]]]


@pytest.mark.parametrize(
    "causal,seen",
    [
        (True, [[], [0], [0, 1], [0, 1], [1, 2], [1, 2]]),
        (False, [[0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [1, 2], [1, 2]]),
    ],
)
def test_a_padded_query_stands_where_the_last_attended_token_does(causal, seen):
    found = dense(MASK, 2, causal, 6, 6)[0][0][:, MASK[0]]
    assert [row.nonzero().flatten().tolist() for row in found] == seen


@given(
    seed=st.integers(0, 10**6),
    window=st.sampled_from([1, 2, 5, BLOCK, 90, 1000]),
    num_keys=st.sampled_from([1, 6, BLOCK, BLOCK + 1, 300]),
    num_queries=st.sampled_from([1, 5, 300]),
    masked=st.booleans(),
    causal=st.booleans(),
)
@settings(max_examples=80)
def test_slabs_hold_every_window_and_know_what_they_leave_out(seed, window, num_keys, num_queries, masked, causal):
    """In-slab pairs, scattered back to their keys, are exactly the near ones; the far ones in a slab, before it and
    after it are all of the far ones, each once.
    """
    num_queries = min(num_queries, num_keys)
    generator = torch.Generator().manual_seed(seed)
    key_mask = torch.rand(2, num_keys, generator=generator) < 0.6 if masked else None
    blocks = Blocks.of(key_mask, window, causal=causal, num_queries=num_queries, num_keys=num_keys, device=CPU)
    assert blocks.index.shape[2] == Blocks.slab_length(
        window, causal=causal, num_queries=num_queries, num_keys=num_keys
    )
    expected_near, expected_far = (x.int() for x in dense(key_mask, window, causal, num_queries, num_keys))

    def scatter(visible):
        """[R, n, b, L] in slabs -> [R, N, M], counting."""
        index = blocks.index[:, :, None].expand_as(visible)
        found = visible.new_zeros(*visible.shape[:3], num_keys, dtype=torch.int32)
        return found.scatter_add(3, index, visible.int()).flatten(1, 2)[:, :num_queries]

    inside = blocks.inside[:, :, None]
    assert torch.equal(scatter(near(blocks.distance, window, causal=causal) & inside), expected_near)
    found_far = scatter(far(blocks.distance, window, causal=causal) & inside)
    size, length = blocks.size, blocks.index.shape[2]
    assert (blocks.step >= 0).all() and (blocks.step <= size).all()

    def tally(places):
        """Which keys lie at these places of a slab, [R, n, M]."""
        index, chosen = blocks.index, (places & blocks.inside).int()
        return torch.zeros(*index.shape[:2], num_keys, dtype=torch.int32).scatter_add(2, index, chosen)

    step, place = blocks.step[..., None], torch.arange(length)
    none = torch.zeros_like(blocks.inside[:, :1])
    leaving = tally(torch.cat([none, place < step], 1).roll(-1, 1))[:, :-1]
    earlier = torch.cat([blocks.before[:, None].int(), leaving], 1).cumsum(1)
    found_far = found_far + earlier.repeat_interleave(size, 1)[:, :num_queries]
    if not causal:
        entering = tally(torch.cat([none, place >= length - step], 1))
        later = entering.sum(1, keepdim=True) - entering.cumsum(1)
        found_far = found_far + later.repeat_interleave(size, 1)[:, :num_queries]
    assert torch.equal(found_far, expected_far)


def test_blocks_take_queries_and_keys_apart_and_join_them():
    N = 2 * BLOCK + 3
    blocks = Blocks.of(None, 2, causal=True, num_queries=N, num_keys=N, device=CPU)
    x = torch.arange(1.0, N + 1).view(1, 1, N, 1)
    assert blocks.queries(x).shape == (1, 1, 3, BLOCK, 1)
    assert torch.equal(blocks.join(blocks.queries(x)), x)
    keys = blocks.keys(x).flatten(2).where(blocks.inside.flatten(1), 0)
    assert keys[0, 0, : BLOCK + 1].tolist() == [0, *range(1, BLOCK + 1)]  # one before the block: w - 1
    assert keys[0, 0, BLOCK + 1 : BLOCK + 3].tolist() == [BLOCK, BLOCK + 1]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 9])
def test_the_last_attended_tokens_end_the_ring(window):
    x = torch.arange(1.0, 7).view(1, 1, 6, 1).expand(2, 1, 6, 1)
    key_mask = torch.cat([MASK, ~MASK])
    for mask, rows in ((key_mask, [[2, 3, 5], [1, 4, 6]]), (None, [[1, 2, 3, 4, 5, 6]] * 2)):
        expected = [([0] * window + row)[-window:] for row in rows]
        assert last_attended(x, mask, window).flatten(1).tolist() == expected


def test_a_ring_stands_before_new_tokens():
    ring = torch.tensor([[0.0, 0, 1], [2, 3, 4]]).view(2, 1, 3, 1)
    state = WindowState(ring, 10 * ring, torch.tensor([1, 7]))
    assert state.filled.tolist() == [[False, False, True], [True, True, True]]
    k = torch.tensor([[5.0], [6.0]]).view(2, 1, 1, 1)
    keys, values, mask = state.before(k, k, torch.tensor([[True], [False]]))
    assert keys.flatten(1).tolist() == [[0, 0, 1, 5], [2, 3, 4, 6]]
    assert values.flatten(1).tolist() == [[0, 0, 10, 5], [20, 30, 40, 6]]
    assert mask.tolist() == [[False, False, True, True], [True, True, True, False]]
    assert state.before(k, k, None)[2][:, 3].all()


def test_a_window_holds_a_token():
    assert check_window(1) == 1
    with pytest.raises(UsageError, match="window must be at least 1, not 0"):
        check_window(0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_queries,num_keys", [(1, 1), (6, 6), (1, 9), (4, 9), (9, 9)])
def test_pairs_are_counted_as_the_windows_have_them(causal, num_queries, num_keys):
    distance, _ = distances(None, causal=causal, num_queries=num_queries, num_keys=num_keys, device=CPU)
    for window in (1, 2, 4, 9, 20):
        expected = near(distance, window, causal=causal).sum().item()
        assert num_pairs(num_queries, num_keys, causal=causal, window=window) == expected
    assert num_pairs(num_queries, num_keys, causal=causal) == near(distance, 20, causal=causal).sum().item()
