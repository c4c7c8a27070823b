"""Who is timed together: as many ways as fit into memory, each group with the engine in it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers import Footprint, Pool


def groups_that_fit(footprints: Mapping[str, Footprint], anchor: str, limit: int | None) -> list[list[str]]:
    """Split the ways into groups whose processes fit into ``limit`` bytes while one of them computes.

    The anchor is in every group, so that each way is timed in turn with it; where a way does not fit even so,
    it is a group of its own.
    """
    groups: list[list[str]] = []
    others = [way for way in footprints if way != anchor]
    for way in others:
        home = next((group for group in groups if _fits([*group, way], footprints, limit)), None)
        if home is not None:
            home.append(way)
        else:
            pair = [anchor, way]
            groups.append(pair if _fits(pair, footprints, limit) else [way])
    if not any(anchor in group for group in groups):
        groups.insert(0, [anchor])
    return groups


def _fits(ways: Sequence[str], footprints: Mapping[str, Footprint], limit: int | None) -> bool:
    if limit is None:
        return True
    idle = sum(footprints[way].idle for way in ways)
    return all(idle - footprints[way].idle + footprints[way].peak <= limit for way in ways)


@dataclass
class Samples:
    """Every timed step of one way.

    Attributes:
        seconds: of each step, scaled to all adapters.
        anchor_seconds: of the anchor's steps in the same groups.
        others: CPUs that other processes kept busy during each step, where that can be told.
        facts: what the way tells of itself.
    """

    seconds: list[float] = field(default_factory=list)
    anchor_seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def times_anchor(self) -> float | None:
        """How many times longer than the anchor it takes; None where they could not be timed together."""
        return self.median / statistics.median(self.anchor_seconds) if self.anchor_seconds else None


def time_groups(
    groups: Sequence[Sequence[str]],
    pool: Pool,
    anchor: str,
    adapters: Mapping[str, int],
    rounds: Mapping[str, int],
    report: Callable[[str], None],
) -> dict[str, Samples]:
    """Interleaved rounds of every group: each way takes one step per round, the order turned every round.

    Args:
        adapters: how many adapters a way's step computes; its seconds are scaled up to its workload's.
        rounds: in how many rounds a way takes part, the first ones.
    """
    samples = {way: Samples() for group in groups for way in group}
    for group in groups:
        longest = max(rounds[way] for way in group if way != anchor or len(group) == 1)
        own: dict[str, list[float]] = {way: [] for way in group}
        with pool.running(group) as workers:
            for way in group:
                report(f"warming up {way}")
                workers[way].step(adapters[way])
                samples[way].facts = workers[way].facts()
            for turn in range(longest):
                first = turn % len(group)
                for way in (*group[first:], *group[:first]):
                    if turn < rounds[way]:
                        timing = workers[way].step(adapters[way])
                        own[way].append(timing.seconds * pool.jobs[way].workload.adapters / adapters[way])
                        samples[way].others += [] if timing.others is None else [timing.others]
                        report(f"round {turn + 1} of {longest}: {way} {own[way][-1]:.4g} s")
        for way in group:
            samples[way].seconds += own[way]
            samples[way].anchor_seconds += own.get(anchor, [])
    return samples

