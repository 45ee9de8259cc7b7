"""Disks of hosts that do not answer, or answer with errors."""

import re
import time

import pytest
from faults.tools import BACK, QMP, Qmp, faulty, replaced, update
from harness import wait_until

HANG = "import os, time\nwhile os.path.exists('hung'): time.sleep(0.01)"
SHORT = "import pyvmm.devices.virtio.blk as blk\nblk.DRAIN_TIMEOUT_S = 0.3"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def start(vm, path, *faults, append="virtio-blk depth=4"):
    drive = ["-drive", f"file={path},format=raw,if=none,id=disk,cache=none"]
    program = faulty(":", SHORT, *faults)
    machine = vm(*drive, "-device", "virtio-blk-device,drive=disk", append=append, program=program)
    machine.expect("pass 1 ok")
    return machine


def passes(machine):
    return [int(number) for number in re.findall(rb"blk pass (\d+) ok", bytes(machine.serial))]


def test_a_disk_that_hangs_holds_up_nothing_but_its_own_requests(vm, path):
    machine = start(vm, path, "pyvmm.backends.block:BlockFile.flush", HANG)
    hung = machine.folder / "hung"
    hung.touch()
    # Two passes later the guest waits for a flush, whatever it did just now.
    while not re.search(
        "disk disk .'.*disk.img'.: unfinished requests", reply := machine.hmp("stop")
    ):
        assert reply == ""
        machine.hmp("cont")
    assert machine.status == "running"
    assert "unfinished requests" in machine.hmp("update")
    assert machine.status == "running"
    hung.unlink()
    machine.seen = len(machine.serial)
    machine.expect(r"pass \d+ ok")
    assert machine.hmp("update") == ""
    machine.expect(r"pass \d+ ok")
    done = passes(machine)
    assert done == list(range(len(done)))


def test_a_reset_waits_for_a_disk_that_hangs_and_the_monitor_does_not(vm, path):
    hang = f"import os\nif os.path.exists('hung'): open('waits', 'w')\n{HANG}"
    drive = ["-drive", f"file={path},format=raw,if=none,id=disk,cache=none"]
    drive += ["-device", "virtio-blk-device,drive=disk", *QMP]
    program = faulty("pyvmm.backends.block:BlockFile.flush", hang)
    machine = vm(*drive, append="virtio-blk depth=4", program=program)
    machine.expect("pass 1 ok")
    hung = machine.folder / "hung"
    hung.touch()
    wait_until((machine.folder / "waits").exists, "a flush that hangs")
    began = time.monotonic()
    with Qmp(machine.folder / "qmp.sock") as qmp:
        assert machine.hmp("system_reset") == ""
        assert "it waits for them" in machine.stderr()
        assert qmp.execute("query-status")["status"] == "running"
        assert "RESET" not in qmp.events
        assert time.monotonic() - began < 5  # what a stop waits for the host is longer
        hung.unlink()
        qmp.wait_event("RESET")
    machine.expect("pass 0 ok")
    assert update(machine) == ""
    machine.expect("pass . ok")


def test_the_end_does_not_wait_for_a_disk_that_hangs(vm, path):
    machine = start(vm, path, "pyvmm.backends.block:BlockFile.flush", HANG)
    (machine.folder / "hung").touch()
    while "unfinished" not in machine.hmp("stop"):
        machine.hmp("cont")
    assert machine.hmp_quit() == 0
    assert "unfinished requests" in machine.stderr()
    assert "Traceback" not in machine.stderr()


def test_an_update_that_fails_in_the_new_image_goes_back_to_the_disk(vm, path):
    machine = start(vm, path)
    for _ in range(3):
        command = replaced(machine, "pyvmm.devices.virtio.blk:VirtioBlk.load", "1 / 0")
        assert f"division by zero {BACK}" in update(machine, command)
        machine.seen = len(machine.serial)
        machine.expect(r"pass \d+ ok")
    done = passes(machine)
    assert done == list(range(len(done)))


FULL = "import os\nif os.path.exists('full'): raise OSError(28, 'No space left on device')"


def test_a_full_host_is_told_of(vm, path):
    drive = ["-drive", f"file={path},format=raw,if=none,id=disk,cache=none,werror=report"]
    drive += ["-device", "virtio-blk-device,drive=disk", *QMP]
    program = faulty("pyvmm.backends.block:BlockFile.write", FULL)
    machine = vm(*drive, append="virtio-blk depth=4", program=program)
    machine.expect("pass 1 ok")
    with Qmp(machine.folder / "qmp.sock") as qmp:
        (disk,) = qmp.execute("query-block")
        (machine.folder / "full").touch()
        machine.expect("FAIL pass .* write of block .*: status 1")
        while (message := qmp.next()).get("event") != "BLOCK_IO_ERROR":
            pass
    assert message["data"] == {
        "qom-path": disk["qdev"],
        "device": "disk",
        "operation": "write",
        "action": "report",
        "nospace": True,
        "reason": "No space left on device",
    }


def test_a_full_host_pauses_the_guest_until_there_is_space(vm, path):
    """Also over an update: the requests that wait are part of the state."""
    drive = ["-drive", f"file={path},format=raw,if=none,id=disk,cache=none"]
    drive += ["-device", "virtio-blk-device,drive=disk,id=vda", *QMP]
    program = faulty("pyvmm.backends.block:BlockFile.write", FULL)
    machine = vm(*drive, append="virtio-blk depth=4", program=program)
    machine.expect("pass 1 ok")
    with Qmp(machine.folder / "qmp.sock") as qmp:
        (machine.folder / "full").touch()
        while (message := qmp.next()).get("event") != "BLOCK_IO_ERROR":
            pass
        assert (message["data"]["action"], message["data"]["nospace"]) == ("stop", True)
        qmp.wait_event("STOP")
        assert qmp.execute("query-status")["status"] == "io-error"
        assert "Attached to:      vda\n    I/O status:       nospace" in machine.hmp("info block")
        qmp.execute("cont")
        qmp.events.clear()
        machine.wait_status("paused (io-error)")
        assert update(machine) == ""
        assert qmp.execute("query-status")["status"] == "io-error"
        (machine.folder / "full").unlink()
        qmp.execute("cont")
        for _ in range(2):
            machine.expect(r"pass \d+ ok")
        assert update(machine) == ""
        machine.expect(r"pass \d+ ok")
    assert b"FAIL" not in machine.serial
    done = passes(machine)
    assert done == list(range(len(done)))
    assert "I/O status" not in machine.hmp("info block")
