"""What happened in an update, as lanes of spans: the main thread's steps, what each vCPU did.

A timeline is query-migrate's, a list of ``{"name": str, "cpu": int (absent: the VMM's main
thread), "begin-us": float, "end-us": float}``; times in us since the update began.
"""

from __future__ import annotations

from typing import Any, NamedTuple

#: What a vCPU does, for query-migrate's names of it.
STATES = {"move": "moving", "carried": "carried", "takeover": "stopped"}
RUNNING, MOVING, CARRIED, STOPPED = "running", "moving", "carried", "stopped"
#: In an update that stops the guest first, the steps from this one on are its pause.
_STOP = "stop"
MAIN, ALL_VCPUS = "main", "all vCPUs"


class Span(NamedTuple):
    """A time in which one thing was done, in us since the update began."""

    name: str
    begin: float
    end: float

    @property
    def length_ms(self) -> float:
        """How long it is, in ms."""
        return (self.end - self.begin) / 1e3


class Lane(NamedTuple):
    """What happened one after the other: the main thread's steps, or what a vCPU did."""

    name: str
    spans: list[Span]


def lanes(timeline: list[dict[str, Any]]) -> list[Lane]:
    """Return the main thread's lane and one for each vCPU, in which a vCPU that nothing is said of
    runs. Without any vCPU, as in an update that stopped the guest first, one stands for all."""
    steps: list[Span] = []
    vcpus: dict[int, list[Span]] = {}
    for entry in timeline:
        span = Span(str(entry["name"]), float(entry["begin-us"]), float(entry["end-us"]))
        if "cpu" in entry:
            state = span._replace(name=STATES.get(span.name, span.name))
            vcpus.setdefault(int(entry["cpu"]), []).append(state)
        else:
            steps.append(span)
    end = max((float(entry["end-us"]) for entry in timeline), default=0.0)
    found = [Lane(MAIN, sorted(steps, key=lambda span: span.begin))]
    if vcpus:
        return found + [
            Lane(f"vCPU {index}", _with_running(states, end))
            for index, states in sorted(vcpus.items())
        ]
    stop = next((step.begin for step in steps if step.name == _STOP), None)
    pause = [] if stop is None else [Span(STOPPED, stop, end)]
    return [*found, Lane(ALL_VCPUS, _with_running(pause, end))]


def _with_running(states: list[Span], end: float) -> list[Span]:
    found, at = [], 0.0
    for state in sorted(states, key=lambda span: span.begin):
        if state.begin > at:
            found.append(Span(RUNNING, at, state.begin))
        found.append(state)
        at = max(at, state.end)
    return [*found, Span(RUNNING, at, end)] if end > at else found
