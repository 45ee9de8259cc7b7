"""Several machines in one process, on one loop."""

import os
import threading
import time

import pytest
from harness import DEADLINE_S

from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.handover import Handover
from pyvmm.errors import PyvmmError
from pyvmm.machine import builder, options


@pytest.fixture
def loop():
    loop = EventLoop()
    yield loop
    loop.close()


def build(loop, serial, *words):
    """A machine whose guest ticks on a file; closed when it has come to its end."""
    argv = ["-m", "16M", "-nodefaults", "-serial", f"file:{serial}", *words]
    config = options.parse([*argv, "-append", "ticker period=5"])
    machine = builder.build(config, loop, Handover(), lambda: loop.call_soon(end))

    def end():
        machine.close()

    return machine


def serve(loop, condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        loop.run_once(0.05)
        assert time.monotonic() < deadline, what


def ticks(serial):
    return serial.read_bytes().count(b"tick ")


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_quit_ends_its_machine_and_not_the_other(loop, tmp_path):
    threads, fds = len(os.listdir("/proc/self/task")), descriptors()
    serials = [tmp_path / "one", tmp_path / "two"]
    first, second = machines = [build(loop, serial) for serial in serials]
    seen = {machine: [] for machine in machines}
    for machine in machines:
        machine.subscribe(lambda name, _data, machine=machine: seen[machine].append(name))
        machine.start()
    serve(loop, lambda: min(map(ticks, serials)) > 3, "two guests that tick")
    first.quit(7)
    serve(loop, lambda: first.cpus[0].vcpu.fd < 0, "the end of the first")
    assert (first.end.exit_code, first.ended) == (7, True)
    assert (second.ended, loop.stopping) == (False, False)
    assert seen == {first: ["RESUME", "SHUTDOWN"], second: ["RESUME"]}
    gone, stands = ticks(serials[0]), ticks(serials[1])
    serve(loop, lambda: ticks(serials[1]) > stands + 20, "the second, which goes on")
    assert ticks(serials[0]) == gone
    second.stop()
    second.cont()
    second.reset()
    stands = ticks(serials[1])
    serve(loop, lambda: ticks(serials[1]) > stands + 3, "the second after a reset")
    second.quit()
    serve(loop, lambda: second.cpus[0].vcpu.fd < 0, "the end of the second")
    deadline = time.monotonic() + DEADLINE_S
    while len(os.listdir("/proc/self/task")) > threads:
        assert time.monotonic() < deadline, threading.enumerate()
    assert descriptors() == fds


@pytest.mark.parametrize(
    "words",
    [
        ("-serial", "chardev:none"),
        ("-drive", "file=none,format=raw"),
        ("-device", "isa-debugcon,iobase=0x3f8"),
        ("-kernel", "/proc/none"),
    ],
    ids=["chardev", "drive", "device", "kernel"],
)
def test_machine_that_cannot_be_built_leaves_nothing_behind(loop, tmp_path, words):
    fds, maps = descriptors(), vm_maps()
    with pytest.raises(PyvmmError):
        build(loop, tmp_path / "serial", *words)
    assert (descriptors(), vm_maps()) == (fds, maps)


def vm_maps():
    """The mappings of guest memory and of vCPUs."""
    with open("/proc/self/maps") as maps:
        return [line for line in maps if "kvm-vcpu" in line or "memfd:" in line]
