"""``pyvmm update``: have a VM replace its pyvmm, and say how that went."""

from __future__ import annotations

import select
import sys
import time
from typing import Any

from pyvmm.errors import CommandError, HostError
from pyvmm.verbs.client import QmpClient, find

_POLL_S = 0.05
_ENDS = ("completed", "failed", "cancelled")
_STOP = "stop"


def update(name: str, command: list[str], timeout_s: float) -> int:
    """Update the VM ``name``; return the exit code.

    It is 0 if the new pyvmm runs the guest, 1 if the old one goes on.

    :param command: a ``pyvmm run`` command; empty for the VM's own
    :raises HostError: the VM does not run, or ended
    """
    deadline = time.monotonic() + timeout_s
    try:
        with QmpClient(find(name)) as client:
            _show(name, "preflight")
            client.execute("update", {"command": command} if command else {})
            info = _wait(client, name, deadline)
    except CommandError as error:
        return _fail(name, str(error))
    finally:
        _wipe()
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
