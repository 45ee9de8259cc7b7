"""A program with chardevs and no machine: it echoes, and a key makes it exec itself.

What comes from the terminal is sent back in angle brackets; E execs, F execs into an image
that fails before it has made its chardevs. The socket does the same.
"""

import os
import sys

from pyvmm.chardev.base import OPENED, Frontend, Outbox
from pyvmm.chardev.config import parse_chardev, parse_chardev_short
from pyvmm.chardev.factory import ChardevSet
from pyvmm.chardev.stdio import restore_terminal
from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.handover import Handover


class Echo(Frontend):
    """Answers key by key."""

    def __init__(self, machine, chardev):
        self.machine = machine
        self.chardev = chardev
        self.outbox = Outbox(chardev)
        chardev.attach(self)

    def can_receive(self):
        return 0 if self.machine.next_image else 1

    def receive(self, data):
        if data in b"EF":
            self.machine.next_image = data.decode()
            self.machine.loop.stop()
        else:
            self.outbox.send(b"<%b>" % data)

    def handle_event(self, event):
        if event == OPENED and not self.chardev.is_inherited:
            self.outbox.send(b"hello ")

    def handle_writable(self):
        self.outbox.flush()


class Machine:
    """Both chardevs, and the exec."""

    def __init__(self, inherited, states):
        self.next_image = ""
        self.loop = EventLoop()
        self.handover = Handover(inherited, states)
        self.chardevs = ChardevSet(self.loop, self.handover, self.loop.stop)
        terminal = self.chardevs.claim(parse_chardev_short("mon:stdio", "-serial", "serial0"))
        sock = self.chardevs.create(parse_chardev("socket,id=sock,path=s,server=on,wait=off"))
        self.chardevs.load_state()
        self.echoes = [Echo(self, terminal), Echo(self, sock)]

    def run(self):
        """Serve until Ctrl-a x, over any number of execs."""
        try:
            self.loop.run()
            if self.next_image:
                self.exec()
        finally:
            self.chardevs.close()

    def exec(self):
        """Become the next image, of which nothing comes back."""
        fds = {"/".join(map(str, key)): fd for key, fd in self.handover.kept().items()}
        states = {name: state.hex() for name, state in self.handover.states().items()}
        self.handover.set_inheritable(True)
        arguments = [sys.executable, __file__, self.next_image, repr(fds), repr(states)]
        os.execv(sys.executable, arguments)


def main():
    """Take over from the image before, if there was one."""
    how, fds, states = sys.argv[1:] if sys.argv[1:] else ("", "{}", "{}")
    states = {name: bytes.fromhex(state) for name, state in eval(states).items()}
    if how == "F":
        restore_terminal(states["chardev/serial0-base"])
        sys.exit(3)
    inherited = {}
    for key, fd in eval(fds).items():
        name, index = key.rsplit("/", 1)
        inherited[name, int(index)] = fd
    Machine(inherited, states).run()


if __name__ == "__main__":
    main()
