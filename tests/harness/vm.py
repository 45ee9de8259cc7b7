"""One virtual machine: its process, its console and its monitor."""

import contextlib
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

from harness import process
from harness.process import DEADLINE_S, Deadline
from pyvmm import rundir

#: A descriptor that a new image has until the guest's memory is as fast as before.
STATS = "anon_inode:kvm-vm-stats"


class VmExitedError(AssertionError):
    """The VMM ended, or closed a connection, while the test waited for something else."""


class UpdateError(AssertionError):
    """An update that was to succeed did not."""


class Vm:
    """A ``pyvmm run`` with its serial port and a human monitor on Unix sockets.

    The sockets are listened on here and pyvmm connects to them, so not a byte from the guest's
    first on is missed. Everything arrives in this one thread, whenever a method waits.

    :param folder: working directory of the process; socket, state and log files go there
    :param options: further options of ``pyvmm run``
    :param append: kernel command line: the program of the built-in guest
    :param serial: put the first serial port on a socket
    :param monitor: put a human monitor on a socket
    :param life: the :class:`harness.lives.Life` that :meth:`live` stands for
    :param program: what to start instead of ``pyvmm run``
    :param stdout: descriptor of standard output; default: the file that :meth:`stderr` reads
    :param stderr: descriptor of standard error, likewise
    """

    prompt = b"(pyvmm) "
    #: Whether the image that an update brings makes its connections anew.
    reconnects = False
    #: Whether virtio devices are on PCI in place of virtio-mmio (see the fixture ``bus``).
    on_pci = False

    def __init__(
        self,
        folder,
        *options,
        append=None,
        memory="64M",
        smp=1,
        serial=True,
        monitor=True,
        life=None,
        program=None,
        stdin=subprocess.DEVNULL,
        stdout=None,
        stderr=None,
        **environment,
    ):
        self.folder = Path(folder)
        self.argv = [*(program or (process.pyvmm(), "run"))]
        if memory is not None:
            self.argv += ["-m", memory]
        if smp != 1:
            self.argv += ["-smp", str(smp)]
        self._life = life
        if life:
            self.argv += life.options(memory)
        self._listeners = {}
        if serial:
            self._listen("serial")
            self.argv += [*_connected("serial"), "-serial", "chardev:serial"]
        if monitor:
            self._listen("monitor")
            self.argv += [*_connected("monitor"), "-mon", "monitor"]
        else:
            self.argv += ["-monitor", "none"]
        if append is not None:
            self.argv += ["-append", append]
        self.argv += [str(option) for option in options]
        if self.on_pci:
            self.argv = [re.sub("^(virtio-[a-z]+)-device", r"\1-pci", word) for word in self.argv]
        #: Everything that the guest printed, and where :meth:`expect` looks on.
        self.serial = bytearray()
        self.seen = 0
        #: Both directions of the monitor's connection.
        self.transcript = bytearray()
        self._replies = bytearray()
        self._greeted = False
        self._streams = {}
        self._updates = 0
        self.exit_code = None
        self._stdio = (stdin, stdout, stderr)
        self._environment = environment

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        return f"Vm({shlex.join(self.argv)})"

    def start(self, *options):
        """Start the process, with ``options`` beside its own, and wait for its connections."""
        self._stderr = open(self.folder / "stderr", "ab+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*self.argv, *options],
            cwd=self.folder,
            stdin=self._stdio[0],
            stdout=self._stderr if self._stdio[1] is None else self._stdio[1],
            stderr=self._stderr if self._stdio[2] is None else self._stdio[2],
            env=process.environment(**self._environment),
        )
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        given = dict(zip(self.argv, self.argv[1:], strict=False)).get("-name")
        #: What the run directory calls it.
        self.name = given or f"vm-{self.pid}"
        self._accept()
        return self

    def restart(self, *options):
        """End the process and start another one, whose console and monitor are connected anew."""
        self.close()
        self._streams.clear()
        self._replies.clear()
        self._greeted = False
        for name in self._listeners:
            self._listen(name)
        return self.start(*options)

    def close(self):
        """End the process, whatever state it is in. Does nothing the second time."""
        if not hasattr(self, "_process"):
            return
        for carrier in process.carriers(self.folder):
            process.kill(carrier)  # it would bring the guest back
        if not self.has_ended:
            self._process.kill()
        self._process.wait()
        self.exit_code = self._process.returncode
        os.close(self._pidfd)
        for sock in [*self._listeners.values(), *self._streams.values()]:
            sock.close()
        self._stderr.close()
        self.__dict__.pop("_process")

    # ---- console ---------------------------------------------------------------------------

    def expect(self, pattern, timeout=DEADLINE_S):
        """Wait until the guest prints what matches; the match. What it spans is used up.

        Text between two matches is passed over; :attr:`serial` keeps it all.
        """
        wanted = re.compile(pattern.encode() if isinstance(pattern, str) else pattern)
        deadline = Deadline(timeout)
        while not (match := wanted.search(self.serial, self.seen)):
            self._pump(deadline, f"{pattern!r} on the serial port")
        self.seen = match.end()
        return match

    def type(self, text):
        """Type on the serial port."""
        self._send("serial", text.encode() if isinstance(text, str) else text)

    def shell(self, command, timeout=DEADLINE_S):
        """Run a command of the guest's shell that comes back; its output, without the echo."""
        self.type(command + "\n")
        self.expect(re.escape(command) + r"\r?\n", timeout)
        start = self.seen
        end = self.expect("guest> ", timeout).start()
        return self.serial[start:end].decode().replace("\r", "")

    # ---- monitor ---------------------------------------------------------------------------

    def hmp(self, command, timeout=DEADLINE_S):
        """Run a command of the human monitor; what it prints, with plain newlines."""
        self.hmp_send(command)
        return self._read_reply(Deadline(timeout), command)

    def hmp_send(self, command):
        """Send a command without waiting for what comes back."""
        if not self._greeted:
            self._greeted = True
            self._read_reply(Deadline())
        line = (command.encode() if isinstance(command, str) else command) + b"\n"
        self.transcript += line
        self._send("monitor", line)

    def hmp_reply(self, timeout=DEADLINE_S):
        """What the oldest command printed whose reply was not read yet."""
        return self._read_reply(Deadline(timeout))

    @property
    def replied(self):
        """Whether a reply (or the rest of one) is there to be read; takes what has arrived."""
        self._receive(self._streams.values())
        return self.prompt in self._replies

    @property
    def status(self):
        """The run state, in the words of ``info status``."""
        return self.hmp("info status").removeprefix("VM status: ").strip()

    def wait_status(self, status, timeout=DEADLINE_S):
        """Wait for a run state that comes by itself."""
        process.wait_until(lambda: self.status == status, f"status {status}", timeout)

    def hmp_quit(self):
        """``quit``, which has no reply; the exit code."""
        self.hmp_send("quit")
        return self.wait_exit()

    # ---- live update -----------------------------------------------------------------------

    def set_update(self, command=None, *, uri="file:vm.state"):
        """Set the parameters of an update.

        :param command: list of words; default: this machine's own with ``-incoming``
        """
        words = [*self.argv, "-incoming", uri] if command is None else command
        replies = self.hmp("migrate_set_parameter mode cpr-exec")
        replies += self.hmp(f"migrate_set_parameter cpr-exec-command {shlex.join(words)}")
        if replies:
            raise UpdateError(replies)

    def update(self, timeout=DEADLINE_S):
        """Replace the running pyvmm by a new one, which answers.

        :return: when that was asked for and seen to be over (CLOCK_MONOTONIC, ns)
        :raises UpdateError: if it fails
        :raises VmExitedError: if the guest ends meanwhile
        """
        # Another name each time: the command line of the process then tells the image.
        uri = f"file:vm.state.{self._updates % 2}"
        self.set_update(uri=uri)
        start = time.monotonic_ns()
        reply = self.hmp(f"migrate {uri}", timeout)
        end = time.monotonic_ns()
        info = self.hmp("info migrate")
        if reply or "completed" not in info or self.cmdline[-1] != uri:
            raise UpdateError(f"migrate: {reply!r}, info migrate: {info!r}, {self.cmdline}")
        self._updates += 1
        return start, end

    def plain(self):
        """Have the guest stand through the next update; self."""
        reply = self.hmp("migrate_set_parameter cpr-exec-running off")
        if reply:
            raise UpdateError(reply)
        return self

    def follow(self, timeout=DEADLINE_S):
        """The process ended in an update: go on with the one that the guest is back in. The
        connections are those that there were.

        :return: the exit code of the process that ended
        :raises VmExitedError: there is none
        """
        ended = self._process.wait(timeout)
        runtime = (os.environ | self._environment)["XDG_RUNTIME_DIR"]
        entry = f"{runtime}/pyvmm/{rundir.encode_name(self.name)}"

        def back():
            pid = rundir.read_info(entry).get("pid")
            if pid != self.pid and rundir.is_alive(pid):
                return pid
            if not list(process.others_at_work(self.folder)):
                raise VmExitedError(f"pyvmm ended, {ended}, and nobody goes on: {self.stderr()}")
            return 0

        self.pid = process.wait_until(back, "another process with the guest", timeout)
        self._process = process.Adopted(self.pid)
        os.close(self._pidfd)
        self._pidfd = os.pidfd_open(self.pid)
        return ended

    def live(self):
        """Live through what this machine is to live through: nothing, unless the test is one of
        any life (``any_vm``). Afterwards the guest and the monitor are as they were."""
        if self._life:
            self._life.live(self)

    # ---- the process -----------------------------------------------------------------------

    @property
    def cmdline(self):
        """See :func:`harness.process.cmdline`."""
        return process.cmdline(self.pid)

    def kill(self, number=signal.SIGTERM):
        """Send a signal."""
        signal.pidfd_send_signal(self._pidfd, number)

    @property
    def has_ended(self):
        """Whether the process has."""
        return self._process.poll() is not None

    def wait_exit(self, timeout=DEADLINE_S):
        """Wait for the end of the process; its exit code, negative for a signal.

        What it printed until then is in :attr:`serial`.
        """
        deadline = Deadline(timeout)
        while not self.has_ended:
            self._pump(deadline, "the end of pyvmm", until_exit=True)
        while self._streams and self._receive(self._streams.values()):
            pass
        self.exit_code = self._process.returncode
        return self.exit_code

    def stderr(self):
        """What pyvmm printed itself."""
        return (self.folder / "stderr").read_text(errors="replace")

    def fds(self):
        """See :func:`harness.process.fds`."""
        return process.fds(self.pid)

    def threads(self):
        """See :func:`harness.process.threads`."""
        return process.threads(self.pid)

    def children(self):
        """See :func:`harness.process.children`."""
        return process.children(self.pid)

    def probes(self):
        """See :func:`harness.process.probes`."""
        return process.probes(self.pid)

    def memory_kib(self, kind="Pss", ram_names=("/memfd:",)):
        """See :func:`harness.process.memory_kib`."""
        return process.memory_kib(self.pid, kind, ram_names)

    def footprint(self):
        """What an update must leave as it was: descriptors and threads, once the helper that
        keeps the old memory has gone."""
        # The guest runs before the monitors are imported and the VM is published. The main loop,
        # which answers, comes behind that.
        if "monitor" in self._streams:
            self.hmp("info status")
        process.wait_until(lambda: not self.children(), "the end of pyvmm's child processes")
        # For a moment it counts the pages that the guest has mapped again.
        process.wait_until(lambda: STATS not in self.fds(), "the end of the count")
        # Once in a while it looks at the guest's memory, and may do so again at any moment.
        process.wait_until(lambda: "upkeep" not in self.threads(), "the end of the upkeep")
        return self.fds(), [name for name in self.threads() if name != "upkeep"]

    def sections(self):
        """Title and text of everything that helps to understand a failure."""
        return [
            ("pyvmm command", shlex.join(self.argv)),
            ("pyvmm serial", _shown(self.serial)),
            ("pyvmm monitor", _shown(self.transcript)),
            ("pyvmm stderr", self.stderr() + f"(exit code {self.exit_code})"),
        ]

    def report(self):
        """The same as one text."""
        return "\n".join(f"--- {title}\n{text}" for title, text in self.sections())

    # ---- plumbing --------------------------------------------------------------------------

    def _accept(self):
        """Wait for the process's connections."""
        deadline = Deadline()
        for name, listener in self._listeners.items():
            if not self._readable([listener], deadline.left):
                raise VmExitedError(f"pyvmm does not connect its {name}: {self.stderr()}")
            self._streams[name], _ = listener.accept()
            if name == "serial" and not self.reconnects:
                listener.close()

    def _listen(self, name):
        path = self.folder / f"{name}.sock"
        path.unlink(missing_ok=True)
        self._listeners[name] = listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)

    def _readable(self, sources, timeout):
        ready = select.select([*sources, self._pidfd], [], [], timeout)[0]
        return [source for source in ready if source is not self._pidfd]

    def _receive(self, sources):
        """Take what has arrived; whether it was anything."""
        got = False
        for sock in sources and select.select(list(sources), [], [], 0)[0]:
            name = next(name for name, stream in self._streams.items() if stream is sock)
            try:
                data = sock.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                self._streams.pop(name).close()
            elif name == "serial":
                self.serial += data
            else:
                self._replies += data
                self.transcript += data
            got = got or bool(data)
        return got

    def _pump(self, deadline, what, until_exit=False):
        """Wait for something to arrive and take it."""
        if deadline.over:
            raise AssertionError(f"not within the deadline: {what}")
        self._readable(self._streams.values(), deadline.left)
        # In this order: what it printed last has arrived once it has ended.
        ended = self.has_ended
        streams = len(self._streams)
        if self._receive(self._streams.values()) or until_exit:
            return
        if ended or len(self._streams) < streams:
            self._raise_exited(what)

    def _raise_exited(self, what):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.exit_code = self._process.wait(1)
        raise VmExitedError(f"pyvmm ended before {what}: {self.exit_code=} {self.stderr()}")

    def _send(self, name, data):
        try:
            self._streams[name].sendall(data)
        except (KeyError, OSError):
            self._raise_exited(f"it took {data!r} on its {name}")

    def _read_reply(self, deadline, command="the prompt"):
        while self.prompt not in self._replies:
            self._pump(deadline, f"the reply to {command!r}")
        text, _, rest = bytes(self._replies).partition(self.prompt)
        self._replies[:] = rest
        return text.decode("utf-8", "surrogateescape").replace("\r\n", "\n")


def _connected(name):
    return ["-chardev", f"socket,id={name},path={name}.sock"]


def _shown(data):
    return data.decode(errors="replace").replace("\r", "")
