from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data import AspectRatioBatchSampler, SampleKey
from diffusion.errors import DataError
from diffusion.images import aspect_ratio_table, closest_bucket, with_transposes

bucket_lists = st.lists(st.sampled_from("abc"), min_size=1, max_size=60)
small = st.integers(1, 3)


def global_batches(per_rank: Sequence[list[list[SampleKey]]], accumulation: int) -> list[list[SampleKey]]:
    """Put the micro-batches of all ranks back together."""
    steps = len(per_rank[0]) // accumulation
    return [
        [key for micro in range(accumulation) for rank in per_rank for key in rank[step * accumulation + micro]]
        for step in range(steps)
    ]


@settings(max_examples=80, deadline=None)
@given(bucket_lists, small, small, small, st.integers(0, 5))
def test_padded_epoch_covers_every_sample(
    buckets: list[str], batch_size: int, world_size: int, accumulation: int, seed: int
) -> None:
    sizes = {"batch_size": batch_size, "world_size": world_size, "accumulation": accumulation}
    samplers = [AspectRatioBatchSampler(buckets, rank=rank, seed=seed, **sizes) for rank in range(world_size)]
    per_rank = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in per_rank} == {len(samplers[0])}
    assert all(len(micro) == batch_size for batches in per_rank for micro in batches)
    batches = global_batches(per_rank, accumulation)
    assert len(batches) == samplers[0].steps_per_epoch
    assert {key.index for batch in batches for key in batch} == set(range(len(buckets)))
    assert all(len({buckets[key.index] for key in batch}) == 1 for batch in batches)
    # Padding is less than one global batch a bucket.
    global_batch = batch_size * world_size * accumulation
    needed = sum(-(-count // global_batch) for count in Counter(buckets).values())
    assert len(batches) == needed
    # Numbers count on, from 0.
    assert [key.number for batch in batches for key in batch] == list(range(needed * global_batch))


@settings(max_examples=80, deadline=None)
@given(bucket_lists, small, small, st.integers(0, 5))
def test_dropping_epoch_repeats_nothing(buckets: list[str], batch_size: int, world_size: int, epoch: int) -> None:
    global_batch = batch_size * world_size
    whole = sum(count // global_batch for count in Counter(buckets).values())
    if whole == 0:
        with pytest.raises(DataError, match=rf"{len(buckets)} samples .* {global_batch} = {batch_size} x {world_size}"):
            AspectRatioBatchSampler(buckets, batch_size=batch_size, world_size=world_size, last="drop")
        return
    sampler = AspectRatioBatchSampler(buckets, batch_size=batch_size, world_size=world_size, last="drop")
    plan = sampler.plan(epoch)
    assert len(plan) == whole == sampler.steps_per_epoch
    drawn = [index for batch in plan for index in batch]
    assert len(drawn) == len(set(drawn)) == whole * global_batch
    assert all(len({buckets[index] for index in batch}) == 1 for batch in plan)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulation"), [(12, 1, 1), (3, 4, 1), (1, 2, 6), (2, 3, 2), (6, 1, 2)]
)
def test_order_depends_on_the_global_batch_alone(batch_size: int, world_size: int, accumulation: int) -> None:
    buckets = ["a"] * 50 + ["b"] * 31
    expected = [list(AspectRatioBatchSampler(buckets, batch_size=12, seed=3))]
    per_rank = [
        list(
            AspectRatioBatchSampler(
                buckets, batch_size=batch_size, world_size=world_size, rank=rank, accumulation=accumulation, seed=3
            )
        )
        for rank in range(world_size)
    ]
    assert global_batches(per_rank, accumulation) == global_batches(expected, 1)


@pytest.mark.parametrize("last", ["pad", "drop"])
@pytest.mark.parametrize("balance", [False, True])
def test_position_restores_the_order_mid_epoch(last: str, balance: bool) -> None:
    buckets = ["a"] * 23 + ["b"] * 17
    labels = [str(index % 7) for index in range(40)] if balance else None
    options = {"batch_size": 2, "accumulation": 2, "seed": 5, "last": last, "balance": labels}
    sampler = AspectRatioBatchSampler(buckets, **options)
    uninterrupted = [key for _ in range(3) for micro in sampler for key in micro]
    for step in (0, 1, sampler.steps_per_epoch - 1, sampler.steps_per_epoch, sampler.steps_per_epoch + 3):
        resumed = AspectRatioBatchSampler(buckets, **options)
        resumed.set_position(step)
        rest = [key for _ in range(3) for micro in resumed for key in micro]
        tail = uninterrupted[step * 4 :]
        assert rest[: len(tail)] == tail


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Buckets of mixed resolutions, as pictures of random shapes fall into them, and options of the sampler."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 2)), min_size=1))
    tables = [with_transposes(aspect_ratio_table(f"ASPECT_RATIO_{base}")) for base in (256, 512, 1024)]
    buckets = [tables[base][closest_bucket(height, width, tables[base], "log")] for height, width, base in shapes]
    buckets *= draw(st.sampled_from([1, 1, 3, 20]))
    options: dict[str, Any] = {"seed": draw(st.integers(0, 9)), "last": draw(st.sampled_from(["pad", "drop"]))}
    kind = draw(st.sampled_from(["plain", "balance", "repeats"]))
    if kind == "balance":
        options["balance"] = [str(index % draw(st.integers(1, 5))) for index in range(len(buckets))]
    if kind == "repeats":
        rates = draw(st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=1, max_size=3))
        options["repeats"] = [rates[index * len(rates) // len(buckets)] for index in range(len(buckets))]
    return buckets, options


@settings(max_examples=150, deadline=None)
@given(data_sets(), st.integers(1, 8), st.integers(1, 5), small, st.data())
def test_all_ranks_together_draw_the_plan(
    case: tuple[list[tuple[int, int]], dict[str, Any]], world_size: int, batch_size: int, accumulation: int, data: Any
) -> None:
    buckets, options = case
    sizes = {"batch_size": batch_size, "world_size": world_size, "accumulation": accumulation, **options}
    try:
        samplers = [AspectRatioBatchSampler(buckets, rank=rank, **sizes) for rank in range(world_size)]
    except DataError:
        # Only when really no bucket fills a batch; repeats and balance draw another number.
        assert options["last"] == "drop"
        if not options.keys() & {"balance", "repeats"}:
            assert max(Counter(buckets).values()) < batch_size * world_size * accumulation
        return
    epochs, steps = 2, samplers[0].steps_per_epoch
    per_rank = [[micro for _ in range(epochs) for micro in sampler] for sampler in samplers]
    # The same number of full batches on every rank, each of one bucket over all ranks.
    assert [len(batches) for batches in per_rank] == [epochs * len(samplers[0])] * world_size
    assert all(len(micro) == batch_size for batches in per_rank for micro in batches)
    whole = global_batches(per_rank, accumulation)
    assert all(len({buckets[key.index] for key in batch}) == 1 for batch in whole)
    # Disjoint: together the ranks have every number of the run once, and the samples of the plan.
    assert [key.number for batch in whole for key in batch] == list(range(epochs * steps * samplers[0].global_batch))
    assert [[key.index for key in batch] for batch in whole] == samplers[0].plan(0) + samplers[0].plan(1)
    drawn = Counter(key.index for batch in whole[:steps] for key in batch)
    if not options.keys() & {"balance", "repeats"}:
        if options["last"] == "pad":  # covering, and no sample twice before all of its bucket once
            assert set(drawn) == set(range(len(buckets)))
            surplus = Counter({buckets[index]: 0 for index in drawn})
            for index, count in drawn.items():
                surplus[buckets[index]] += count - 1
            assert max(surplus.values()) < samplers[0].global_batch
        else:  # disjoint over the epoch, and what is left out does not fill a batch of its bucket
            assert set(drawn.values()) == {1}
            left = Counter(bucket for index, bucket in enumerate(buckets) if index not in drawn)
            assert not left or max(left.values()) < samplers[0].global_batch
    # Deterministic, and resumable at any position on any rank.
    rank, step = data.draw(st.integers(0, world_size - 1)), data.draw(st.integers(0, epochs * steps - 1))
    resumed = AspectRatioBatchSampler(buckets, rank=rank, **sizes)
    resumed.set_position(step)
    rest = [micro for _ in range(epochs - step // steps) for micro in resumed]
    assert rest == per_rank[rank][step * accumulation :]


def test_epochs_and_seeds_have_different_orders() -> None:
    sampler = AspectRatioBatchSampler(["a"] * 64, batch_size=8, seed=0)
    other = AspectRatioBatchSampler(["a"] * 64, batch_size=8, seed=1)
    orders = [sampler.plan(0), sampler.plan(1), other.plan(0), other.plan(1)]
    assert len({str(order) for order in orders}) == 4
    assert sampler.plan(1) == AspectRatioBatchSampler(["a"] * 64, batch_size=8, seed=0).plan(1)


def test_order_is_fixed_for_all_time() -> None:
    """Recorded once: a change would make old checkpoints resume with another order."""
    assert AspectRatioBatchSampler(list("aaaabbb"), batch_size=2, seed=43).plan(0) == [[2, 0], [6, 4], [3, 1], [4, 5]]


def test_padding_repeats_different_samples() -> None:
    (batch,) = AspectRatioBatchSampler(["a"] * 9, batch_size=16, seed=0).plan(0)
    assert set(Counter(batch).values()) == {1, 2}
    first, second = AspectRatioBatchSampler(["a"] * 17, batch_size=16, seed=0).plan(0)
    assert len(set(first)) == len(set(second)) == 16


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xyzw"), st.sampled_from("ab")), min_size=1, max_size=50))
def test_balanced_epochs_draw_every_label_equally_and_see_every_sample(samples: list[tuple[str, str]]) -> None:
    labels, buckets = [label for label, _ in samples], [bucket for _, bucket in samples]
    sampler = AspectRatioBatchSampler(buckets, batch_size=1, seed=0, balance=labels)
    seen: set[int] = set()
    for epoch in range(60):
        plan = sampler.plan(epoch)
        assert len(plan) == sampler.steps_per_epoch
        counts = Counter(labels[batch[0]] for batch in plan)
        assert set(counts) == set(labels)
        assert len(set(counts.values())) == 1
        assert max(counts.values()) <= 8
        seen.update(batch[0] for batch in plan)
    assert seen == set(range(len(samples)))


def test_balanced_steps_are_equal_in_all_epochs_with_several_buckets() -> None:
    buckets = [("a", "b", "a", "c", "b")[index % 5] for index in range(97)]
    labels = [f"l{index % 11}" for index in range(97)]
    sampler = AspectRatioBatchSampler(buckets, batch_size=4, seed=0, balance=labels)
    assert {len(sampler.plan(epoch)) for epoch in range(30)} == {sampler.steps_per_epoch}


def test_wrong_arguments() -> None:
    with pytest.raises(DataError, match="no samples"):
        AspectRatioBatchSampler([], batch_size=1)
    with pytest.raises(ValueError, match="batch_size=0"):
        AspectRatioBatchSampler(["a"], batch_size=0)
    with pytest.raises(ValueError, match="rank=2"):
        AspectRatioBatchSampler(["a"], batch_size=1, world_size=2, rank=2)
    with pytest.raises(ValueError, match="last='keep'"):
        AspectRatioBatchSampler(["a"], batch_size=1, last="keep")
    with pytest.raises(ValueError, match="1 balance labels for 2 samples"):
        AspectRatioBatchSampler(["a", "a"], batch_size=1, balance=["x"])
