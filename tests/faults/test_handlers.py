"""Bugs in what the main loop calls: they cost a connection, not the guest."""

import os

import pytest
from faults.test_connections import Stream, connected
from faults.tools import QMP, Qmp, check_alive, faulty

BUG = "raise RuntimeError('injected')"
BUG_AT_BELL = f"if b'\\x07' in arguments[1]:\n {BUG}"


@pytest.mark.parametrize(
    ("option", "where"),
    [
        ("-serial", "pyvmm.devices.serial:Serial.receive"),
        ("-monitor", "pyvmm.monitor.hmp.lines:LineMonitor.receive"),
    ],
    ids=["serial", "monitor"],
)
def test_input_that_cannot_be_taken_ends_its_connection(ticker, option, where):
    listener = (option, "unix:s.sock,server=on,wait=off")
    machine = ticker(*listener, program=faulty(where, BUG_AT_BELL))
    for _ in range(2):  # the next client is served as the first was
        fd = connected(str(machine.folder / "s.sock"))
        os.write(fd, b"\a")
        client = Stream(fd, fd)
        with pytest.raises(AssertionError, match="end of file"):
            client.expect("nothing of the kind")
        os.close(fd)
    problems = machine.stderr().splitlines()
    assert len(problems) == 2
    assert all("RuntimeError('injected')" in line for line in problems)
    check_alive(machine)


def test_event_that_a_monitor_cannot_tell_stops_nothing_half_way(ticker):
    program = faulty("pyvmm.monitor.qmp.session:QmpSession.handle_machine_event", BUG)
    machine = ticker(*QMP, program=program)
    with Qmp(machine.folder / "qmp.sock") as qmp:
        qmp.execute("stop")
        assert qmp.execute("query-status")["status"] == "paused"
        qmp.execute("cont")
    check_alive(machine)
    assert "RuntimeError('injected')" in machine.stderr()


def test_bug_in_what_the_machine_does_itself_pauses_the_guest(vm):
    program = faulty("pyvmm.machine.guest_end:GuestEnd._reset", BUG)
    machine = vm(append="shell", program=program)
    machine.expect("guest> ")
    machine.type("reset\n")
    machine.wait_status("paused (internal-error)")
    assert "RuntimeError('injected')" in machine.stderr()
    assert machine.hmp("info version")
