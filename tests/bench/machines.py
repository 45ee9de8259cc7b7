"""Starts virtual machine monitors for the benchmarks and speaks to their human monitor."""

import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import termios
import time
from pathlib import Path

from pyvmm.boot import builtin

TIMEOUT_S = 30.0
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")
PROMPT = r"\((?:pyvmm|qemu)\)"  # behind it a space, or a terminal's cursor movement

WINDOW = struct.pack("4H", 24, 1000, 0, 0)  # so wide that no command is wrapped

MIB = 1 << 20
COUNTER = 0x200000  # where the built-in guest's counter program counts


class BenchError(Exception):
    """Something could not be measured; the text says why."""


class Closed(BenchError):
    """The other side closed the connection."""


class Stream:
    """Text on a descriptor, read as a person would: in order, with a deadline.

    :param echoes: whether what is sent comes back, as from a terminal
    """

    def __init__(self, fd, echoes=False):
        self.fd = fd
        self._echoes = echoes
        self._seen = b""

    def send(self, line):
        """Write a line, ended as the Enter key of a terminal does it."""
        os.write(self.fd, line.encode() + b"\r")

    def expect(self, pattern, timeout=TIMEOUT_S):
        """The match of ``pattern`` in what was not matched yet.

        :raises Closed: the other side closed
        :raises BenchError: the deadline passed
        """
        deadline = time.monotonic() + timeout
        while True:
            text = ESCAPES.sub(b"", self._seen).decode("utf-8", "replace")
            match = re.search(pattern, text)
            if match:
                self._seen = text[match.end() :].encode()
                return match
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                raise BenchError(f"no {pattern!r} within {timeout:.0f} s, only {text[-200:]!r}")
            try:
                data = os.read(self.fd, 65536)
            except OSError as error:
                raise Closed(f"closed after {text[-200:]!r}") from error
            if not data:
                raise Closed(f"closed after {text[-200:]!r}")
            self._seen += data

    def command(self, line):
        """What a monitor answers to ``line``.

        :raises BenchError: an error, or nothing
        """
        self.send(line)
        if self._echoes:
            self.expect(re.escape(line) + r"\s*\n")
        answer = self.expect(f"(?s)(.*?){PROMPT}")[1]
        if "Error: " in answer:
            raise BenchError(f"{line}: {answer.strip()}")
        return answer

    def close(self):
        """Close the descriptor."""
        os.close(self.fd)


class Update:
    """One live update: when it was asked for and seen to be over (CLOCK_MONOTONIC, ns)."""

    def __init__(self, start, end):
        self.start = start
        self.end = end


class Vmm:
    """A pyvmm process. Use as a context manager.

    :param options: behind ``pyvmm run``, without the monitor
    :param size: guest RAM in bytes
    :param qmp: whether :meth:`query` is to work
    :param monitor: ``none``, ``unix`` (a socket) or ``terminal`` (a pty, with a person's needs)
    """

    program = "pyvmm"

    def __init__(self, options, size=256 * MIB, monitor="unix", qmp=False):
        self.folder = Path(tempfile.mkdtemp(prefix="pyvmm-bench-"))
        self.size = size
        self._socket = self.folder / "monitor"
        self._monitor = monitor
        target = {
            "none": "none",
            "unix": f"unix:{self._socket},server=on,wait=off",
            "terminal": "stdio",
        }[monitor]
        self.command = [*self.base(), *options, "-monitor", target]
        self.qmp_path = self.folder / "qmp"
        if qmp:
            self.command += ["-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        self.process = self.hmp = self.console = None

    def base(self):
        """The first words of the command."""
        return [self.program, "run", "-m", f"{self.size // MIB}M"]

    def __enter__(self):
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment["TERM"] = "xterm"
        if self._monitor == "terminal":
            host, stdout = pty.openpty()
            stdin = stdout
            fcntl.ioctl(host, termios.TIOCSWINSZ, WINDOW)
            self.hmp = Stream(host, echoes=True)
        else:
            host, stdout = os.pipe()
            stdin = subprocess.DEVNULL
            self.console = Stream(host)
        # A session of its own: the pty becomes its terminal, and Ctrl-C reaches the bench only.
        self.process = subprocess.Popen(
            self.command, stdin=stdin, stdout=stdout, env=environment, start_new_session=True
        )
        os.close(stdout)
        try:
            if self._monitor == "unix":
                self.hmp = self._open_monitor()
            if self.hmp:
                self.hmp.expect(PROMPT)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.hmp, self.console):
            if stream:
                stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def pid(self):
        """Process id; it stays over updates."""
        return self.process.pid

    def memfd(self):
        """Path under /proc of the memfd that guest RAM is in."""
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                is_memfd = os.readlink(entry).startswith("/memfd:")
                if is_memfd and entry.stat().st_size == self.size:
                    return str(entry)
            except FileNotFoundError:
                continue
        raise BenchError(f"{self.program} has no memfd of {self.size} bytes")

    def update(self):
        """Replace the VMM by the same one; an :class:`Update`."""
        state = f"file:{self.folder / 'state'}"
        command = shlex.join([*self.command, "-incoming", state])
        self.hmp.command("migrate_set_parameter mode cpr-exec")
        self.hmp.command(f"migrate_set_parameter cpr-exec-command {command}")
        start = time.monotonic_ns()
        self._migrate(state)
        return Update(start, time.monotonic_ns())

    def query(self, command):
        """What QMP returns to ``command``; the VMM was made with ``qmp``."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT_S)
            client.connect(str(self.qmp_path))
            stream = client.makefile("rwb")
            stream.readline()  # the greeting
            for name in ("qmp_capabilities", command):
                stream.write(json.dumps({"execute": name}).encode() + b"\n")
                stream.flush()
                reply = {}
                while not reply.keys() & {"return", "error"}:  # else it is an event
                    line = stream.readline()
                    if not line:
                        raise Closed("QMP: closed")
                    reply = json.loads(line)
            if "error" in reply:
                raise BenchError(f"QMP: {command}: {reply['error']['desc']}")
            return reply["return"]

    def _migrate(self, state):
        # The new image, which has the connection of the old, shows the prompt when it is done.
        self.hmp.command(f"migrate {state}")
        shown = self.hmp.command("info migrate")
        if not re.search(r"Status:\s+completed", shown):
            raise BenchError(f"update failed: {shown.strip()}")

    def connect(self, path):
        """A connection to a Unix socket that the VMM listens on, or soon will."""
        deadline = time.monotonic() + TIMEOUT_S
        client = socket.socket(socket.AF_UNIX)
        while True:
            try:
                client.connect(str(path))
                return client
            except (FileNotFoundError, ConnectionRefusedError):
                if self.process.poll() is not None:
                    raise BenchError(f"{self.program} ended with {self.process.poll()}") from None
                if time.monotonic() > deadline:
                    raise BenchError(f"{self.program} does not listen on {path}") from None
                time.sleep(0.001)

    def _open_monitor(self):
        return Stream(self.connect(self._socket).detach())


class Qemu(Vmm):
    """The same with QEMU's microvm machine. It drops connections in an update."""

    program = "qemu-system-x86_64"

    def base(self):
        """QEMU has to be told what pyvmm does by itself."""
        size = f"{self.size // MIB}M"
        return [
            *[self.program, "-nodefaults", "-no-user-config", "-display", "none"],
            *["-machine", "microvm,accel=kvm,acpi=off,aux-ram-share=on,memory-backend=ram0"],
            *["-object", f"memory-backend-memfd,id=ram0,size={size},share=on", "-m", size],
            *["-kernel", builtin.path(builtin.GUEST)],
        ]

    def _migrate(self, state):
        try:
            self.hmp.send(f"migrate -d {state}")
            failure = self.hmp.expect(r"Error: [^\r\n]*")[0]
            raise BenchError(f"update failed: {failure}")
        except Closed:
            self.hmp.close()
        while True:
            # The listener of the image before may take one more connection.
            self.hmp = self._open_monitor()
            try:
                self.hmp.expect(PROMPT)
                self.hmp.send("info status")
                self.hmp.expect(f"VM status: running(?s:.*?){PROMPT}")
                return
            except (Closed, BrokenPipeError):
                self.hmp.close()
