"""The nested machine's own parts: what it boots, and the port that takes commands."""

import base64
import lzma
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import zstandard
from nested import image, packages, port


class Machine:
    """The machine's end of the port, answering from a thread."""

    def __init__(self, answer):
        self.sock, self._peer = socket.socketpair()
        self.scripts = []
        self._thread = threading.Thread(target=self._serve, args=[answer])
        self._thread.start()

    def _serve(self, answer):
        with self._peer, self._peer.makefile("rb") as lines:
            for line in lines:
                mark, _, packed = line.split()
                self.scripts.append(base64.b64decode(packed).decode())
                for piece in answer(mark):
                    self._peer.sendall(piece)

    def join(self):
        self.sock.close()
        self._thread.join()


@pytest.fixture
def run(monkeypatch):
    """Runs a command on a machine that answers with these pieces; status and output."""
    monkeypatch.setattr(port, "GRACE_S", 0.0)
    pidfd = os.pidfd_open(os.getpid())
    machines = []

    def run(answer, timeout=30):
        machine = Machine(answer)
        machines.append(machine)
        output = []
        commands = port.CommandPort(machine.sock, pidfd)
        return commands.run("true", timeout, output.append), b"".join(output)

    yield run
    for machine in machines:
        machine.join()
    os.close(pidfd)


def test_output_and_status(run):
    assert run(lambda mark: [b"one\ntwo", b"\n%s 7\n" % mark]) == (7, b"one\ntwo")


def test_no_output(run):
    assert run(lambda mark: [b"\n%s 0\n" % mark]) == (0, b"")


def test_answer_in_single_bytes(run):
    def answer(mark):
        return [bytes([byte]) for byte in b"\n\n0123\n%s \n%s 12\n" % (mark, mark)]

    status, output = run(answer)
    assert status == 12
    assert output.startswith(b"\n\n0123\n")
    assert output.endswith(b" ")


def test_other_marks_are_output(run):
    other = b"\n0123456789abcdef 0\n"
    assert run(lambda mark: [other, b"\n%s 1\n" % mark]) == (1, other)


def test_output_comes_before_the_end(run):
    """All but what may be the beginning of the end is handed on at once."""
    seen = threading.Event()
    ours, theirs = socket.socketpair()
    pidfd = os.pidfd_open(os.getpid())

    def serve():
        mark = theirs.recv(4096).split()[0]
        theirs.sendall(b"x" * 100)
        assert seen.wait(30)
        theirs.sendall(b"\n%s 0\n" % mark)

    thread = threading.Thread(target=serve)
    thread.start()
    assert port.CommandPort(ours, pidfd).run("true", 30, lambda data: seen.set()) == 0
    thread.join()
    os.close(pidfd)
    ours.close()
    theirs.close()


def test_no_answer_is_an_error(run):
    with pytest.raises(port.NestedError, match="does not answer"):
        run(lambda mark: [b"partial"], timeout=0.01)


def test_end_of_the_machine_is_an_error():
    ours, theirs = socket.socketpair()
    child = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(child.pid)
    child.wait()
    try:
        with pytest.raises(port.NestedError, match="ended"):
            port.CommandPort(ours, pidfd).run("true", 30, print)
    finally:
        os.close(pidfd)
        ours.close()
        theirs.close()


def read_cpio(data):
    """Mode and content by path, as cpio(5) has it."""
    found, at = {}, 0
    while True:
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        assert data[at : at + 6] == b"070701"
        mode, size, name_size = fields[1], fields[6], fields[11]
        start = at + 110
        name = data[start : start + name_size - 1].decode()
        start += name_size + -(start + name_size) % 4
        if name == "TRAILER!!!":
            return found
        found[name] = mode, data[start : start + size]
        at = start + size + -(start + size) % 4


def test_cpio():
    files = {"init": b"#!/bin/sh\n", "a/b/c": b"12345", "dev": None}
    assert read_cpio(image.cpio(files)) == {
        "a": (0o40755, b""),
        "a/b": (0o40755, b""),
        "init": (0o100755, b"#!/bin/sh\n"),
        "a/b/c": (0o100755, b"12345"),
        "dev": (0o40755, b""),
        "dev/console": (0o20600, b""),
    }


def test_modules_come_behind_what_they_need(tmp_path):
    for name, depends in {"c-d": "", "b": "c_d", "a": "b,c-d", "unused": ""}.items():
        (tmp_path / f"{name}.ko").write_bytes(b"x\0license=GPL\0depends=%s\0y" % depends.encode())
    assert list(image.modules(tmp_path, ["a"])) == ["c_d", "b", "a"]
    with pytest.raises(KeyError):
        image.modules(tmp_path, ["missing"])
    (tmp_path / "modules.builtin").write_text("kernel/drivers/mis-sing.ko\nkernel/fs/d.ko\n")
    assert list(image.modules(tmp_path, ["mis_sing", "b"])) == ["c_d", "b"]


def test_packed_modules_are_unpacked(tmp_path):
    data = b"x\0depends=\0y"
    (tmp_path / "a-b.ko.xz").write_bytes(lzma.compress(data))
    (tmp_path / "modules.dep").touch()
    assert image.modules(tmp_path, ["a_b"]) == {"a_b": data}


@pytest.mark.parametrize("compress", [lzma.compress, zstandard.compress])
def test_vmlinux_is_unpacked(compress):
    payload = compress(b"\x7fELF and the rest")
    header = bytearray(3 * 512)
    header[0x1F1] = 2
    struct.pack_into("<II", header, 0x248, 64, len(payload) + 4)
    bzimage = bytes(header) + bytes(64) + payload + struct.pack("<I", 17)
    assert image.vmlinux(bzimage) == b"\x7fELF and the rest"


def test_machine_ends_with_its_parent():
    """Also if the parent was killed and could do nothing about it."""
    program = (
        "import subprocess, sys\n"
        "from nested.machine import _die_with_parent\n"
        "child = subprocess.Popen(['sleep', '600'], preexec_fn=_die_with_parent())\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(port.__file__).parents[1])},
    )
    with parent:
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        try:
            assert select.select([pidfd], [], [], 30)[0]
        finally:
            os.close(pidfd)


APT = """#!/bin/sh
case "$1" in
indextargets) echo http://mirror.test/debian bookworm ;;
update) cat "$(echo "$@" | sed 's/.*SourceList=\\([^ ]*\\).*/\\1/')" >>SOURCES ;;
download) touch one.deb; echo "$@" >>DOWNLOADS ;;
esac
"""
APT_CACHE = "#!/bin/sh\necho '  Depends: linux-image-6.12.1-amd64'\n"
DPKG_DEB = '#!/bin/sh\nmkdir -p "$3/boot"\necho kernel >"$3/boot/vmlinuz-6.12.1"\n'


def test_package_of_another_release_comes_from_the_hosts_mirror(tmp_path, monkeypatch):
    sources, downloads = tmp_path / "sources", tmp_path / "downloads"
    apt = APT.replace("SOURCES", str(sources)).replace("DOWNLOADS", str(downloads))
    for name, text in {"apt-get": apt, "apt-cache": APT_CACHE, "dpkg-deb": DPKG_DEB}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernel = packages.kernel("linux-image-amd64/trixie")
    assert kernel.read_text() == "kernel\n"
    assert packages.kernel("linux-image-amd64/trixie") == kernel  # cached
    assert sources.read_text() == "deb http://mirror.test/debian trixie main\n"
    assert " linux-image-6.12.1-amd64 " in downloads.read_text()
