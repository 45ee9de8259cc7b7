"""Guest RAM that the host cannot back: the guest is paused, and goes on as if nothing was."""

import os
import re
from pathlib import Path

import pytest
from faults.tools import QMP, Qmp, update
from harness import VmExitedError, guests, needs, run_cli
from harness.tmpfs import memory

LACK = r"memory ram0 \('.*ram'\)(, guest address 0x[0-9a-f]+)?: the host cannot back it: "
FULL = LACK + "no space left in its file system; free space there, then cont"
STOPPED = "paused (io-error)"
EXIT = ("-device", "isa-debug-exit,iobase=0xf4,iosize=1")


def start(vm, room, append="", leave=0, **options):
    """A machine that is about to run, with room for ``leave`` pages more than it has."""
    more = options.pop("options", ())
    keys = options.pop("keys", {})
    machine = vm("-S", *memory(room.path / "ram", **keys), *more, append=append, **options)
    assert machine.status == "paused (prelaunch)"
    room.fill(leave)
    return machine


def warnings(machine):
    return len(re.findall(FULL, machine.stderr()))


def drip(machine, room, pages, until=None):
    """Let the guest run, with a few pages more each time that it lacks some, until it prints what
    matches, or ends; how often that was."""
    for times in range(2000):
        try:
            machine.hmp("cont")
            while (status := machine.status) != STOPPED:
                assert status == "running"
                if until is not None and re.search(until, machine.serial):
                    return times
        except VmExitedError:
            return times
        room.free(pages)
    raise AssertionError("there is never enough memory")


# ---- the guest's own accesses ------------------------------------------------------------------


@pytest.mark.parametrize("smp", [1, 2])
def test_processors_wait_for_room(vm, tmpfs, smp):
    room = tmpfs("100M")
    machine = start(vm, room, "memhash passes=2", 2000, smp=smp, options=QMP)
    with Qmp(machine.folder / "qmp.sock") as qmp:
        qmp.execute("cont")
        qmp.wait_event("STOP")
        assert qmp.execute("query-status") == {"status": "io-error", "running": False}
        seen = warnings(machine)
        assert seen
        # Still no room: paused again, and said again.
        qmp.execute("cont")
        qmp.wait_event("STOP")
        assert warnings(machine) > seen
        room.free(3000)
        qmp.execute("cont")
        qmp.wait_event("STOP")
    room.free()
    machine.hmp("cont")
    machine.expect("memhash PASS")
    assert "pass 2 ok" in machine.serial.decode()


# Stores to the beginning of each page from 0x20000 to 0x90000, and over its end; then the same
# reads: exits with 0x10 if all is there. In ring 0, which may be KVM's emulator.
STORES = (
    b"\xb8\x00\x20"  # mov $0x2000, %ax
    b"\x8e\xd8\xa3\x00\x00"  # 1: mov %ax, %ds; mov %ax, 0
    b"\x66\xa3\xfe\x0f\x05\x00\x01"  # mov %eax, 0xffe; add $0x100, %ax
    b"\x3d\x00\x90\x72\xef"  # cmp $0x9000, %ax; jb 1b
    b"\xb8\x00\x20"  # mov $0x2000, %ax
    b"\x8e\xd8\x3b\x06\x00\x00\x75\x12"  # 2: mov %ax, %ds; cmp 0, %ax; jne 3f
    b"\x3b\x06\xfe\x0f\x75\x0c"  # cmp 0xffe, %ax; jne 3f
    b"\x05\x00\x01\x3d\x00\x90\x72\xea"  # add $0x100, %ax; cmp $0x9000, %ax; jb 2b
    b"\xb0\x10\xe6\xf4\xb0\x20\xe6\xf4" + guests.SPIN  # mov $0x10, %al; out %al, $0xf4; 3: ...
)
DONE, PAGES = 0x21, 0x70  # (0x10 << 1) | 1


@pytest.mark.parametrize("pages", [1, 5])
def test_stores_of_ring_0(vm, tmpfs, tmp_path, pages):
    room = tmpfs("70M")
    image = guests.flat(tmp_path, STORES)
    machine = start(vm, room, options=("-kernel", image, *EXIT), append=None)
    assert drip(machine, room, pages) >= PAGES // pages
    assert machine.wait_exit() == DONE


def unfinished(vm, room, tmp_path):
    """A machine in the middle of a store."""
    image = guests.flat(tmp_path, STORES)
    machine = start(vm, room, options=("-kernel", image, *EXIT), append=None)
    machine.hmp("cont")
    machine.wait_status(STOPPED)
    return machine


def test_no_update_in_the_middle_of_a_store(vm, tmpfs, tmp_path):
    room = tmpfs("70M")
    machine = unfinished(vm, room, tmp_path)
    refused = "vCPU 0 is in the middle of an access to memory that the host cannot back; mend that"
    assert refused in update(machine)
    assert refused in machine.hmp("info migrate")
    assert machine.status == STOPPED
    room.free(1)
    machine.hmp("cont")
    machine.wait_status(STOPPED)
    assert refused in update(machine)
    room.free()
    machine.hmp("cont")
    assert machine.wait_exit() == DONE


def test_a_reset_forgets_the_store(vm, tmpfs, tmp_path):
    room = tmpfs("70M")
    machine = unfinished(vm, room, tmp_path)
    assert machine.hmp("system_reset") == ""
    room.free()
    assert update(machine) == ""
    machine.hmp("cont")
    assert machine.wait_exit() == DONE


def test_the_end_does_not_wait_for_room(vm, tmpfs, tmp_path):
    machine = unfinished(vm, tmpfs("70M"), tmp_path)
    assert machine.hmp_quit() == 0


def test_code_that_is_not_there(vm, tmpfs, tmp_path):
    code = (
        b"\xb8\x00\x31\x8e\xd8\x31\xdb\x31\xf6"  # mov $0x3100, %ax; %ds; %bx and %si 0
        b"\xc7\x06\x00\x00\xb0\x10"  # movw $0x10b0, 0: mov $0x10, %al
        b"\xc7\x06\x02\x00\xe6\xf4"  # movw $0xf4e6, 2: out %al, $0xf4
        b"\xbb\x00\x08\xb8\x00\x00"  # mov $0x800, %bx; mov $0, %ax
        b"\xea\x00\x00\x00\x30"  # ljmp $0x3000, $0: a page of add %al, (%bx,%si)
    )
    room = tmpfs("70M")
    image = guests.flat(tmp_path, code)
    machine = start(vm, room, options=("-kernel", image, *EXIT), append=None)
    machine.hmp("cont")
    machine.wait_status(STOPPED)
    room.free(1)
    machine.hmp("cont")
    machine.wait_status(STOPPED)
    # Nothing is half done: the next image tries the same instruction.
    for _ in range(2):
        assert update(machine) == ""
        assert machine.status == STOPPED
        machine.hmp("cont")
        machine.wait_status(STOPPED)
    assert machine.stderr().count("guest address 0x30000:") == 3
    room.free(1)
    machine.hmp("cont")
    assert machine.wait_exit() == DONE


def test_a_file_that_was_cut(vm, tmpfs):
    room = tmpfs("100M")
    machine = start(vm, room, "memhash passes=3", 20000)
    os.truncate(room.path / "ram", 32 << 20)
    machine.hmp("cont")
    machine.wait_status(STOPPED)
    assert re.search(
        LACK + r"its file has been cut to 32M; give it 64M again \(truncate -s\), then cont",
        machine.stderr(),
    )
    os.truncate(room.path / "ram", 64 << 20)
    machine.hmp("cont")
    machine.expect("memhash PASS")


# ---- the VMM's accesses ------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"prealloc": "on"}, {"share": "off"}], ids=str)
def test_start_without_room(tmpfs, keys):
    room = tmpfs("8M")
    room.fill()
    options = memory(room.path / "ram", **keys)
    if "share" in keys:
        options = [options[0], options[1].replace(",share=on", "")]
    done = run_cli("run", "-nodefaults", "-m", "64M", *options)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert "ram0" in line
    assert "free space there" in line


def test_kernel_without_room(tmpfs, tmp_path):
    room = tmpfs("8M")
    room.fill(leave=100)
    image = tmp_path / "initrd"
    image.write_bytes(bytes(range(256)) * 4096)
    done = run_cli(
        *("run", "-nodefaults", "-m", "64M", *memory(room.path / "ram"), "-initrd", image),
        *("-kernel", guests.image("guest.elf")),
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search(LACK + "no space left in its file system; free space there$", line)


@pytest.mark.parametrize(
    ("devices", "append", "until"),
    [
        (["-device", "virtio-rng-device"], "virtio-rng", r"rng \d+"),
        (
            ["-drive", "file=disk,format=raw,if=none,id=d", "-device", "virtio-blk-device,drive=d"],
            "virtio-blk depth=4",
            "pass 2 ok",
        ),
    ],
    ids=["rng", "blk"],
)
def test_devices_wait_for_room(vm, tmpfs, tmp_path, devices, append, until):
    """Whoever it is that touches a page first, the guest or a device, there is one more for it."""
    room = tmpfs("70M")
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    devices = [each.replace("file=disk", f"file={disk}") for each in devices]
    machine = start(vm, room, append, options=devices)
    assert drip(machine, room, 1, until.encode()) > 3
    assert b"FAIL" not in machine.serial


def huge_pages():
    return Path("/proc/sys/vm/nr_hugepages")


def test_without_huge_pages(vm):
    before = huge_pages().read_text()
    try:
        huge_pages().write_text("8")
    except OSError:
        needs.missing("huge pages cannot be reserved")
    try:
        if int(huge_pages().read_text()) != 8:
            needs.another_host("there are no 8 huge pages")
        machine = vm(
            "-object", "memory-backend-memfd,id=ram0,size=64M,hugetlb=on,share=off",
            append="memhash passes=2",
        )  # fmt: skip
        machine.wait_status(STOPPED)
        assert "memory ram0" in machine.stderr()
        assert "no huge page is left; reserve more in /proc/sys/vm/nr_hugepages" in machine.stderr()
        huge_pages().write_text("40")
        if int(huge_pages().read_text()) != 40:
            needs.another_host("there are no 40 huge pages")
        machine.hmp("cont")
        machine.expect("memhash PASS")
        machine.close()
    finally:
        huge_pages().write_text(before)


def test_monitor_tells_of_it(vm, tmpfs):
    room = tmpfs("70M")
    machine = start(vm, room, "halt")
    reply = machine.hmp("xp /4xb 0x2000000")
    assert re.search(r"guest address 0x2000000: the host cannot back it: no space left", reply)
    room.free()
    assert machine.hmp("xp /4xb 0x2000000") == "02000000: 0x00 0x00 0x00 0x00\n"
