"""Write down what a version saves, for the tests of later versions.

    PYTHONPATH=tests .venv/bin/python -m upgrade.record COMMIT

boots machines of every device with that version, updates each once and puts what it wrote below
``tests/upgrade/states/COMMIT``: a migration stream and a CPR state a machine, packed with xz, and
the machines' options. Done once a version; see ``tests/upgrade/states/README.md``.
"""

import json
import lzma
import os
import shlex
import sys
import tempfile
from pathlib import Path

from harness import Vm, versions
from upgrade.machines import WORKS, Peers

from pyvmm.cpr import state as cpr_state

STATES = Path(__file__).with_name("states")
#: Value of the CPR state that names places on the host that wrote it.
COMMAND = "rollback/command"
#: What is executed as the new version: it copies the CPR state on its way to pyvmm.
COPY = """#!/bin/sh
[ -n "$PYVMM_CPR_PROBE" ] || cat "/proc/self/fd/$PYVMM_CPR_EXEC_STATE" >cpr
exec {pyvmm} "$@"
"""


def record(version, kind, folder):
    """Save one machine.

    :param folder: an empty one
    :return: its options, the stream, the CPR state
    """
    work = kind()
    script = folder / "copy"
    script.write_text(COPY.format(pyvmm=shlex.quote(version.pyvmm)))
    script.chmod(0o755)
    own = folder / "vm"
    own.mkdir()
    with (
        Peers(folder) as peers,
        Vm(own, *peers.options, append=work.append, smp=work.smp, program=version.run) as machine,
    ):
        work.begin(machine, peers)
        work.before()
        options = machine.argv[2:]
        machine.set_update([str(script), "run", *options, "-incoming", "file:state"])
        assert machine.hmp("migrate file:state") == ""
        work.check()
        assert "completed" in machine.hmp("info migrate")
        assert machine.hmp_quit() == 0
    words = shlex.join(word.replace(f"{folder}/", "") for word in options)
    return words, (own / "state").read_bytes(), (own / "cpr").read_bytes()


def without_places(data, folder):
    """A CPR state without the paths of the host that it was written on."""
    state = cpr_state.decode(data)
    assert cpr_state.encode(state) == data
    words = state.values[COMMAND].split(b"\0")
    start = words.index(b"run")
    words = [b"python", b"pyvmm", *words[start:]]
    state.values[COMMAND] = b"\0".join(words).replace(f"{folder}/".encode(), b"")
    data = cpr_state.encode(state)
    assert str(folder).encode() not in data
    return data


def main():
    """Record a version."""
    version = versions.commit(sys.argv[1])
    target = STATES / version.name
    target.mkdir(parents=True)
    machines = {}
    for kind in WORKS:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["XDG_RUNTIME_DIR"] = scratch
            folder = Path(scratch)
            name = kind.__name__.lower()
            machines[name], stream, cpr = record(version, kind, folder)
            for what, data in (("stream", stream), ("cpr", without_places(cpr, folder))):
                (target / f"{name}.{what}.xz").write_bytes(lzma.compress(data, preset=9))
    (target / "machines.json").write_text(json.dumps(machines, indent=1) + "\n")


if __name__ == "__main__":
    main()
