"""What the host's side keeps through an update from one version to another: connections, terminals,
what monitors were given, networks, and what a reset loads."""

import functools
import os
import re
import shlex
import socket
import subprocess

import pytest
from faults.tools import options
from harness import guests, needs, process, wait_until
from harness.connections import OPENERS, connected, opened, tcp_address
from harness.network import GUEST_IP, TAP, make_tap, namespace
from harness.qmp import Qmp
from harness.terminal import Terminal
from upgrade.machines import complaints, upgrade


@pytest.mark.parametrize("opener", OPENERS)
def test_half_a_line_on_every_connection(vm, tmp_path, order, opener):
    first, other = order
    with (
        # Not where standard output goes: a predecessor has something to say.
        open(tmp_path / "messages", "w") as stderr,
        opened(opener, functools.partial(vm, program=first.run, stderr=stderr)) as found,
    ):
        machine, stream = found
        for number, version in enumerate((other, first, other)):
            stream.send("ec")
            upgrade(machine, version)
            stream.send(f"ho {number}end\n")
            stream.expect(rf"echo {number}end\r?\n{number}end\r?\n")


def test_terminal_of_console_and_monitor(tmp_path, order):
    first, other = order
    words = ["-m", "64M", "-serial", "mon:stdio"]
    screen = Terminal(tmp_path, *words, columns=1000, program=first.run)
    try:
        screen.expect("guest> ?\\Z")
        modes = screen.modes
        for number, version in enumerate((other, first)):
            screen.child.send("echo be")
            screen.expect("guest> echo be\\Z")
            screen.child.send("\x01c")
            screen.expect(r"\(pyvmm\)\Z")
            screen.child.send(f"update {shlex.join([*version.run, *words])}\r")
            screen.wait(lambda v=version: v.pyvmm in process.cmdline(screen.pid), "the update")
            screen.child.send(f"\x01chind{number}\r")
            screen.expect(f"^behind{number}\nguest> ?\\Z")
        screen.child.send("\x01x")
        screen.wait(lambda: not screen.child.isalive(), "the end")
        assert screen.modes == modes
    finally:
        screen.close()


def test_half_commands_on_monitors(vm, order):
    first, other = order
    unix = ("-qmp", "unix:q.sock,server=on,wait=off")
    tcp = ("-qmp", "tcp:127.0.0.1:0,server=on,wait=off")
    machine = vm(*unix, *tcp, program=first.run)
    machine.hmp("info status")
    client = socket.socket(fileno=connected(tcp_address(machine), socket.AF_INET))
    with Qmp(machine.folder / "q.sock") as qmp, client, client.makefile("rb") as answers:

        def ask(command):
            client.sendall(b'{"execute": "%s"}\n' % command.encode())
            while b'"event"' in (line := answers.readline()):
                pass
            return line

        assert b"QMP" in answers.readline()
        assert b"return" in ask("qmp_capabilities")
        for version in (other, first, other):
            machine._send("monitor", b"info st")
            command = [*version.run, *options(machine)]
            qmp.execute("update", command=command)
            qmp.send(b'{"execute": "query-')
            wait_until(lambda v=version: v.pyvmm in machine.cmdline, "the update")
            machine._send("monitor", b"atus\n")
            assert machine.hmp_reply() == "VM status: running\n"
            qmp.send(b'status", "id": 7}')
            assert qmp.reply()["id"] == 7
            assert b"running" in ask("query-status")


def test_what_clients_added_is_there(vm, tmp_path, order):
    first, other = order
    machine = vm("-qmp", "unix:q.sock,server=on,wait=off", program=first.run)
    machine.expect("guest> ")
    read_fd, write_fd = os.pipe()
    unix = {"type": "unix", "data": {"path": str(tmp_path / "added")}}
    backends = {
        "s": {"type": "socket", "data": {"addr": unix}},
        "f": {"type": "file", "data": {"out": str(tmp_path / "out")}},
    }
    with Qmp(machine.folder / "q.sock") as qmp:
        for id, backend in backends.items():
            qmp.execute("chardev-add", id=id, backend=backend)
        number = qmp.execute("add-fd", [write_fd], opaque="pipe")["fd"]
        qmp.execute("getfd", [write_fd], fdname="mine")
        os.close(write_fd)
        before = qmp.execute("query-chardev")
        for version in (other, first, other):
            upgrade(machine, version)
            assert qmp.execute("query-chardev") == before
            entry = {"fd": number, "opaque": "pipe"}
            assert qmp.execute("query-fdsets") == [{"fdset-id": 0, "fds": [entry]}]
        qmp.execute("remove-fd", fdset_id=0)
        qmp.execute("closefd", fdname="mine")
        assert os.read(read_fd, 1) == b""
        os.close(read_fd)
        for id in backends:
            qmp.execute("chardev-remove", id=id)


def test_paused_guest_stays_so(vm, order):
    machine = vm(append="counter", program=order[0].run)
    machine.expect("counter ready")
    machine.hmp("stop")
    count = machine.hmp("xp /gx 0x200000")
    for version in (*order[::-1], order[1]):
        upgrade(machine, version)
        assert machine.status == "paused"
        assert machine.hmp("xp /gx 0x200000") == count
    machine.hmp("cont")
    wait_until(lambda: machine.hmp("xp /gx 0x200000") > count, "a higher count")


@pytest.mark.parametrize("kernel", ["built-in", "file"])
def test_reset_boots_again(vm, tmp_path, order, kernel):
    """A predecessor reads the kernel's file again; later versions hand on what they have read."""
    words = []
    if kernel == "file":
        path = tmp_path / "kernel"
        path.write_bytes(guests.image("guest.elf").read_bytes())
        words = ["-kernel", path]
    machine = vm(*words, smp=2, program=order[0].run)
    for version in (*order[::-1], order[1]):
        machine.expect("guest> ")
        upgrade(machine, version)
        machine.hmp("system_reset")
        machine.expect("type help")
    machine.expect("guest> ")
    assert machine.shell("cpus").startswith("cpus 2\n")
    assert complaints(machine) == []


def test_tap(vm, order):
    with namespace():
        make_tap()
        machine = vm(*TAP, append="virtio-net offload", program=order[0].run)
        machine.expect("ready")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(20)
            sock.connect((GUEST_IP, 7))
            for number, version in enumerate((*order[::-1], order[1])):
                machine.hmp("stop")
                sock.send(b"meanwhile %d" % number)
                upgrade(machine, version)
                machine.hmp("cont")
                assert sock.recv(2000) == b"meanwhile %d" % number
        assert complaints(machine) == []


def test_passt(vm, order):
    """It is a process of the first version's, and lives as long as the machine."""
    needs.program("passt")
    with namespace():
        make_tap("up0")
        for command in (f"route add default via {GUEST_IP} dev up0", "link set lo up"):
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        network = f"passt,id=n0,address={GUEST_IP},udp-ports=7007:7,ipv6=off"
        device = ("-netdev", network, "-device", "virtio-net-device,netdev=n0")
        machine = vm(*device, append="virtio-net", program=order[0].run)
        machine.expect("ready")
        for version in (*order[::-1], order[1]):
            upgrade(machine, version)
            assert re.search(r"state=connected", machine.hmp("info network"))
        assert complaints(machine) == []
