"""Hosts that are slow when an update comes: their disks are waited for while the guest runs."""

import mmap
import re
import threading
import time

import pytest
from faults.tools import QMP, Qmp, check_alive, faulty, update
from harness import DEADLINE_S, wait_until

COUNTER = 0x200000
FLUSH = "pyvmm.backends.block:BlockFile.flush"
#: A request that lasts as long as there is a file.
HANG = """
import os, time
if os.path.exists('hung'): open('entered', 'w')
while os.path.exists('hung'): time.sleep(0.01)
"""
#: The same without a guest's asking for it, as soon as its disks are to come to rest.
BEGIN = f"""
open('quiescing', 'w')
def hang(): exec({HANG!r})
for device in arguments[1].devices:
    if device.waits_for_host: device.device._workers.submit(hang)
"""
QUIESCE = "pyvmm.migration.quiesce:Quiesce.__init__"
SHORT = "import pyvmm.migration.quiesce as quiesce\nquiesce.DEADLINE_S = 1"
REFUSED = r"did not get done in . s: disk disk \('.*/disk\.img'\): unfinished requests: 1\. .*again"


class Watch:
    """Maps guest RAM and measures for how long the counter stood still at most."""

    def __init__(self, path):
        with open(path, "r+b") as file:
            self._ram = mmap.mmap(file.fileno(), 0)
        self.longest_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self):
        last, since = None, time.monotonic()
        while not self._stop.wait(0.001):
            value, now = self._ram[COUNTER : COUNTER + 8], time.monotonic()
            if value != last:
                last, since = value, now
            self.longest_s = max(self.longest_s, now - since)

    def close(self):
        self._stop.set()
        self._thread.join()
        self._ram.close()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def disk(vm, path):
    """A guest at work on a disk, whose other CPU counts."""

    def start(*faults):
        options = ["-drive", f"file={path},format=raw,if=none,id=disk,cache=none"]
        options += ["-device", "virtio-blk-device,drive=disk", *QMP]
        ram = path.with_name("ram")
        options += ["-object", f"memory-backend-file,id=ram0,size=64M,mem-path={ram},share=on"]
        machine = vm(
            *(*options, "-machine", "memory-backend=ram0"),
            append="virtio-blk depth=4 count",
            smp=2,
            program=faulty(FLUSH, HANG, QUIESCE, "open('quiescing', 'w')", *faults),
        )
        machine.expect("pass 1 ok")
        machine.ram = ram
        return machine

    return start


@pytest.fixture
def shell(vm, path):
    """A guest with a disk that begins to hang when an update comes."""

    def start(*options):
        machine = vm(
            *("-drive", f"file={path},format=raw,if=none,id=disk,cache=none"),
            *("-device", "virtio-blk-device,drive=disk", *QMP, *options),
            program=faulty(QUIESCE, BEGIN),
        )
        machine.expect("guest> ")
        hang(machine)
        return machine

    return start


def hang(machine):
    (machine.folder / "hung").touch()


def recover(machine):
    (machine.folder / "hung").unlink()


def wait_for(machine, name):
    wait_until((machine.folder / name).exists, name)


def begin(machine):
    """Ask for an update of a guest whose disk hangs; return when it waits for that."""
    machine.hmp_send("update")
    wait_for(machine, "quiescing")


def check_working(machine):
    """The guest's disk is as the guest left it, and goes on."""
    machine.seen = len(machine.serial)
    machine.expect(r"pass \d+ ok")
    machine.expect(r"pass \d+ ok")
    done = [int(number) for number in re.findall(rb"blk pass (\d+) ok", bytes(machine.serial))]
    assert done == list(range(len(done)))


def test_a_slow_flush_is_no_part_of_the_pause(disk):
    machine = disk()
    watch = Watch(machine.ram)
    hang(machine)
    wait_for(machine, "entered")
    slow_s, began = 3, time.monotonic()
    with Qmp(machine.folder / "qmp.sock") as qmp:
        machine.hmp_send("update")
        while time.monotonic() < began + slow_s:
            asked = time.monotonic()
            assert qmp.execute("query-status")["status"] == "running"
            assert qmp.execute("query-migrate")["status"] == "setup"
            assert time.monotonic() - asked < 1
        wait_for(machine, "quiescing")
        assert not machine.replied
        recover(machine)
        assert machine.hmp_reply() == ""
        info = qmp.execute("query-migrate")
    watch.close()
    assert watch.longest_s < slow_s / 4
    assert info["phases"]["quiesce"] > 500
    assert info["downtime"] < slow_s * 1000 / 4
    check_working(machine)


def test_a_disk_that_hangs_refuses_the_update_and_stops_no_guest(disk):
    machine = disk(":", SHORT)
    watch = Watch(machine.ram)
    hang(machine)
    wait_for(machine, "entered")
    with Qmp(machine.folder / "qmp.sock") as qmp:
        for _ in range(2):
            machine.hmp_send("update")
            while not machine.replied:
                assert qmp.execute("query-status")["status"] == "running"
            reply = machine.hmp_reply()
            assert re.search(REFUSED, reply), reply
            assert qmp.execute("query-migrate")["status"] == "failed"
        assert "STOP" not in qmp.events
    watch.close()
    assert watch.longest_s < 1
    recover(machine)
    check_working(machine)
    assert update(machine) == ""
    check_working(machine)


def test_cancel_while_the_disk_is_waited_for(disk):
    machine = disk()
    hang(machine)
    wait_for(machine, "entered")
    with Qmp(machine.folder / "qmp.sock") as qmp:
        begin(machine)
        assert qmp.execute("query-migrate")["status"] == "setup"
        qmp.execute("migrate_cancel")
        assert qmp.execute("query-migrate")["status"] == "cancelled"
        machine.hmp_reply()
        assert "STOP" not in qmp.events
    recover(machine)
    check_working(machine)
    assert update(machine) == ""
    check_working(machine)


def test_another_update_while_the_disk_is_waited_for(shell):
    machine = shell()
    begin(machine)
    with Qmp(machine.folder / "qmp.sock") as qmp:
        qmp.send({"execute": "update"})
        assert "There's a migration process in progress" in qmp.reply()["error"]["desc"]
    recover(machine)
    assert machine.hmp_reply() == ""
    assert "guest" in machine.shell("echo guest")


def test_the_operator_stops_the_guest_meanwhile(shell):
    """There is something under way: not before that has ended."""
    machine = shell()
    begin(machine)
    wait_for(machine, "entered")
    with Qmp(machine.folder / "qmp.sock") as qmp:
        asked = time.monotonic()
        qmp.send({"execute": "stop"})
        assert "unfinished requests: 1" in qmp.reply()["error"]["desc"]
        assert time.monotonic() - asked < 8
        assert qmp.execute("query-status")["status"] == "running"
        recover(machine)
        assert machine.hmp_reply() == ""
    assert "guest" in machine.shell("echo guest")
    assert machine.hmp("stop") == ""
    assert update(machine) == ""
    assert machine.status == "paused"


@pytest.mark.parametrize("how", ["guest", "operator"])
def test_a_reset_meanwhile(shell, how):
    """It waits for the disk, as ever, and the update for both."""
    machine = shell()
    begin(machine)
    wait_for(machine, "entered")
    with Qmp(machine.folder / "qmp.sock") as qmp:
        if how == "guest":
            machine.type("reset\n")
        else:
            qmp.execute("system_reset")
        wait_until(lambda: "reset: disk disk" in machine.stderr(), "a reset that waits")
        assert qmp.execute("query-migrate")["status"] == "setup"
        recover(machine)
    assert machine.hmp_reply() == ""
    machine.expect("pyvmm guest, .* cpus")
    machine.expect("guest> ")
    assert "completed" in machine.hmp("info migrate")
    assert "guest" in machine.shell("echo guest")


@pytest.mark.parametrize("how", ["poweroff", "quit"])
def test_the_end_meanwhile(shell, how):
    machine = shell()
    begin(machine)
    wait_for(machine, "entered")
    if how == "poweroff":
        machine.type("poweroff\n")
    else:
        with Qmp(machine.folder / "qmp.sock") as qmp:
            qmp.execute("quit")
    recover(machine)
    assert machine.wait_exit() == 0
    assert "Traceback" not in machine.stderr()


def test_a_panic_meanwhile(shell):
    machine = shell("-device", "pvpanic", "-action", "panic=pause")
    begin(machine)
    wait_for(machine, "entered")
    with Qmp(machine.folder / "qmp.sock") as qmp:
        machine.type("panic\n")
        end = time.monotonic() + DEADLINE_S
        while qmp.execute("query-status")["status"] != "guest-panicked":
            assert time.monotonic() < end
        recover(machine)
        assert machine.hmp_reply() == ""
        assert qmp.execute("query-status")["status"] == "guest-panicked"


def test_a_chardev_whose_file_hangs_holds_up_its_vcpu_and_no_more(vm):
    """It is in the middle of an access, and could not stop."""
    machine = vm(
        *QMP,
        *("-debugcon", "file:log"),
        append="ticker period=20 console=both",
        program=faulty("pyvmm.chardev.file:FileChardev._write_fd", HANG, ":", SHORT),
    )
    machine.expect("tick 2\r\n")
    hang(machine)
    wait_for(machine, "entered")
    with Qmp(machine.folder / "qmp.sock") as qmp:
        reply = update(machine)
        assert "vCPU 0 does not leave KVM_RUN. The guest was not stopped" in reply
        assert qmp.execute("query-status")["status"] == "running"
        assert "STOP" not in qmp.events
    recover(machine)
    check_alive(machine)


def test_a_disk_that_does_not_take_the_state_gives_the_guest_back(ticker):
    machine = ticker(program=faulty("pyvmm.migration.uri:_pwrite", HANG))
    machine.set_update()
    hang(machine)
    reply = machine.hmp("migrate file:vm.state")
    assert "Could not write 'vm.state': its disk did not take the state within 2 s" in reply
    assert machine.status == "running"
    recover(machine)
    check_alive(machine)
    assert not (machine.folder / "vm.state").exists()
