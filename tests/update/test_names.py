"""Ids of the user's that are names of the machine's own, too."""

import pytest


def memory(id, size="64M"):
    return "-object", f"memory-backend-memfd,id={id},size={size}"


@pytest.mark.parametrize("id", ["kvm", "pc.bios", "pc.ram", "ram", "a" * 249])
def test_memory_of_any_name(vm, id):
    machine = vm(*memory(id), append="memhash mb=4", memory=None)
    machine.expect(r"memhash .*pass 1")
    for _ in range(2):
        machine.update()
    machine.expect(r"memhash .*pass \d+")
    assert b"FAIL" not in machine.serial
    assert f"memory backend: {id}\n" in machine.hmp("info memdev")


@pytest.mark.parametrize("id", ["kvm", "pc.bios", "pc.ram"])
def test_memory_beside_main_memory(vm, id):
    machine = vm(*memory(id, "1M"), *memory("other", "2M"), append="ticker period=20")
    machine.expect(r"tick 2\r\n")
    assert machine.status == "running"  # and so all that is opened behind the start is there
    before = sorted(name for name in machine.fds() if "memfd:" in name)
    for _ in range(2):
        machine.update()
    assert sorted(name for name in machine.fds() if "memfd:" in name) == before
    machine.expect(r"tick \d+\r\n")


def test_every_back_end_of_one_name(vm):
    # Of these QEMU too has a list of its own for each kind; an object's id is for all objects.
    machine = vm(
        *memory("kvm"),
        *("-chardev", "ringbuf,id=kvm,size=64", "-mon", "kvm"),
        *("-netdev", "stream,id=kvm,server=on,addr.type=unix,addr.path=net"),
        *("-device", "virtio-net-device,netdev=kvm"),
        append="ticker period=20",
    )
    machine.expect(r"tick 2\r\n")
    machine.update()
    machine.expect(r"tick \d+\r\n")
