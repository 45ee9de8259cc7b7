"""Standard output that takes nothing: input goes on, and so does output once there is room."""

import os
import re
import resource

import pytest
from faults.tools import TICKER, check_alive, update
from harness import wait_until

QUITS = {
    "mon:stdio": ("-serial", b"\n\x01x"),
    "monitor": ("-monitor", b"info status\nquit\n"),
    "qmp": ("-qmp", b'{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n'),
}


@pytest.fixture
def stdin():
    """Both ends of a pipe."""
    fds = os.pipe()
    yield fds
    for fd in fds:
        os.close(fd)


def open_gone():
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def open_full():
    return os.open("/dev/full", os.O_WRONLY)


def dropped(machine):
    """Bytes that chardevs lost: by label."""
    found = re.findall(r"(?m)^(\S+): .* \((\d+) bytes dropped\)$", machine.hmp("info chardev"))
    return {label: int(count) for label, count in found}


@pytest.mark.parametrize("what", QUITS)
@pytest.mark.parametrize("out", [open_full, open_gone], ids=["full", "gone"])
def test_the_operator_can_still_quit(vm, stdin, what, out):
    option, keys = QUITS[what]
    fd = out()
    machine = vm(
        *(option, "mon:stdio" if what == "mon:stdio" else "stdio"),
        serial=what != "mon:stdio",
        append=TICKER,
        stdin=stdin[0],
        stdout=fd,
    )
    os.close(fd)
    wait_until(lambda: dropped(machine), "output that is lost")
    assert update(machine) == ""
    wait_until(lambda: machine.hmp("info status") == "VM status: running\n", "the new image")
    os.write(stdin[1], keys)
    assert machine.wait_exit() == 0


def test_output_of_the_guest_goes_on_when_there_is_room_again(vm, stdin, tmp_path):
    """A limit of the size stands in for a disk without room."""
    with open(tmp_path / "out", "wb") as file:
        machine = vm(
            *("-device", "isa-debugcon,iobase=0xe9,chardev=c", "-chardev", "stdio,id=c"),
            append=TICKER,
            stdin=stdin[0],
            stdout=file.fileno(),
        )
    machine.expect(r"tick 2\r\n")
    machine.hmp("o /b 0xe9 0x41")
    resource.prlimit(machine.pid, resource.RLIMIT_FSIZE, (1, -1))
    for _ in range(3):
        machine.hmp("o /b 0xe9 0x42")
    assert dropped(machine) == {"c": 3}
    resource.prlimit(machine.pid, resource.RLIMIT_FSIZE, (-1, -1))
    machine.hmp("o /b 0xe9 0x43")
    assert (tmp_path / "out").read_bytes() == b"AC"
    check_alive(machine)
