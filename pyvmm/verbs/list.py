"""``pyvmm list``: the VMs that run, and how they are."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pyvmm import rundir
from pyvmm.errors import PyvmmError
from pyvmm.verbs.client import QmpClient, printable

_TIMEOUT_S = 2.0
_COLUMNS = ("name", "pid", "state", "memory", "vcpus", "uptime", "updates")


def show(*, as_json: bool) -> int:
    """Print the VMs that run; return the exit code."""
    names = rundir.names()
    # One that does not answer must not hold up the others.
    with ThreadPoolExecutor(max_workers=32) as pool:
        rows = list(pool.map(describe, names))
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print("no VM runs")
        return 0
    table = [[column.upper() for column in _COLUMNS], *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(line.rstrip())
    return 0


def describe(name: str) -> dict[str, Any]:
    """Return what is known of one VM: ``name``, ``pid``, ``state`` (QMP's RunState; ``unknown`` if
    it does not answer), ``memory`` (bytes), ``vcpus``, ``uptime`` (seconds), ``updates``,
    ``version``; what is not known is None."""
    path = rundir.directory(name)
    info = rundir.read_info(path)
    try:
        with QmpClient(path, _TIMEOUT_S) as client:
            state = client.execute("query-status")["status"]
    except (PyvmmError, LookupError, TypeError):
        state = "unknown" if info else "starting"
    started = _number(info.get("started"))
    return {
        "name": name,
        "pid": _number(info.get("pid")),
        "state": str(state),
        "memory": _number(info.get("memory")),
        "vcpus": _number(info.get("smp")),
        "uptime": None if started is None else round(time.monotonic() - started / 1000, 1),
        "updates": _number(info.get("updates")),
        "version": info.get("version"),
    }


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _cells(row: dict[str, Any]) -> list[str]:
    shown = {column: "-" if row[column] is None else str(row[column]) for column in _COLUMNS}
    shown["name"] = printable(row["name"])
    if row["memory"] is not None:
        shown["memory"] = f"{row['memory'] / (1 << 20):g} MiB"
    if row["uptime"] is not None:
        shown["uptime"] = duration(row["uptime"])
    return list(shown.values())


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: ``5s``, ``3m 20s``, ``2d 4h``."""
    left = max(int(seconds), 0)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts or unit == "s":
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])
