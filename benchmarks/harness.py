"""Contenders against each other: agreement, memory, and rounds in turn; ``workers.py`` has their processes."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agreement import DisagreementError, Errors, compare, require
from report import report
from workers import Footprint, Job, Pool, WorkerError

COMPARED = 2  # adapters, where a job that is not timed is the reference


@dataclass
class Result:
    """What is known of a contender.

    Attributes:
        reason: why it could not run, or "".
        seconds: of each timed step, scaled to all adapters.
        anchor_seconds: of the anchor's steps in the same group.
        facts: what it tells of itself, after its last step; checked_facts: after the first.
    """

    footprint: Footprint | None = None
    agreement: Errors | None = None
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    anchor_seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    checked_facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def times_anchor(self) -> float | None:
        """How many times longer than the anchor it takes; None where they could not be timed together."""
        return self.median / statistics.median(self.anchor_seconds) if self.anchor_seconds else None


@dataclass
class Run:
    """Some jobs, and what was measured of them so far.

    Attributes:
        anchors: who is timed beside every other, so that their ratio does not see the machine drift: the first that
            could run.
        tolerance: how far each may be off the reference.
        compared: who must agree; None for all that have something to compare.
        essential: who must run.
        local: each is checked, timed and dropped in this process before the next one comes.
        memory: bytes that all processes together may take.
        noise: two jobs that compute the same, exactly and rounded: once a contender is off by more than the tolerance,
            their difference widens it.
        changed: called after whatever was measured.
        reference: what the others are compared with.
    """

    jobs: Mapping[str, Job]
    anchors: Sequence[str]
    tolerance: Errors
    compared: Sequence[str] | None = None
    essential: Sequence[str] = ()
    local: bool = False
    memory: int | None = None
    noise: Mapping[str, Job] = field(default_factory=dict)
    changed: Callable[[Run], None] = lambda run: None
    reference: str = ""
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def anchor(self) -> str:
        could = [name for name in self.anchors if name in self.results and self.results[name].footprint]
        return could[0] if could else self.anchors[-1]

    def measure(self) -> Run:
        """Every contender does one whole step alone, for its memory and to agree; then rounds of all that can, in turn.

        Raises:
            DisagreementError: two do not compute the same. Nothing that disagrees is timed.
            WorkerError: one that is essential, or the reference, could not run.
        """
        self.results |= {name: Result() for name in self.jobs}
        with Pool({**self.jobs, **self.noise}, self.local) as pool, tempfile.TemporaryDirectory() as scratch:
            for name, job in self.jobs.items():
                report(f"checking {name}")
                try:
                    self._check(pool, name, Path(scratch))
                    if self.local and job.rounds:
                        self._time(pool, [name])
                except WorkerError as error:
                    if name in self.essential or not job.rounds:
                        raise
                    report(f"{name} is left out: {error}")
                    self.results[name] = Result(reason=error.reason)
                self.changed(self)
            footprints = {name: own.footprint for name, own in self.results.items() if own.footprint}
            timed = {name: own for name, own in footprints.items() if self.jobs[name].rounds and not self.local}
            for group in groups_that_fit(timed, self.anchor, self.memory):
                self._time(pool, group)
        return self

    def _check(self, pool: Pool, name: str, scratch: Path) -> None:
        own, path = self.results[name], _path(scratch, name)
        kept = COMPARED if any(job.rounds == 0 for job in self.jobs.values()) else None
        pool.only(name)
        own.footprint, written = pool.call(name, "check", path, kept)
        own.checked_facts = own.facts = pool.call(name, "facts")
        report(f"  peak {own.footprint.peak / 1e9:.2f} GB, idle {own.footprint.idle / 1e9:.2f} GB")
        if not written or name not in (self.compared or self.jobs):
            return
        if not self.reference:
            self.reference = name
            return
        own.agreement = compare(path, _path(scratch, self.reference))
        report(f"  {own.agreement}")
        if self.jobs[name].rounds == 0:
            self.tolerance = self.tolerance.widened(own.agreement)
        else:
            self._require(pool, name, own.agreement, scratch)
        Path(path).unlink()

    def _require(self, pool: Pool, name: str, errors: Errors, scratch: Path) -> None:
        try:
            require(name, errors, self.tolerance)
        except DisagreementError:
            if not self.noise:
                raise
            self._measure_noise(pool, scratch)
            require(name, errors, self.tolerance)

    def _measure_noise(self, pool: Pool, scratch: Path) -> None:
        exact, rounded = self.noise
        self.noise = {}  # it is measured once
        try:
            for name in (exact, rounded):
                report(f"checking {name}")
                pool.only(name)
                pool.call(name, "check", _path(scratch, name), COMPARED)
        except WorkerError as error:
            report(f"the noise cannot be measured: {error}")
            return
        found = compare(_path(scratch, rounded), _path(scratch, exact))
        report(f"  {found}")
        self.tolerance = self.tolerance.widened(found)

    def _time(self, pool: Pool, group: Sequence[str]) -> None:
        """Interleaved rounds: each takes one step per round, in an order that turns from round to round."""
        rounds = {name: self.jobs[name].rounds for name in group}
        longest = max(n for name, n in rounds.items() if name != self.anchor or len(group) == 1)
        pool.only(*group)
        for name in group:
            report(f"warming up {name}")
            pool.call(name, "step")
            self.results[name].facts = pool.call(name, "facts")
        for turn in range(longest):
            first = turn % len(group)
            for name in (*group[first:], *group[:first]):
                if turn < rounds[name]:
                    job = self.jobs[name]
                    seconds = pool.call(name, "step") * job.workload.adapters / job.adapters
                    self.results[name].seconds.append(seconds)
                    report(f"round {turn + 1} of {longest}: {name} {seconds:.4g} s")
                    for other in group if name == self.anchor and not self.local else ():
                        self.results[other].anchor_seconds.append(seconds)
            self.changed(self)

    def entries(self) -> dict[str, dict[str, Any]]:
        """Everything that was measured so far of those that are timed, ready for json."""
        timed = {name: own for name, own in self.results.items() if own.seconds}
        anchor = timed[self.anchor].median if self.anchor in timed else None
        found = {}
        for name, own in timed.items():
            job, footprint = self.jobs[name], own.footprint
            assert footprint is not None
            found[name] = {
                **own.facts,
                "seconds": {
                    "median": own.median, "min": min(own.seconds), "max": max(own.seconds), "samples": own.seconds,
                },
                "adapters_timed": job.adapters,
                "tokens_per_second": job.workload.tokens / own.median,
                "adapters_per_second": job.workload.adapters / own.median,
                # Over the rounds that both took part in, where there are any.
                "times_anchor": own.times_anchor or (own.median / anchor if anchor else None),
                "timed_beside_anchor": own.times_anchor is not None,
                "weights_bytes": footprint.weights,
                "peak_bytes": footprint.peak,
                "step_bytes": footprint.peak - footprint.weights,
                "agreement": own.agreement and own.agreement._asdict(),
            }  # fmt: skip
        return found


def _path(scratch: Path, name: str) -> str:
    return str(scratch / f"{name.replace(' ', '-')}.safetensors")


def groups_that_fit(footprints: Mapping[str, Footprint], anchor: str, limit: int | None) -> list[list[str]]:
    """Split contenders into groups whose processes fit into ``limit`` bytes while one of them computes.

    The anchor is in every group, so that each one is timed in turn with it; one that does not fit even so is a group of
    its own.
    """
    groups: list[list[str]] = []
    for name in footprints:
        if name == anchor:
            continue
        home = next((group for group in groups if _fits([*group, name], footprints, limit)), None)
        if home is not None:
            home.append(name)
        else:
            groups.append([anchor, name] if _fits([anchor, name], footprints, limit) else [name])
    if anchor in footprints and not any(anchor in group for group in groups):
        groups.insert(0, [anchor])
    return groups


def _fits(names: Sequence[str], footprints: Mapping[str, Footprint], limit: int | None) -> bool:
    idle = sum(footprints[name].idle for name in names)
    return limit is None or all(idle - footprints[name].idle + footprints[name].peak <= limit for name in names)
