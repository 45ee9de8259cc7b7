"""Standard error whose reader left, hung up, or reads nothing: what is said there costs nothing."""

import os
import select
import signal
import time

import pytest
from faults.test_connections import connected
from faults.tools import BACK, TICKER, check_alive, check_ticking, faulty, replaced
from harness import DEADLINE_S, guests, process, pyvmm, wait_until

BUG = "raise RuntimeError('injected')"
BUG_AT_BELL = f"if b'\\x07' in arguments[1]:\n {BUG}"
BUG_IN_NAME = f"if arguments[1] == 'query-name':\n {BUG}"


class Reader:
    """The other end of a standard error that nobody reads."""

    def __init__(self, kind):
        self.kind = kind
        #: As :class:`harness.Vm`'s arguments.
        self.arguments = {}
        self._fds = []
        if kind == "closed":
            return
        self._reading, writing = self._fds = list(os.openpty() if kind == "hung up" else os.pipe())
        self.arguments = {"stderr": writing}
        if kind == "full":
            self._fill(writing)
        else:
            os.close(self._fds.pop(0))

    @property
    def program(self):
        """What starts pyvmm so."""
        start = (pyvmm(), "run")
        return ("sh", "-c", 'exec "$0" "$@" 2>&-', *start) if self.kind == "closed" else start

    def started(self):
        """The VM has its end; only that one is to be there."""
        if self._fds:
            os.close(self._fds.pop())

    def read(self, wanted):
        """Read, at last, until it says what is ``wanted``; all of it."""
        deadline, text = time.monotonic() + DEADLINE_S, b""
        while wanted not in text:
            left = max(deadline - time.monotonic(), 0)
            assert select.select([self._reading], [], [], left)[0], text
            text += os.read(self._reading, 65536).replace(b"\0", b"")
        return text

    def check_told(self):
        """Once somebody reads, it is said how many messages were lost."""
        if self.kind == "full":
            self.read(b"dropped\n")

    def close(self):
        for fd in self._fds:
            os.close(fd)

    def _fill(self, fd):
        os.set_blocking(fd, False)
        try:
            while True:
                os.write(fd, bytes(4096))
        except BlockingIOError:
            os.set_blocking(fd, True)


@pytest.fixture(params=["gone", "hung up", "closed", "full"])
def reader(request):
    reader = Reader(request.param)
    yield reader
    reader.close()


@pytest.fixture
def start(vm, reader):
    def start(*options, program=None, **arguments):
        if program is not None and reader.kind == "closed":
            program = ("sh", "-c", 'exec "$0" "$@" 2>&-', *program)
        program = program or reader.program
        machine = vm(*options, program=program, **reader.arguments, **arguments)
        reader.started()
        return machine

    return start


def check_ends(machine):
    machine.kill(signal.SIGTERM)
    assert machine.wait_exit() == 128 + signal.SIGTERM


def test_internal_error_of_kvm_pauses(start, reader, tmp_path):
    code = guests.print_text("off\n") + guests.TO_UNMAPPED
    machine = start("-kernel", guests.flat(tmp_path, code))
    for _ in range(2):
        machine.expect("off\n")
        machine.wait_status("paused (internal-error)")
        machine.hmp("system_reset")
        machine.hmp("cont")
    machine.wait_status("paused (internal-error)")
    shown = int(machine.hmp("info messages").split()[-1])
    assert shown >= 2 if reader.kind != "closed" else shown == 0  # /dev/null is in its place
    reader.check_told()
    check_ends(machine)


def test_update_that_fails_is_undone(start, reader):
    machine = start(append=TICKER)
    machine.expect(r"tick 2\r\n")
    command = replaced(machine, "pyvmm.machine.builder:build", BUG)
    machine.set_update([*command, "-incoming", "file:vm.state"])
    # Nobody waits for the answer, so the image that is back says it on standard error.
    machine.hmp("migrate -d file:vm.state")
    wait_until(lambda: BACK in machine.hmp("info migrate"), "the way back")
    check_ticking(machine)
    reader.check_told()
    check_alive(machine)
    check_ends(machine)


def test_warning(start, reader):
    machine = start(
        *("-serial", "unix:s.sock,server=on,wait=off"),
        append=TICKER,
        program=faulty("pyvmm.devices.serial:Serial.receive", BUG_AT_BELL),
    )
    machine.expect(r"tick 2\r\n")
    for _ in range(2):
        fd = connected(str(machine.folder / "s.sock"))
        os.write(fd, b"\a")  # it costs this connection
        wait_until(lambda: os.read(fd, 100) == b"", "its end")  # noqa: B023
        os.close(fd)
    check_ticking(machine)
    reader.check_told()
    check_ends(machine)


def test_traceback_that_python_prints(start, reader):
    program = faulty("pyvmm.monitor.registry:Context.execute", BUG_IN_NAME)
    machine = start(append=TICKER, program=program)
    machine.expect(r"tick 2\r\n")
    for _ in range(2):
        assert "internal error (RuntimeError)" in machine.hmp("info name")
    check_ticking(machine)
    reader.check_told()
    check_ends(machine)


@pytest.mark.parametrize("number", [0, 1])
def test_descriptor_is_not_made_nonblocking_for_others(vm, tmp_path, number):
    reading, writing = os.pipe()
    name = ("stdout", "stderr")[number]
    code = guests.print_text("off\n") + guests.TO_UNMAPPED
    machine = vm("-kernel", guests.flat(tmp_path, code), "-serial", "pty", **{name: writing})
    machine.wait_status("paused (internal-error)")
    wanted = (b"char device redirected to /dev/pts/", b"KVM internal error")[number]
    text = b""
    while wanted not in text:
        text += os.read(reading, 4096)
    assert os.get_blocking(writing)
    os.close(reading)
    os.close(writing)
    assert process.descriptors(machine.pid)
