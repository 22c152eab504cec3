"""Which of many shapes have a graph: those used often; and captures, a hundred times as dear as replays, stay rare.

On a CPU, with graphs that only pretend.
"""

import random

import pytest
import torch
from torch import nn

from qwen_batched.runtime.admission import USES_THAT_REPAY, Uses
from qwen_batched.runtime.cuda_graphs import MAX_GRAPHS, CudaGraphs

PLACES = MAX_GRAPHS


@pytest.fixture
def play(fake):
    """Runs a call for each key; returns how many were captured and how many replayed."""
    module = nn.Linear(2, 2)
    graphs = CudaGraphs()

    def play(keys):
        captured, replayed = fake.captured, fake.replayed
        with torch.no_grad():
            for key in keys:
                graphs.run([module], key, lambda: None, device=torch.device("cpu"))
                assert len(graphs) <= PLACES
        return fake.captured - captured, fake.replayed - replayed

    return play


def at_random(calls, shapes, seed=0):
    generator = random.Random(seed)
    return [generator.randrange(shapes) for _ in range(calls)]


def test_shapes_beyond_the_places_in_random_order_do_not_thrash(play):
    captured, replayed = play(at_random(2000, 60))
    assert captured <= 1.5 * PLACES
    assert replayed >= 0.95 * 2000 * PLACES / 60


@pytest.mark.slow
def test_captures_stay_rare_in_the_long_run(play):
    play(at_random(2000, 60))
    captured, replayed = play(at_random(8000, 60, seed=1))
    assert captured <= 8000 / 100
    assert replayed >= 0.95 * 8000 * PLACES / 60


@pytest.mark.parametrize("shapes", [PLACES + 1, 2 * PLACES])
def test_shapes_in_a_cycle_never_displace_each_other(play, shapes):
    captured, replayed = play(list(range(shapes)) * 20)
    assert captured == PLACES
    assert replayed == 19 * PLACES


@pytest.mark.slow
def test_common_shapes_get_the_places(play):
    generator = random.Random(0)
    shapes = range(200)
    weights = [1 / (1 + shape) for shape in shapes]
    generator.shuffle(weights)
    captured, replayed = play(generator.choices(shapes, weights, k=10_000))
    best = 10_000 * sum(sorted(weights)[-PLACES:]) / sum(weights)
    assert captured <= 2 * PLACES
    assert replayed >= 0.95 * best


def test_a_new_set_of_shapes_gets_in_after_a_bounded_number_of_calls(play):
    play(at_random(5000, PLACES))
    captured, _ = play([("new", shape) for shape in range(PLACES)] * (USES_THAT_REPAY + 1))
    assert captured == PLACES
    captured, replayed = play([("new", shape) for shape in range(PLACES)] * 3)
    assert (captured, replayed) == (0, 3 * PLACES)


@pytest.mark.slow
def test_a_set_of_too_many_new_shapes_gets_the_places_of_the_old(play):
    """None of them is used often, but the old ones never."""
    play(at_random(5000, PLACES))
    play([("new", shape) for shape in at_random(5000, 200)])
    captured, replayed = play([("new", shape) for shape in at_random(5000, 200, seed=1)])
    assert captured <= PLACES
    assert replayed >= 0.9 * 5000 * PLACES / 200


def test_one_common_shape_displaces_a_rare_one(play):
    play(list(range(PLACES)) * 2)
    captured, replayed = play((["common"] * 15 + list(range(PLACES))) * 20)
    assert captured <= 2
    assert replayed >= 0.9 * 20 * (15 + PLACES - 1)


def test_shapes_that_come_once_push_no_graph_out(play):
    play(list(range(PLACES)) * 2)
    captured, _ = play(("once", index) for index in range(5000))
    assert captured == 0
    captured, replayed = play(range(PLACES))
    assert (captured, replayed) == (0, PLACES)


def test_a_shape_among_many_that_come_once_is_captured_as_long_as_there_is_room(play):
    captured, _ = play(key for index in range(100) for key in [index % 10, *((index, other) for other in range(5))])
    assert captured == 10


# --- the book of uses ---


def use(uses, *keys):
    for key in keys:
        uses.note(key)


def test_a_key_is_commoner_after_enough_uses_since_the_other_was_used_twice():
    uses = Uses()
    use(uses, "old", "old")
    for _ in range(USES_THAT_REPAY):
        assert not uses.is_commoner("new", "old")
        use(uses, "new")
    assert uses.is_commoner("new", "old")
    use(uses, "old")
    assert uses.is_commoner("new", "old"), "once is chance"
    use(uses, "old")
    assert not uses.is_commoner("new", "old")


def test_the_least_common_key_was_used_twice_the_longest_ago():
    uses = Uses()
    use(uses, "b", "b", "a", "a", "c", "c", "b")
    assert uses.least_common(["a", "b", "c"]) == "b"
    use(uses, "b")
    assert uses.least_common(["a", "b", "c"]) == "a"
    assert uses.least_common(["a", "b", "c", "unknown"]) == "unknown"


def test_the_book_is_bounded_and_forgets_the_keys_unused_for_longest():
    uses = Uses(max_keys=3)
    use(uses, 1, 2, 3, 1, 4)
    assert [key for key in range(6) if key in uses] == [1, 3, 4]
    use(uses, *at_random(1000, 50))
    assert sum(key in uses for key in range(50)) == 3


def test_a_refused_key_counts_as_unused_until_it_is_forgotten():
    uses = Uses(max_keys=3)
    use(uses, "other", "other", "key", "key")
    uses.refuse("key")
    use(uses, *["key"] * 50)
    assert "key" not in uses
    assert not uses.is_commoner("key", "other")
    use(uses, 1, 2, 3, "key")
    assert "key" in uses


def test_a_cleared_book_is_empty():
    uses = Uses()
    use(uses, "a", "b")
    uses.refuse("b")
    uses.clear()
    use(uses, "b")
    assert "a" not in uses
    assert "b" in uses
