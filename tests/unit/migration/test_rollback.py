"""The command that leads back: what this process was started with."""

import sys

import pytest

from pyvmm.migration import rollback


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("pyvmm run", "pyvmm run"),
        ("python -m pyvmm run -m 1G", "python -m pyvmm run -m 1G"),
        ("pyvmm run -incoming file:x -smp 2", "pyvmm run -smp 2"),
        ("pyvmm run --incoming memfd: -m 1G -incoming defer", "pyvmm run -m 1G"),
        # Whether the guest runs is in the state; a VM started with -S may run by now.
        ("pyvmm run -S -m 1G", "pyvmm run -m 1G"),
        # A value that looks like an option is none.
        (
            "pyvmm run -name -S -append -incoming -m 1G",
            "pyvmm run -name -S -append -incoming -m 1G",
        ),
    ],
)
def test_own_command_loads_its_state_once(monkeypatch, typed, expected):
    monkeypatch.setattr(sys, "orig_argv", typed.split())
    assert rollback.own_command("memfd:") == [*expected.split(), "-incoming", "memfd:"]
