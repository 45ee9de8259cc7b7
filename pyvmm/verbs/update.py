"""``pyvmm update``: have a VM replace its pyvmm, and say how that went."""

from __future__ import annotations

import select
import sys
import time
from contextlib import nullcontext
from typing import Any

from pyvmm.errors import CommandError, HostError
from pyvmm.rundir import directory, read_info
from pyvmm.verbs.client import QmpClient, find, printable
from pyvmm.verbs.trace import TraceFile

_POLL_S = 0.05
_ENDS = ("completed", "failed", "cancelled")
_STOP = "stop"


def update(name: str, command: list[str], timeout_s: float, trace: str | None = None) -> int:
    """Update the VM ``name``; return the exit code.

    It is 0 if the new pyvmm runs the guest, 1 if the old one goes on.

    :param command: a ``pyvmm run`` command; empty for the VM's own
    :param trace: a file for what took how long
    :raises ConfigError: that file cannot be written
    :raises HostError: the VM does not run, or ended
    """
    with TraceFile(trace) if trace else nullcontext() as file:
        info = _perform(name, command, timeout_s)
        code = _report(name, info, timeout_s)
        if file:
            _write(file, name, info)
    return code


def _perform(name: str, command: list[str], timeout_s: float) -> dict[str, Any]:
    """Update; return query-migrate's last answer."""
    deadline = time.monotonic() + timeout_s
    try:
        with QmpClient(find(name)) as client:
            _show(name, "preflight")
            client.execute("update", {"command": command} if command else {})
            return _wait(client, name, deadline)
    except CommandError as error:
        return {"status": "failed", "error-desc": str(error)}
    finally:
        _wipe()


def _report(name: str, info: dict[str, Any], timeout_s: float) -> int:
    """Say how it went; return the exit code."""
    status = info["status"]
    if status == "failed":
        return _fail(name, str(info.get("error-desc", "no reason given")))
    if status == "cancelled":
        return _fail(name, f"cancelled; a timeout of {timeout_s:g} s was given")
    phases: dict[str, float] = info.get("phases", {})
    for phase, ms in phases.items():
        print(f"  {phase:<10}{ms:9.1f} ms")
    print(f"{name}: updated, {describe(info)}")
    return 0


def describe(info: dict[str, Any]) -> str:
    """Return how long the guest stood still, and why so long if it need not have."""
    if "cpu-pauses" in info:
        stall = f"its devices answered again after {info['device-stall']:.1f} ms"
        return f"the guest stood for {downtime(info):.2f} ms and ran meanwhile; {stall}"
    fallback = f" (it could not run meanwhile: {info['fallback']})" if info.get("fallback") else ""
    return f"downtime {downtime(info):.1f} ms{fallback}"


def downtime(info: dict[str, Any]) -> float:
    """Return how long the guest stood still, in ms, by query-migrate's answer."""
    if "cpu-pauses" in info:
        return max(float(cpu["takeover-us"]) for cpu in info["cpu-pauses"]) / 1000
    phases = info.get("phases", {})
    if _STOP not in phases:
        return float(info.get("downtime", 0))
    names = list(phases)
    return sum(float(phases[phase]) for phase in names[names.index(_STOP) :])


def _wait(client: QmpClient, name: str, deadline: float) -> dict[str, Any]:
    """Poll until the update has ended; return query-migrate's last answer."""
    cancelled = False
    while True:
        info: dict[str, Any] = client.execute("query-migrate")
        status = info.get("status")
        if status in _ENDS:
            return info
        _show(name, "preflight" if status in ("setup", "cancelling") else str(status))
        if time.monotonic() >= deadline and not cancelled:
            # Without effect on a guest that has been stopped: its update ends by itself, soon.
            client.execute("migrate_cancel")
            cancelled = True
            deadline += client.timeout_s or 0
        elif time.monotonic() >= deadline:
            raise HostError(f"{name}: the update does not end; see 'info migrate' in its monitor")
        select.select([], [], [], _POLL_S)


def _write(file: TraceFile, name: str, info: dict[str, Any]) -> None:
    """Write the trace, and say what became of it. The exit code tells of the update alone."""
    timeline = info.get("timeline")
    if not timeline:
        print(f"pyvmm: --trace {file.path}: the VM tells no times of it", file=sys.stderr)
        return
    pid = read_info(directory(name)).get("pid", 0)
    ended = "updated" if info["status"] == "completed" else "was not updated"
    try:
        file.write(f"{printable(name)} {ended}", pid, timeline)
    except HostError as error:
        print(f"pyvmm: {error}", file=sys.stderr)
        return
    print(f"{name}: what took how long is in {file.path}")


def _fail(name: str, reason: str) -> int:
    print(f"pyvmm: {name} was not updated: {reason}", file=sys.stderr)
    return 1


def _show(name: str, phase: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{name}: {phase} ...")
        sys.stderr.flush()


def _wipe() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
