"""The stream of training pictures and the exact-once cover of evaluation."""

from collections import Counter
from itertools import chain, islice

import pytest

from dataset import EndlessSampler, EvalSampler


def take(steps, *arguments, accumulate=1, **options):
    batches = islice(EndlessSampler(*arguments, accumulate=accumulate, **options), steps * accumulate)
    return list(batches)


@pytest.mark.parametrize("num_images, batch", [(10, 4), (7, 7), (5, 16), (1, 3)])
def test_each_epoch_visits_every_picture_once_in_another_order(num_images, batch):
    stream = list(chain.from_iterable(take(4 * num_images, num_images, batch, seed=3)))
    assert [position for _, position in stream] == list(range(len(stream)))
    epochs = [[index for index, _ in stream[start: start + num_images]] for start in range(0, 4 * num_images, num_images)]
    assert all(sorted(epoch) == list(range(num_images)) for epoch in epochs)
    assert num_images < 7 or len(set(map(tuple, epochs))) == 4


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 3), (2, 6)])
def test_ranks_and_micro_batches_together_are_the_global_batch_in_order(world, accumulate):
    whole = take(5, 17, 12, seed=1)
    ranks = [take(5, 17, 12, seed=1, rank=rank, world=world, accumulate=accumulate) for rank in range(world)]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][step * accumulate + micro] for rank in range(world) for micro in range(accumulate)]
        assert {len(part) for part in parts} == {12 // world // accumulate}
        assert list(chain.from_iterable(parts)) == batch


@pytest.mark.parametrize("start", [1, 3, 10, 1000])
def test_resume_continues_the_same_stream(start):
    for rank in range(2):
        options = {"seed": 5, "rank": rank, "world": 2, "accumulate": 2}
        assert take(6, 9, 8, start_step=start, **options) == take(start + 6, 9, 8, **options)[start * 2:]


def test_seed_decides_the_order():
    assert take(3, 50, 8, seed=1) == take(3, 50, 8, seed=1)
    assert take(3, 50, 8, seed=1) != take(3, 50, 8, seed=2)


def test_iterating_twice_starts_at_the_same_step():
    sampler = EndlessSampler(9, 4, start_step=2)
    assert list(islice(sampler, 3)) == list(islice(sampler, 3))


def test_batch_that_cannot_be_divided_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"batch size 16 .* 3 ranks x 2 .* multiple of 6"):
        EndlessSampler(10, 16, world=3, accumulate=2)
    with pytest.raises(ValueError, match="at least 1"):
        EndlessSampler(0, 16)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 21, 101])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_covers_every_picture_exactly_once(n, world):
    samplers = [EvalSampler(n, rank, world) for rank in range(world)]
    assert Counter(chain.from_iterable(samplers)) == Counter(range(n))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]
