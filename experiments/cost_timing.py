"""Seconds per pair and peak memory of two commits, measured in alternation on this machine."""

from __future__ import annotations

import json
import logging
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.checkouts import Checkout, DoesNotRun, last_line
from experiments.measured_commits import PROBE, Measured, Workplace
from reports.regression import Observed
from reports.regression_policy import Cell
from reports.regression_watches import Cost, Side, cost_ratios

log = logging.getLogger(__name__)
SAME_MAKERS = "the code on the prediction path, config and weights are the same"


def add_costs(
    place: Workplace, observed: Sequence[Observed], before: Measured, after: Measured
) -> None:
    """Times the predictions that the policy names, where both sides have one and their makers
    differ; else ``cost_note`` says why there is no time."""
    if before.checkout is None or after.checkout is None:
        return
    for prediction in place.policy.cost.predictions:
        items = [o for o in observed if o.cell.prediction == prediction and not o.problem]
        if not items:
            continue
        cell = items[0].cell
        cost, note = None, None
        if _same_run(before.sides[cell], after.sides[cell]):
            note = SAME_MAKERS
        else:
            log.info("timing %s", prediction)
            try:
                cost = _time(place, cell, before, after)
            except DoesNotRun as problem:
                note = str(problem)
        for item in items:
            item.cost, item.cost_note = cost, note


def _time(place: Workplace, cell: Cell, before: Measured, after: Measured) -> Cost:
    """Rounds until they decide, or as many as the policy allows."""
    rule = place.policy.cost
    cost = Cost([], [], [], [])
    for look in rule.looks:
        while len(cost.base_s) < look:
            _add_round(place, cell, before, after, cost)
        verdicts = {entry["verdict"] for entry in cost_ratios(cost, rule).values()}
        if "undecided" not in verdicts:
            break
        log.info("%s: undecided after %d of %d rounds", cell.prediction, look, rule.most_rounds)
    return cost


def _add_round(place: Workplace, cell: Cell, before: Measured, after: Measured, cost: Cost) -> None:
    """Two fresh processes take turns, the order swapped from turn to turn, so that whatever else
    the machine does meets both. The round counts each one's fastest turn."""
    rule = place.policy.cost
    sides = {"base": before, "head": after}
    workers: dict[str, _Worker] = {}
    try:
        for name, measured in sides.items():
            workers[name] = _Worker(
                measured.checkout,
                [
                    measured.configs[cell.prediction],
                    str(measured.data),
                    str(place.scratch / "store"),
                    str(measured.sides[cell].protocol),
                    str(rule.pairs),
                ],
                place.weights_for(measured.data),
            )
        for worker in workers.values():
            worker.wait_until_ready()
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for turn in range(rule.blocks):
            for name in list(workers)[:: 1 if turn % 2 else -1]:
                seconds[name].append(workers[name].turn())
        peaks = {name: worker.finish() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.stop()
    cost.base_s.append(min(seconds["base"]))
    cost.head_s.append(min(seconds["head"]))
    cost.base_mib.append(peaks["base"])
    cost.head_mib.append(peaks["head"])


def _same_run(base: Side, head: Side) -> bool:
    return base.predictions.meta["key"] == head.predictions.meta["key"]


class _Worker:
    """A process that predicts the same pairs whenever it is its turn."""

    def __init__(self, checkout: Checkout, arguments: list[str], weights: Path | None) -> None:
        environment = checkout.environment()
        if weights is not None:
            environment["NEMF_WEIGHTS"] = str(weights)
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (see stop)
        self.process = subprocess.Popen(
            checkout.command([str(PROBE), "cost", *arguments]),
            cwd=checkout.root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def wait_until_ready(self) -> None:
        self._answer()

    def turn(self) -> float:
        """Seconds per pair."""
        self._say("go\n")
        return self._answer()["seconds"]

    def finish(self) -> float:
        """Peak MiB; the process ends."""
        self.process.stdin.close()
        return self._answer()["peak_mib"]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            stream.close()

    def _say(self, text: str) -> None:
        try:
            self.process.stdin.write(text)
            self.process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        self.process.wait()
        self.errors.seek(0)
        reason = last_line(self.errors.read()) or f"status {self.process.returncode}"
        raise DoesNotRun(f"the commit cannot be timed ({reason})")
