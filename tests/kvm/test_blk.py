"""Disks as a guest sees them, through a driver of its own on the real /dev/kvm: nothing is lost,
repeated or corrupted, whatever guest and host live through."""

import os
import re
import struct
import subprocess

import pytest
from harness import DEADLINE_S, lives, needs, run_cli
from harness.loop import loop_device

SIZE = 1 << 20
HEADLESS = ("-serial", "null", "-monitor", "none")


def image(folder, name="disk.img", size=SIZE):
    path = folder / name
    path.write_bytes(bytes(size))
    return path


def drive(path, keys="", device=""):
    return [
        *("-drive", f"file={path},format=raw,if=none,id=disk{keys}"),
        *("-device", f"virtio-blk-device,drive=disk{device}"),
    ]


def pattern(word, number):
    """What the guest program writes as the 64-bit word of a disk in a pass."""
    value = (word + number * 0x9E3779B97F4A7C15) * 0xFF51AFD7ED558CCD & (1 << 64) - 1
    return value ^ value >> 32


def check_goes_on(machine):
    """The guest has done each pass until now once, and does two more."""
    machine.seen = len(machine.serial)
    for _ in range(2):
        machine.expect(r"blk pass \d+ ok")
    done = [int(number) for number in re.findall(rb"blk pass (\d+) ok", bytes(machine.serial))]
    assert done == list(range(len(done)))


@pytest.mark.parametrize(
    ("keys", "device", "program"),
    [
        ("", "", "passes=2 zero"),
        (",discard=unmap", "", "passes=2 zero"),
        (",cache=none", "", "passes=2 depth=32"),
        (",cache=none,discard=unmap", ",queue-size=8", "passes=2 depth=2 zero"),
        (",cache=writethrough", "", "passes=1 mb=1 depth=16 kb=64"),
        ("", ",logical_block_size=4096,queue-size=1024", "passes=2 depth=64 kb=4"),
    ],
)
@pytest.mark.parametrize("smp", [1, 2])
def test_what_a_guest_writes_it_reads(vm, tmp_path, smp, keys, device, program):
    path = image(tmp_path)
    machine = vm(
        *drive(path, keys, f"{device},serial=abc"), append=f"virtio-blk {program}", smp=smp
    )
    machine.expect(f"disk 'abc' {SIZE // 512} sectors,")
    machine.expect("virtio-blk PASS")
    assert machine.wait_exit() == 0
    assert machine.stderr() == ""
    passes = int(re.search(r"passes=(\d+)", program)[1])
    words = struct.unpack(f"<{SIZE // 8}Q", path.read_bytes())
    size = int((re.search(r"kb=(\d+)", program) or [0, "4"])[1]) << 10
    for at, word in enumerate(words):
        zeroed = "zero" in program and at * 8 // size % 8 == passes % 8
        assert word == (0 if zeroed else pattern(at, passes)), f"word {at}"


@pytest.mark.parametrize(
    ("keys", "smp"),
    [("", 1), ("", 2), (",cache=none,discard=unmap", 2), (",cache=writethrough", 1)],
)
@lives.STANDS_STILL
def test_the_guest_goes_on_writing_and_checking(any_vm, tmp_path, keys, smp):
    program = f"virtio-blk depth=32 zero mb={1 if 'through' in keys else 2}"
    path = image(tmp_path, size=4 * SIZE)
    machine = any_vm(*drive(path, keys, ",serial=abc"), append=program, smp=smp)
    machine.expect("pass 0 ok")
    for _ in range(3):
        machine.live()
    check_goes_on(machine)
    assert machine.stderr() == ""


def test_image_on_tmpfs(vm, tmp_path):
    path = f"/dev/shm/pyvmm-test-{os.getpid()}.img"
    try:
        with open(path, "wb") as file:
            file.truncate(SIZE)
        machine = vm(*drive(path, ",discard=unmap"), append="virtio-blk passes=3 zero depth=32")
        machine.expect("virtio-blk PASS")
        assert machine.wait_exit() == 0
    finally:
        os.unlink(path)


def test_read_only_disk_keeps_what_is_on_it(vm, any_vm, tmp_path):
    path = image(tmp_path)
    assert vm(*drive(path), append="virtio-blk passes=1").wait_exit() == 0
    before = path.read_bytes()
    readonly = drive(path, ",readonly=on")
    assert vm(*readonly, append="virtio-blk keep=1 passes=1").wait_exit() == 0
    machine = any_vm(*readonly, append="virtio-blk keep=1")
    machine.expect("sectors read-only")
    machine.expect("pass 1 ok")
    machine.live()
    machine.seen = len(machine.serial)
    machine.expect("pass 1 ok")
    machine.expect("pass 1 ok")
    assert b"FAIL" not in machine.serial
    assert machine.hmp_quit() == 0
    assert path.read_bytes() == before


def test_several_disks_in_the_order_of_the_options(vm, tmp_path):
    options = []
    for number in range(3):
        path = image(tmp_path, f"{number}.img", SIZE * (number + 1))
        options += ["-blockdev", f"driver=file,node-name=file{number},filename={path}"]
        options += ["-device", f"virtio-blk-device,drive=file{number},serial=disk{number}"]
    options += ["-drive", f"file={image(tmp_path, 'last.img', 4 * SIZE)},format=raw"]
    machine = vm(*options, append="virtio-blk disk=2 passes=1")
    machine.expect(f"disk 'disk2' {3 * SIZE // 512} sectors")
    assert machine.wait_exit() == 0
    machine = vm(*options, append="virtio-blk disk=3 passes=1")
    machine.expect(f"disk '' {4 * SIZE // 512} sectors")
    assert machine.wait_exit() == 0


@lives.BUSES
def test_a_reset_machine_finds_its_disk_again(any_vm, tmp_path, bus):
    machine = any_vm(*drive(image(tmp_path), ",cache=none"), append="virtio-blk depth=32")
    for number in range(5):
        machine.expect("pass 1 ok")
        if number % 2:
            machine.live()
        assert machine.hmp("system_reset") == ""
        machine.expect("program virtio-blk")
    machine.expect("pass 3 ok")


@lives.BUSES
def test_a_paused_guest_goes_on(any_vm, tmp_path, bus):
    machine = any_vm(*drive(image(tmp_path), ",cache=none"), append="virtio-blk depth=32")
    for number in range(5):
        machine.expect(f"pass {number} ok")
        machine.hmp("stop")
        if number % 4 == 0:
            machine.live()
        assert machine.status == "paused"
        machine.hmp("cont")
    check_goes_on(machine)


def test_monitors_show_the_disk(any_vm, tmp_path):
    path = image(tmp_path)
    machine = any_vm(*drive(path, ",cache=none"), append="virtio-blk")
    machine.expect("pass 0 ok")
    machine.live()
    shown = machine.hmp("info block")
    assert f"disk: {path} (raw)\n" in shown
    assert "Cache mode:       writeback, direct\n" in shown
    assert 'dev: virtio-blk-device, id ""\n' in machine.hmp("info qtree")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["-drive", "file=none.img,format=raw"], "-drive virtio0: 'none.img': No such file"),
        (["-drive", "file=disk.img,format=qcow2"], "-drive: format='qcow2': only raw images"),
        (["-device", "virtio-blk-device"], "-device virtio-blk-device: drive= is missing"),
        (["-device", "virtio-blk-device,drive=x"], "drive='x': there is no such drive"),
        (["-drive", "file=disk.img,if=none,id=d,discrad=on"], "did you mean discard?"),
        (
            [*("-drive", "file=disk.img,id=d"), *("-device", "virtio-blk-device,drive=d")],
            "drive='d': it has a device already",
        ),
        (["-drive", "file=disk.img"] * 2, "'disk.img': the image is in use by another process"),
    ],
)
def test_refused(tmp_path, options, problem):
    image(tmp_path)
    result = run_cli("run", *HEADLESS, *options, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("pyvmm: ")
    assert len(result.stderr.splitlines()) == 1
    assert problem in result.stderr


def test_an_image_has_one_writer(vm, tmp_path):
    path = image(tmp_path)
    machine = vm(*drive(path), append="virtio-blk")
    machine.expect("pass 0 ok")
    result = run_cli("run", *HEADLESS, *drive(path))
    assert "the image is in use by another process; end what writes it" in result.stderr
    machine.expect("pass 2 ok")
    machine.hmp_quit()
    vm(*drive(path), append="virtio-blk").expect("pass 0 ok")


@pytest.mark.parametrize("smp", [1, 2])
def test_evil_guest_harms_nothing_but_its_own_data(any_vm, tmp_path, smp):
    options = ["-device", "virtio-rng-device"]
    for name, keys in (("a", ""), ("b", ",cache=none,discard=unmap"), ("c", ",readonly=on")):
        path = image(tmp_path, name)
        path.write_bytes(os.urandom(SIZE))
        options += ["-drive", f"file={path},format=raw{keys}"]
    kept = (tmp_path / "c").read_bytes()
    machine = any_vm(*options, append=f"virtio-attack step=16 seed={2 + smp}", smp=smp)
    machine.expect(r"attack \d+ broken [1-9]\d*\r\n")
    machine.live()
    fds, before = machine.footprint()[0], machine.memory_kib("Anonymous")
    for number in range(6):
        machine.expect(r"attack \d+ broken \d+\r\n")
        if number % 3 == 1:
            machine.live()
        assert machine.status == "running"
    assert machine.footprint()[0] == fds
    assert machine.memory_kib("Anonymous") - before < 4096
    assert b"FAIL" not in machine.serial
    assert machine.stderr() == ""
    assert (tmp_path / "c").read_bytes() == kept
    assert all((tmp_path / name).stat().st_size == SIZE for name in "ab")


def test_block_device(any_vm, tmp_path):
    with loop_device(image(tmp_path, "loop.img")) as device:
        node = f"driver=host_device,node-name=disk,filename={device},cache.direct=on,discard=unmap"
        options = ["-blockdev", node, "-device", "virtio-blk-device,drive=disk"]
        machine = any_vm(*options, append="virtio-blk zero depth=16")
        machine.expect("pass 1 ok")
        machine.live()
        check_goes_on(machine)
        machine.hmp_quit()


def test_qemu_and_pyvmm_keep_each_other_from_an_image(vm, tmp_path):
    path = image(tmp_path)
    qemu = [needs.program("qemu-system-x86_64"), "-display", "none", "-nodefaults", "-S"]
    qemu += ["-machine", "microvm", "-global", "virtio-mmio.force-legacy=false", "-qmp", "stdio"]
    qemu += ["-drive", f"file={path},format=raw,if=none,id=d", "-device"]
    qemu += ["virtio-blk-device,drive=d"]
    machine = vm(*drive(path), append="virtio-blk")
    machine.expect("pass 0 ok")
    refused = subprocess.run(qemu, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert 'Failed to get "write" lock' in refused.stderr
    machine.hmp_quit()
    with subprocess.Popen(qemu, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert b"QMP" in other.stdout.readline()
        own = run_cli("run", *HEADLESS, *drive(path))
        other.kill()
    assert "the image is in use by another process" in own.stderr
