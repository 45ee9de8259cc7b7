"""Disks across live updates: nothing lost, repeated or corrupted, and the lock never gone."""

import fcntl
import re
import struct

import pytest
from faults.tools import replaced
from harness import lives

SIZE = 4 << 20


def drive(path, keys=""):
    return [
        *("-drive", f"file={path},format=raw,if=none,id=disk{keys}"),
        *("-device", "virtio-blk-device,drive=disk,serial=abc"),
    ]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def passes(machine):
    return [int(number) for number in re.findall(rb"blk pass (\d+) ok", bytes(machine.serial))]


@lives.BUSES
def test_a_failed_update_goes_on_writing(vm, path, bus):
    machine = vm(*drive(path, ",cache=none"), append="virtio-blk depth=32")
    machine.expect("pass 0 ok")
    for _ in range(3):
        # It gets as far as the stop of the guest, but not to an exec.
        machine.set_update(uri="file:/dev/full")
        assert "Error" in machine.hmp("migrate file:/dev/full")
    machine.seen = len(machine.serial)
    machine.expect(r"pass \d+ ok")
    machine.expect(r"pass \d+ ok")
    done = passes(machine)
    assert done == list(range(len(done)))


def is_locked(path):
    """Whether somebody keeps writers from an image."""
    with open(path, "r+b") as file:
        flock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 201, 1, 0)
        answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, flock)
    return struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK


def test_the_way_back_leaves_the_disk_as_it_was(vm, path):
    """The new image takes the disk over, cannot take its queue, and hands it back."""
    machine = vm(*drive(path, ",cache=none"), append="virtio-blk depth=32")
    machine.expect("pass 0 ok")
    fault = ("pyvmm.devices.virtio.mmio:VirtioMmio.load", "raise ValueError('injected')")
    words = replaced(machine, *fault)
    for _ in range(2):
        machine.set_update([*words, "-incoming", "file:vm.state"])
        machine.hmp_send("migrate file:vm.state")
        while not machine.replied:
            assert is_locked(path)
        machine.hmp_reply()
        assert "the guest is back in the image before" in machine.hmp("info migrate")
        machine.seen = len(machine.serial)
        machine.expect(r"pass \d+ ok")
        machine.expect(r"pass \d+ ok")
    assert is_locked(path)
    machine.set_update()
    machine.update()
    machine.seen = len(machine.serial)
    machine.expect(r"pass \d+ ok")
    done = passes(machine)
    assert done == list(range(len(done)))


def test_the_image_stays_locked_and_the_same_when_its_name_goes_to_another(vm, path):
    machine = vm(*drive(path), append="virtio-blk")
    machine.expect("pass 0 ok")
    moved = path.rename(path.with_name("moved.img"))
    path.write_bytes(bytes(SIZE))
    machine.set_update(uri="file:vm.state")
    machine.hmp_send("migrate file:vm.state")
    while not machine.replied:
        assert is_locked(moved)
    assert machine.hmp_reply() == ""
    machine.seen = len(machine.serial)
    machine.expect(r"pass \d+ ok")
    assert is_locked(moved)
    assert not is_locked(path)
    assert path.read_bytes() == bytes(SIZE)
    machine.hmp_quit()
    assert not is_locked(moved)


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("id=disk", "id=disk,readonly=on", r"-drive is disk=\S*disk.img,read-only, this machine"),
        ("disk.img", "other.img", r"-drive is disk=\S*other.img, this machine has disk="),
        ("-drive", "-frobnicate", "unknown option"),
    ],
)
def test_another_disk_is_refused(vm, path, before, after, problem):
    machine = vm(*drive(path), append="virtio-blk")
    machine.expect("pass 0 ok")
    path.with_name("other.img").write_bytes(bytes(SIZE))
    words = [word.replace(before, after) for word in machine.argv]
    machine.set_update([*words, "-incoming", "file:vm.state"])
    assert re.search(problem, machine.hmp("migrate file:vm.state"))
    machine.seen = len(machine.serial)
    machine.expect(r"pass \d+ ok")


def test_two_disks_that_change_places_are_refused(vm, path):
    other = path.with_name("other.img")
    other.write_bytes(bytes(SIZE))
    images = ["-drive", f"file={path},if=none,id=a", "-drive", f"file={other},if=none,id=b"]
    devices = [["-device", f"virtio-blk-device,drive={name}"] for name in "ab"]
    machine = vm(*images, *devices[0], *devices[1], append="virtio-blk")
    machine.expect("pass 0 ok")
    words = machine.argv[: -len(devices) * 2]
    machine.set_update([*words, *devices[1], *devices[0], "-incoming", "file:vm.state"])
    assert re.search(
        r"-device is virtio-blk-device \(b\),virtio-blk-device \(a\), this machine has",
        machine.hmp("migrate file:vm.state"),
    )
    machine.update()


def test_an_update_may_change_the_cache_mode(vm, path):
    machine = vm(*drive(path), append="virtio-blk depth=16")
    machine.expect("pass 0 ok")
    words = [word.replace("format=raw", "format=raw,cache=none") for word in machine.argv]
    machine.set_update([*words, "-incoming", "file:vm.state"])
    assert machine.hmp("migrate file:vm.state") == ""
    assert "Cache mode:       writeback, direct\n" in machine.hmp("info block")
    machine.seen = len(machine.serial)
    machine.expect(r"pass \d+ ok")
    machine.expect(r"pass \d+ ok")


def test_descriptors_and_threads_do_not_become_more(vm, path):
    machine = vm(*drive(path, ",cache=none"), append="virtio-blk depth=1 mb=1")
    machine.expect("pass 0 ok")
    machine.update()
    machine.expect(r"pass \d+ ok")
    fds, threads = machine.footprint()
    for _ in range(5):
        machine.update()
        machine.seen = len(machine.serial)
        machine.expect(r"pass \d+ ok")
    after = machine.footprint()
    assert after[0] == fds
    # A worker may be started while another is about to end its call.
    assert set(after[1]) == set(threads)
    assert len(after[1]) <= len(set(threads)) + 1
