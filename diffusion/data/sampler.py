"""One sampler owns the order of samples, for every rank and every epoch.

An epoch is a permutation drawn from (seed, epoch), cut into global batches of one bucket each; a global batch is
what one optimiser step consumes, and is split over micro-batches and ranks. The order of samples therefore does not
depend on how many processes share a global batch, and the position in it is one integer: the optimiser step.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from diffusion.errors import DataError

MAX_BALANCED_DRAWS = 8


@dataclass(frozen=True)
class SampleKey:
    """A sample's index in the data set, and its number in the run (which keys its random draws)."""

    index: int
    number: int


class AspectRatioBatchSampler:
    """Yields this rank's micro-batches as lists of `SampleKey`; iterating goes to the end of the epoch.

    Args:
        buckets: one label a sample; a global batch holds samples of one bucket.
        batch_size: samples a micro-batch and rank.
        world_size, rank, accumulation: a global batch has batch_size * world_size * accumulation samples.
        seed: of the order.
        last: what happens to samples that do not fill a global batch: "pad" repeats samples of the same bucket,
            "drop" leaves them out of this epoch.
        balance: one label a sample (such as the concept); an epoch then draws every label equally often (as often as
            the largest has samples, at most 8 times), cycling through its samples from epoch to epoch.
        repeats: one number a sample, how often it is drawn an epoch (2, 0.5, ...); samples of one number and bucket
            take turns from epoch to epoch. Not together with balance.
    Raises:
        DataError: no samples, or "drop" leaves no batch at all.
        ValueError: sizes below 1, a rank outside the world, or labels that are not one a sample.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        *,
        batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        last: Literal["pad", "drop"] = "pad",
        balance: Sequence[str] | None = None,
        repeats: Sequence[float] | None = None,
    ) -> None:
        if len(buckets) == 0:
            raise DataError("the data set has no samples")
        if min(batch_size, world_size, accumulation) < 1 or not 0 <= rank < world_size or last not in ("pad", "drop"):
            raise ValueError(f"{batch_size=}, {world_size=}, {rank=}, {accumulation=}, {last=} do not fit together")
        if balance is not None and len(balance) != len(buckets):
            raise ValueError(f"{len(balance)} balance labels for {len(buckets)} samples")
        if repeats is not None and (balance is not None or len(repeats) != len(buckets) or min(repeats) <= 0):
            raise ValueError(f"{len(repeats)} repeats for {len(buckets)} samples: one positive number each, no balance")
        self.buckets, self.balance, self.seed, self.last, self.repeats = buckets, balance, seed, last, repeats
        self.batch_size, self.world_size, self.rank, self.accumulation = batch_size, world_size, rank, accumulation
        self.global_batch = batch_size * world_size * accumulation
        self.step = 0
        self._plans: dict[int, list[list[int]]] = {}
        if not self.plan(0):
            raise DataError(
                f"{len(buckets)} samples in {len(set(buckets))} buckets do not fill one global batch of "
                f"{self.global_batch} = {batch_size} x {world_size} processes x {accumulation} accumulated; lower "
                "train_batch_size or set last_batch='pad'"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps an epoch; equal for all epochs and ranks."""
        return len(self.plan(0))

    def __len__(self) -> int:
        """Micro-batches of this rank in a whole epoch."""
        return self.steps_per_epoch * self.accumulation

    def set_position(self, step: int) -> None:
        """Continue before optimiser step `step` of the run, counted from 0 over all epochs."""
        self.step = step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, first = divmod(self.step, self.steps_per_epoch)
        for batch in self.plan(epoch)[first:]:
            start = self.step * self.global_batch
            self.step += 1
            for micro in range(self.accumulation):
                begin = (micro * self.world_size + self.rank) * self.batch_size
                yield [SampleKey(batch[i], start + i) for i in range(begin, begin + self.batch_size)]

    def plan(self, epoch: int) -> list[list[int]]:
        """Global batches of an epoch, as indices."""
        if epoch not in self._plans:
            self._plans = {key: plan for key, plan in self._plans.items() if key == 0}
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.buckets)))
        if self.balance is not None:
            order = self._balanced(epoch)
        elif self.repeats is not None:
            order = self._repeated(epoch, self.repeats)
        rng.shuffle(order)
        by_bucket: dict[Hashable, list[int]] = {}
        for index in order:
            by_bucket.setdefault(self.buckets[index], []).append(index)
        size, batches = self.global_batch, []
        for _, indices in sorted(by_bucket.items(), key=lambda item: str(item[0])):
            whole = len(indices) // size * size
            batches += [indices[start : start + size] for start in range(0, whole, size)]
            rest = indices[whole:]
            if rest and self.last == "pad":
                # The repeats are other samples of the bucket, as many different ones as there are.
                batches.append(rest + [indices[i % len(indices)] for i in range(size - len(rest))])
        rng.shuffle(batches)
        return batches

    def _repeated(self, epoch: int, repeats: Sequence[float]) -> list[int]:
        """Every sample as often as its number says; the number of draws a bucket is the same in every epoch."""
        groups: dict[tuple[float, Hashable], list[int]] = {}
        for index, repeat in enumerate(repeats):
            groups.setdefault((repeat, self.buckets[index]), []).append(index)
        chosen: list[int] = []
        for (repeat, _), samples in groups.items():
            count = max(1, round(len(samples) * repeat))
            chosen += [samples[(epoch * count + i) % len(samples)] for i in range(count)]
        return chosen

    def _balanced(self, epoch: int) -> list[int]:
        """Every label equally often, its draws shared out over its buckets alike in all epochs.

        The number of draws a bucket, and with it the number of steps, is therefore the same in every epoch.
        """
        groups: dict[str, dict[Hashable, list[int]]] = {}
        for index, label in enumerate(self.balance or ()):
            groups.setdefault(label, {}).setdefault(self.buckets[index], []).append(index)
        largest = max(sum(map(len, group.values())) for group in groups.values())
        # Each bucket of a label has at least one draw, so that every sample is seen in time.
        draws = max(min(largest, MAX_BALANCED_DRAWS), max(map(len, groups.values())))
        chosen: list[int] = []
        for group in groups.values():
            for samples, count in zip(group.values(), _shares([len(s) for s in group.values()], draws)):
                chosen += [samples[(epoch * count + i) % len(samples)] for i in range(count)]
        return chosen


class EndlessBatches:
    """Epoch after epoch of a sampler without a pause, so that loading workers never run dry at an epoch's end."""

    def __init__(self, sampler: AspectRatioBatchSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[SampleKey]]:
        while True:
            yield from self.sampler


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """`total` >= len(sizes) split in proportion to sizes, each share at least 1 (largest remainder)."""
    spare, everything = total - len(sizes), sum(sizes)
    shares = [1 + spare * size // everything for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(spare * sizes[i] % everything), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares
