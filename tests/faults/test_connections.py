"""Clients on every kind of connection, over updates and over those that come back."""

import errno
import os
import re
import socket
import threading
from pathlib import Path

import pytest
from faults.tools import BACK, Qmp, check_alive, replaced, update
from harness import wait_until
from harness.connections import OPENERS, Stream, connected, opened, tcp_address

from pyvmm import rundir

FAULT = ("pyvmm.devices.rtc:Rtc.load", "raise ValueError('injected')")


@pytest.fixture(params=OPENERS, ids=lambda opener: opener.__name__)
def shell(request, vm):
    with opened(request.param, vm) as found:
        yield found


def test_half_a_line_on_the_serial_port(shell):
    machine, stream = shell
    for number in range(4):
        stream.send("ec")
        if number % 2:
            assert BACK in update(machine, replaced(machine, *FAULT))
        else:
            assert update(machine) == ""
        stream.send(f"ho {number}{'x' * number}end\n")
        stream.expect(rf"echo {number}x*end\r?\n{number}{'x' * number}end\r?\n")


def test_typed_input_over_many_updates(shell):
    """Typed while the update goes on: no byte lost, repeated or out of order."""
    machine, stream = shell
    for number in range(12):
        text = f"{number}-" + "abcdefghijklmnopqrstuvwxyz0123456789" * 2
        machine.hmp_send("update")
        for at in range(0, len(text), 9):
            stream.send(("echo " if at == 0 else "") + text[at : at + 9])
        stream.send("\n")
        stream.expect(rf"echo {text}\r?\n{text}\r?\n")
        assert machine.hmp_reply() == ""


def test_half_a_command_on_the_monitor(vm):
    machine = vm()
    machine.hmp("info status")
    for number in range(4):
        machine._send("monitor", b"info st")
        with own_qmp(machine) as qmp:
            if number % 2:
                fault = replaced(machine, *FAULT)
                qmp.send({"execute": "update", "arguments": {"command": fault}})
            else:
                qmp.send({"execute": "update"})
            assert "return" in qmp.reply()
            # Half of a QMP command, too, and the rest after the exec.
            qmp.send_raw('{"execute": "query-')
            wanted = "failed" if number % 2 else "completed"
            machine._send("monitor", b"atus\n")
            assert "VM status: running" in machine.hmp_reply()
            wait_until(lambda w=wanted: w in machine.hmp("info migrate"), "the end of the update")
            qmp.send_raw('status", "id": 7}\n')
            reply = qmp.reply()
            assert (reply["return"]["status"], reply["id"]) == ("running", 7)


def own_qmp(machine):
    """A client of the socket that every VM has in the run directory."""
    return Qmp(Path(rundir.base()) / f"vm-{machine.pid}" / rundir.QMP_SOCKET)


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_connections_are_never_refused(vm, family):
    if family == "unix":
        machine = vm("-qmp", "unix:q.sock,server=on,wait=off")
        target, kind = str(machine.folder / "q.sock"), socket.AF_UNIX
    else:
        machine = vm("-qmp", "tcp:127.0.0.1:0,server=on,wait=off")
        target, kind = tcp_address(machine), socket.AF_INET
    machine.expect("guest> ")
    stop, refused, served = threading.Event(), [], []

    def hammer():
        while not stop.is_set():
            with socket.socket(kind) as sock:
                sock.settimeout(30)
                try:
                    sock.connect(target)
                    greeting = sock.makefile().readline()
                    (served if "QMP" in greeting else refused).append(greeting)
                except OSError as error:
                    refused.append(errno.errorcode.get(error.errno, str(error)))

    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        for number in range(20):
            if number % 5 == 4:
                assert BACK in update(machine, replaced(machine, *FAULT))
            else:
                assert update(machine) == ""
    finally:
        stop.set()
        thread.join()
    assert refused == []
    assert len(served) > 20
    assert machine.shell("echo on") == "on\n"


def test_peer_goes_away_during_the_update(vm):
    """The chardev finds out afterwards, and listens again."""
    machine = vm("-serial", "unix:s.sock,server=on,wait=off", serial=False)
    path = str(machine.folder / "s.sock")
    for _ in range(4):
        fd = connected(path)
        os.write(fd, b"echo lost")
        machine.hmp_send("update")
        os.close(fd)
        assert machine.hmp_reply() == ""
        assert machine.status == "running"
    fd = connected(path)
    stream = Stream(fd, fd)
    stream.send("\x15echo again\n")
    stream.expect("again\r\nagain")
    os.close(fd)


def test_output_that_nobody_reads(vm):
    # The guest waits for the reader; nothing is lost over updates meanwhile.
    machine = vm("-serial", "unix:s.sock,server=on,wait=on", append="ticker period=1", serial=False)
    fd = connected(str(machine.folder / "s.sock"))
    for _ in range(5):
        assert update(machine) == ""
    stream = Stream(fd, fd)
    for number in range(1, 200):
        stream.expect(rf"^(program.*\r\n)?tick {number}\r\n")
    os.close(fd)


def test_file_and_ring_buffer(vm):
    machine = vm(
        *("-serial", "file:serial.log", "-chardev", "ringbuf,id=ring,size=4K"),
        append="ticker period=5",
        serial=False,
    )
    path = machine.folder / "serial.log"
    for number in range(12):
        if number % 4 == 3:
            assert BACK in update(machine, replaced(machine, *FAULT))
        else:
            assert update(machine) == ""
    length = path.stat().st_size
    wait_until(lambda: path.stat().st_size > length + 50, "more of the guest's output")
    machine.hmp("stop")
    shown = [int(number) for number in re.findall(rb"(?m)^tick (\d+)\r$", path.read_bytes())]
    assert shown == list(range(1, len(shown) + 1))
    path.unlink()
    machine.hmp("cont")
    assert update(machine) == ""
    assert machine.status == "running"


def test_serial_flood_over_many_updates(vm):
    """Output without a pause while updates follow each other: contiguous to the byte."""
    machine = vm(append="ticker period=1", smp=2)
    machine.expect(r"tick 2\r\n")
    for number in range(50):
        if number % 10 == 9:
            assert BACK in update(machine, replaced(machine, *FAULT))
        else:
            assert update(machine) == ""
    machine.seen = len(machine.serial)
    machine.expect(r"tick \d+\r\n")
    start = machine.serial.index(b"tick 1\r\n")
    lines = machine.serial[start:].split(b"\r\n")[:-1]
    assert lines == [b"tick %d" % number for number in range(1, len(lines) + 1)]
    check_alive(machine)


def test_monitor_that_is_never_read(vm):
    """A client that asks and asks and reads nothing hinders neither the guest nor an update."""
    machine = vm("-qmp", "unix:q.sock,server=on,wait=off", append="ticker period=20")
    machine.expect(r"tick 2\r\n")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(machine.folder / "q.sock"))
        sock.setblocking(False)
        try:
            sock.send(b'{"execute": "qmp_capabilities"}\n')
            while True:
                sock.send(b'{"execute": "query-commands"}\n' * 100)
        except BlockingIOError:
            pass
        check_alive(machine)
        check_alive(machine)


def test_many_clients(vm):
    machine = vm(append="ticker period=20")
    machine.expect(r"tick 2\r\n")
    clients = [own_qmp(machine) for _ in range(20)]
    for index, client in enumerate(clients):
        client.send_raw('{"execute": ' if index % 2 else "")
    check_alive(machine)
    for index, client in enumerate(clients):
        client.send_raw('"query-name"}\n' if index % 2 else '{"execute": "query-name"}\n')
        assert "return" in client.reply()
        client.close()
