"""What the fault tests share: faulty commands, a guest that counts, and what must hold after."""

import json
import os
import re
import shlex
import socket
import sys
from pathlib import Path
from textwrap import indent

from harness import DEADLINE_S, VmExitedError

INJECT = Path(__file__).with_name("inject.py")
TICKER = "ticker period=20"
BACK = "(the guest is back in the image before)"


def faulty(*faults, probe=False):
    """The first words of a ``pyvmm run`` with faults: pairs MODULE:NAME, CODE."""
    words = [fault.replace("\n", "¶") for fault in faults]
    return [sys.executable, str(INJECT), *(["--probe"] if probe else []), *words, "run"]


def armed(*faults):
    """The same, but the faults are there only while a file ``armed`` is.

    For a faulty old image: what it is to be executed as after a rollback is the same command.
    """
    guarded = [
        f"import os\nif os.path.exists('armed'):\n{indent(fault, ' ')}" if index % 2 else fault
        for index, fault in enumerate(faults)
    ]
    return faulty(*guarded)


def once(fault):
    """A fault for :func:`armed` that disarms it."""
    return f"os.unlink('armed')\n{fault}"


def options(machine):
    """The machine's options, without the program."""
    return machine.argv[machine.argv.index("run") + 1 :]


def replaced(machine, *faults, probe=False):
    """The machine's own command with faults."""
    return [*faulty(*faults, probe=probe), *options(machine)]


def update(machine, command=None):
    """HMP ``update``; what it replied, which is nothing if all went well."""
    return machine.hmp(f"update {shlex.join(command)}" if command else "update")


def ticks(machine, word="tick"):
    """The numbers that the guest printed."""
    found = re.findall(rb"(?m)^%s (\d+)\r$" % word.encode(), machine.serial)
    return [int(number) for number in found]


def check_ticking(machine, word="tick", step=1):
    """The guest goes on and has missed nothing."""
    machine.seen = len(machine.serial)
    for _ in range(2):
        machine.expect(rf"{word} \d+\r\n")
    shown = ticks(machine, word)
    assert shown == list(range(step, (len(shown) + 1) * step, step))


def check_alive(machine, *line):
    """The guest goes on, has missed nothing, and can be updated.

    :param line: what it prints, as :func:`check_ticking` has it
    """
    assert machine.status == "running"
    check_ticking(machine, *line)
    check_updated(machine)
    check_ticking(machine, *line)
    assert machine.status == "running"


def check_updated(machine):
    """An update works."""
    assert update(machine) == ""
    info = machine.hmp("info migrate")
    assert "completed" in info, info


def check_refused(machine, command, text):
    """The update with ``command`` is refused, with ``text``, and the guest was never stopped."""
    with Qmp(machine.folder / "qmp.sock") as qmp:
        reply = update(machine, command)
        assert re.search(text, reply), reply
        assert qmp.execute("query-status")["status"] == "running"
        assert "STOP" not in qmp.events
    check_alive(machine)


def check_lost(machine, exit_code):
    """The VMM ends, with nothing of it left behind that lives."""
    children = machine.children()
    assert machine.wait_exit() == exit_code
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def strangers(machine):
    """Processes that work in the machine's folder and are not the machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.name != str(machine.pid) and os.readlink(entry / "cwd") == str(machine.folder):
                found.append((entry.name, (entry / "cmdline").read_bytes()))
        except OSError:
            pass
    return found


def send_update(machine, command=None):
    """HMP ``update`` that nobody waits for: the VMM may end."""
    machine.hmp_send(f"update {shlex.join(command)}" if command else "update")


QMP = ("-qmp", "unix:qmp.sock,server=on,wait=off")


class Qmp:
    """A QMP client that keeps the events' names."""

    def __init__(self, path):
        self.events = []
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(DEADLINE_S)
        self._file = self._sock.makefile("rw")
        try:
            self._sock.connect(str(path))
            assert "QMP" in self.next()
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def execute(self, command, **arguments):
        """What a command returns."""
        self.send({"execute": command, "arguments": arguments})
        return self.reply()["return"]

    def send(self, message):
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()

    def send_raw(self, text):
        self._sock.sendall(text.encode())

    def reply(self):
        """The next message that is no event."""
        while "event" in (message := self.next()):
            self.events.append(message["event"])
        return message

    def wait_event(self, name):
        """Wait for an event; those that come before it are kept, too."""
        while self.events[-1:] != [name]:
            message = self.next()
            assert "event" in message, message
            self.events.append(message["event"])

    def next(self):
        line = self._file.readline()
        if not line:
            raise VmExitedError("end of file on QMP")
        return json.loads(line)

    def close(self):
        self._file.close()
        self._sock.close()
