"""What a virtual machine may have lived through when a test looks at it.

A test of what a guest or its user sees takes the fixture ``any_vm`` and calls
:meth:`harness.Vm.live` wherever that must make no difference. It runs once for each of
:data:`LIVES`, or for those that it asks for by a mark: ``@lives.CONNECTED``.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from faults.tools import BACK, replaced

from harness.vm import UpdateError, Vm

#: The last that a new image does before its guest runs: all is loaded, and all threads are there.
LAST = "pyvmm.kvm.carrier:Takeover.take"
LAST_PLAIN = "pyvmm.wayback:close"
SAVED = "vm.saved"


@dataclass(frozen=True)
class Life:
    """One way of living, which a guest and its clients must not notice.

    :param name: the test's parameter
    :param live: what happens to the machine
    :param ram_file: name of the file in the machine's folder that RAM must be in
    :param stands_still: whether a guest that runs is stopped by it and told so
    :param runs_through: whether its vCPUs run all the time, but for a moment
    :param is_connected: whether clients' connections and the host's open files live on
    """

    name: str
    live: Callable[[Vm], object]
    ram_file: str | None = None
    stands_still: bool = True
    runs_through: bool = False
    is_connected: bool = True

    def options(self, memory):
        """Further options of a machine with that much memory."""
        if self.ram_file is None:
            return []
        place = f"mem-path={self.ram_file},share=on"
        return ["-object", f"memory-backend-file,id=pc.ram,size={memory},{place}"]


def stop_and_cont(machine):
    """Let a guest that runs stand still for a moment."""
    if machine.status == "running":
        machine.hmp("stop")
        machine.hmp("cont")


def come_back(machine):
    """An update that fails after all is loaded: the guest goes on in the image before."""
    fault = "raise ValueError('injected')"
    command = replaced(machine, LAST, fault, LAST_PLAIN, fault)
    reply = machine.hmp(f"update {shlex.join(command)}")
    if BACK not in reply:
        raise UpdateError(f"update to {command}: {reply!r}")


def save(machine):
    """Save the state to a file, and end the process; the file. RAM must be in a file, too."""
    state = machine.folder / SAVED
    # RAM and state belong together for as long as the new image does not run the guest.
    machine.set_update([*machine.argv, "-S", "-incoming", f"file:{state}"])
    if reply := machine.hmp(f"migrate file:{state}"):
        raise UpdateError(f"migrate: {reply!r}")
    machine.hmp_quit()
    return state


def restore(machine):
    """Save the machine, and go on with it in another process."""
    machine.restart("-incoming", f"file:{save(machine)}")


#: A new mode of passing a guest on is one entry more.
LIVES = (
    Life("booted", lambda machine: None, stands_still=False),
    Life("updated", Vm.update, runs_through=True),
    Life("plain", lambda machine: machine.plain().update()),
    Life("returned", come_back, runs_through=True),
    Life("restored", restore, ram_file="ram", is_connected=False),
)
#: A part of all that follow "booted": only for tests whose subject it is.
STOPPED = Life("stopped", stop_and_cont)


def _those(*chosen):
    return pytest.mark.parametrize("any_vm", chosen, indirect=True, ids=lambda life: life.name)


#: Marks for tests that do not make sense in every life.
#: Has a test run with its virtio devices on virtio-mmio, and on PCI.
BUSES = pytest.mark.parametrize("bus", ["mmio", "pci"], indirect=True)
CONNECTED = _those(*(life for life in LIVES if life.is_connected))
STANDS_STILL = _those(STOPPED, *(life for life in LIVES if life.stands_still))
LONG_STILL = _those(
    STOPPED, *(life for life in LIVES if life.stands_still and not life.runs_through)
)
