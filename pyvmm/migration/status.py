"""How a migration stands and how long its steps took, also across the exec: what query-migrate
shows, and the events that tell of it.

Times are CLOCK_MONOTONIC in ns, which goes on through an exec.
"""

from __future__ import annotations

import struct
import time
from itertools import pairwise

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.kvm.carrier import CpuTimes
    from pyvmm.machine.machine import Machine

#: The steps in order; each begins with its mark and ends where the next begins. In the old
#: image: trying the new command out, waiting for the devices, stopping the vCPUs (here the
#: pause begins), saving, and from execve to the new image's first line; there: making the
#: machine, reading and giving it its state, starting the vCPUs. The last one only ends the one
#: before.
STEPS = ("preflight", "quiesce", "stop", "save", "exec", "start", "load", "resume", "running")
#: Of these, what images from before there was quiesce know: they take nothing else.
_PACKED = tuple(step for step in STEPS if step != "quiesce")

#: QEMU's MigrationStatus, as far as an update gets into them.
STATUSES = (
    *("none", "setup", "cancelling", "cancelled", "active", "completed", "failed"),
    "device",
)
#: The capability that has each change of the status told by an event.
EVENTS = "events"
#: Capabilities that may be on.
SUPPORTED = {EVENTS}

#: Names of what goes from one image to the next: marks, that of quiesce, and words.
PACKED = ("progress", "quiesced", "capabilities", "note", "fallback", "kernel")
_LETS = b"lets"
_PACK = struct.Struct(f">{len(_PACKED)}Q")


class Status:
    """Status and marks of the last migration.

    :ivar state: QEMU's MigrationStatus, None before the first migration
    :ivar error: why it failed
    :ivar where: the function of a new image that could not take over
    :ivar note: what made a successful one slower than it should be
    :ivar running: whether the guest runs, or ran, through the exec
    :ivar fallback: why it did not, though it should
    :ivar kernel_lets: whether this kernel was found to let a guest run through an exec
    :ivar cpu_times: when each vCPU changed hands, of a guest that ran through the exec
    :ivar refault: how long the guest's memory was slow after it, and how many pages it has mapped
        again, and of these huge ones; empty as long as that is not known
    :ivar capabilities: names of those that are on; ``params.Capabilities`` shows and changes them

    :param emit: tells of an event: name and data
    """

    def __init__(self, emit: Callable[[str, dict[str, Any] | None], None]) -> None:
        self.state: str | None = None
        self.error: str | None = None
        self.where = ""
        self.note = ""
        self.running = False
        self.fallback = ""
        self.kernel_lets = False
        self.cpu_times: list[CpuTimes] = []
        self.refault: dict[str, Any] = {}
        self.capabilities: set[str] = set()
        self._emit = emit
        self._marks = dict.fromkeys(STEPS, 0)

    @property
    def active(self) -> bool:
        """Whether a migration is under way."""
        return self.state in ("setup", "cancelling", "active", "device")

    def begin(self) -> None:
        """A new migration: forget the last one."""
        self.error = None
        self.where = ""
        self.note = self.fallback = ""
        self.running = False
        self.cpu_times = []
        self.refault = {}
        self._marks = dict.fromkeys(STEPS, 0)
        self.mark("preflight")

    def mark(self, step: str, at_ns: int = 0) -> None:
        """A step begins now, or began at ``at_ns``."""
        self._marks[step] = at_ns or time.monotonic_ns()

    def enter(self, state: str) -> None:
        """Go to a state of :data:`STATUSES`, and tell of it if that is asked for."""
        self.state = state
        told = self._failure() if state == "failed" else {}
        if state == "completed":
            told = {"running": self.running}
            if self.fallback:
                told["fallback"] = self.fallback
        self.emit("MIGRATION", {"status": state, **told})

    def fail(self, error: str) -> None:
        """The migration failed; ``error`` says why."""
        self.error = error
        self.enter("failed")

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Tell of an event, if events of migrations are asked for."""
        if EVENTS in self.capabilities:
            self._emit(name, data)

    def pack(self) -> dict[str, bytes]:
        """Return what the next image has to know of it, by name."""
        return {
            "progress": _PACK.pack(*(self._marks[step] for step in _PACKED)),
            "quiesced": self._marks["quiesce"].to_bytes(8),
            "capabilities": " ".join(sorted(self.capabilities)).encode(),
            "note": self.note.encode(),
            "fallback": self.fallback.encode(),
            "kernel": _LETS * self.kernel_lets,
        }

    def unpack(self, packed: dict[str, bytes]) -> None:
        """Go on from what :meth:`pack` returned in the image before, as far as it makes sense."""
        marks = packed["progress"]
        if len(marks) == _PACK.size:
            self._marks |= zip(_PACKED, _PACK.unpack(marks), strict=True)
        self._marks["quiesce"] = int.from_bytes(packed["quiesced"][:8])
        names = packed["capabilities"].decode("ascii", "replace").split()
        self.capabilities |= SUPPORTED.intersection(names)
        self.note = packed["note"].decode("utf-8", "replace")
        self.fallback = packed["fallback"].decode("utf-8", "replace")
        self.kernel_lets = packed["kernel"] == _LETS

    def steps_ms(self) -> dict[str, float]:
        """Return the length of each step that ended, in ms."""
        marks = {step: mark for step, mark in self._marks.items() if mark}
        return {step: (marks[following] - marks[step]) / 1e6 for step, following in pairwise(marks)}

    def info(self) -> dict[str, Any]:
        """Return what query-migrate says of the last migration: times in ms."""
        if self.state is None:
            return {}
        result: dict[str, Any] = {"status": self.state}
        marks = self._marks
        if self.state == "completed" and marks["preflight"] and marks["running"]:
            result["total-time"] = round((marks["running"] - marks["preflight"]) / 1e6)
            result["setup-time"] = round((marks["stop"] - marks["preflight"]) / 1e6)
            result["downtime"] = round(self._pause_ns() / 1e6)
            result["phases"] = {step: round(ms, 3) for step, ms in self.steps_ms().items()}
            result["running"] = self.running
            if self.fallback:
                result["fallback"] = self.fallback
            if self.cpu_times:
                result |= self._describe_moves()
            if self.refault:
                result["refault"] = self.refault
            result["timeline"] = self.timeline()
            if self.note:
                result["note"] = self.note
        if self.error is not None:
            result |= self._failure()
        return result

    def timeline(self) -> list[dict[str, Any]]:
        """Return what took how long: the steps, and what became of each vCPU. Times in us since
        the update began."""
        marks = {step: mark for step, mark in self._marks.items() if mark}
        spans: list[tuple[str, int | None, int, int]] = [
            (step, None, marks[step], marks[following]) for step, following in pairwise(marks)
        ]
        for index, cpu in enumerate(self.cpu_times):
            spans += [
                ("move", index, cpu.left, cpu.entered),
                ("carried", index, cpu.entered, cpu.asked),
                ("takeover", index, cpu.asked, cpu.run),
            ]
        start = self._marks["preflight"]
        return [
            {
                "name": name,
                **({} if index is None else {"cpu": index}),
                "begin-us": (begin - start) / 1e3,
                "end-us": (end - start) / 1e3,
            }
            for name, index, begin, end in spans
            if begin and end
        ]

    def _pause_ns(self) -> int:
        # How long the guest stood still: the vCPU that did longest.
        marks = self._marks
        if self.cpu_times:
            return max(cpu.run - cpu.asked for cpu in self.cpu_times)
        return marks["running"] - marks["stop"]

    def _describe_moves(self) -> dict[str, Any]:
        first = min(cpu.left for cpu in self.cpu_times)
        return {
            "cpu-pauses": [
                {
                    "cpu": index,
                    "move-us": (cpu.entered - cpu.left) / 1e3,
                    "takeover-us": (cpu.run - cpu.asked) / 1e3,
                }
                for index, cpu in enumerate(self.cpu_times)
            ],
            "device-stall": round((self._marks["running"] - first) / 1e6, 3),
        }

    def _failure(self) -> dict[str, Any]:
        # What failed, and where if that was in the new image.
        where = {"error-where": self.where} if self.where else {}
        return {"error-desc": self.error or "", **where}


def blockers(machine: Machine) -> list[str]:
    """Return what keeps this machine from being updated, whatever the command."""
    from pyvmm.vmstate.stream import MAX_BLOCKS  # a start has no use for the rest of it

    count = len(machine.ram_blocks)
    too_many = [
        f"{count} blocks of memory, of which a state names {MAX_BLOCKS}; leave out an -object"
    ]
    unfinished = [
        f"vCPU {cpu.index} is in the middle of an access to memory that the host cannot back;"
        " mend that and cont first"
        for cpu in machine.cpus
        if cpu.is_unfinished
    ]
    private = [
        f"Memory region {backend.id} is not compatible with CPR: it is private to this "
        "process; share=on is required for -object, and -machine anon-alloc=memfd"
        for backend in machine.ram_blocks
        if not backend.is_shared or backend.fd is None
    ]
    return (too_many if count > MAX_BLOCKS else []) + unfinished + private
