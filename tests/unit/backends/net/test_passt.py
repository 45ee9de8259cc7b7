"""The real passt, in a network namespace that the test makes."""

import os
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
from harness import needs

from pyvmm.backends.net.base import HEADER
from pyvmm.backends.net.passt import PasstBackend
from pyvmm.errors import ConfigError

GUEST, GATEWAY = bytes([10, 9, 0, 2]), bytes([10, 9, 0, 1])
MAC = bytes.fromhex("525400123456")
ARP = bytes.fromhex("0806 0001 0800 06 04")
WHO_HAS = b"\xff" * 6 + MAC + ARP + b"\0\1" + MAC + GUEST + bytes(6) + GATEWAY
DEADLINE_S = 20


@pytest.fixture
def routed(namespace):
    """A namespace with an address and a default route, which passt takes its own from."""
    needs.program("passt")
    for command in (
        "tuntap add d0 mode tap",
        "addr add 10.9.0.2/24 dev d0",
        "link set d0 up",
        "link set lo up",
        "route add default via 10.9.0.1 dev d0",
    ):
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def ask(image, front):
    """passt answers ARP requests for its gateway's address."""
    count = len(front.frames)
    assert front.backend.send([memoryview(bytes(HEADER) + WHO_HAS)])
    image.until(lambda: len(front.frames) > count)
    assert front.frames[count][12:22] == ARP + b"\0\2"
    assert front.frames[count][28:32] == GATEWAY


def find(marker):
    """The process that has this word in its command line."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:  # it ended in the meantime
            pass
    return None


def test_lives_through_an_exec_and_ends_with_the_vm(images, recorder, routed):
    marker = f"--search=test-{os.getpid()}.invalid"
    old = images()
    front = recorder(old.make(PasstBackend, arguments=[marker]))
    front.start()
    ask(old, front)
    pid = find(marker.encode())
    new = images(old.exec())
    front = recorder(new.make(PasstBackend, arguments=[marker]))
    front.start()
    ask(new, front)
    assert find(marker.encode()) == pid
    new.handover.settle()  # the guest runs
    watch = os.pidfd_open(pid)
    try:
        front.backend.close()
        assert select.select([watch], [], [], DEADLINE_S)[0], "passt did not end"
    finally:
        os.close(watch)


def test_its_end_takes_the_link_down_until_the_next_update(images, recorder, routed):
    marker = f"--search=end-{os.getpid()}.invalid"
    old = images()
    front = recorder(old.make(PasstBackend, arguments=[marker]))
    front.start()
    assert front.backend.info == {"state": "connected"}
    os.kill(find(marker.encode()), 9)
    old.until(lambda: front.links == [False])
    assert front.backend.info == {"state": "ended"}
    new = images(old.exec())
    again = f"--search=again-{os.getpid()}.invalid"
    front = recorder(new.make(PasstBackend, arguments=[again]))
    # Nothing is begun that a way back to the old image would have to undo.
    assert find(again.encode()) is None
    assert not front.backend.link_up
    front.start()
    assert front.links == [True]
    ask(new, front)


def test_end_that_nobody_noticed_is_made_good_by_the_next_update(images, recorder, routed):
    """The guest has no driver, and nobody reads what comes."""
    marker = f"--search=test-{os.getpid()}.invalid"
    old = images()
    old.make(PasstBackend, arguments=[marker]).start()
    pid = find(marker.encode())
    watch = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    assert select.select([watch], [], [], DEADLINE_S)[0]
    os.close(watch)
    old.settle()
    new = images(old.exec())
    backend = new.make(PasstBackend, arguments=[marker])
    assert not backend.link_up
    front = recorder(backend)
    front.start()
    ask(new, front)


def test_its_complaint_is_passed_on(image, routed):
    with pytest.raises(ConfigError, match=r"-netdev passt: passt does not start: .*nonsense"):
        image.make(PasstBackend, arguments=["--interface=nonsense"])


def test_missing_program(image):
    with pytest.raises(ConfigError, match="cannot start /nowhere/passt: No such file"):
        image.make(PasstBackend, program="/nowhere/passt")


def test_program_that_fails(image, tmp_path):
    script = tmp_path / "passt"
    script.write_text("#!/bin/sh\necho 'first line' >&2\necho \"no: $3\" >&2\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(ConfigError, match="does not start: no: --fd"):
        image.make(PasstBackend, program=str(script), arguments=["--x"])


def test_program_that_hangs(image, tmp_path, monkeypatch):
    monkeypatch.setattr("pyvmm.backends.net.passt.DEADLINE_S", 0.2)
    script = tmp_path / "passt"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    script.chmod(0o755)
    start = time.monotonic()
    with pytest.raises(ConfigError, match="does not start: exit status -9"):
        image.make(PasstBackend, program=str(script))
    assert time.monotonic() - start < DEADLINE_S


def test_failure_does_not_keep_an_update_from_happening(images, capfd):
    new = images({})
    backend = new.make(PasstBackend, program="/nowhere/passt")
    backend.start()
    assert not backend.link_up
    assert "cannot start /nowhere/passt" in capfd.readouterr().err
    assert backend.send([memoryview(bytes(HEADER) + WHO_HAS)])
