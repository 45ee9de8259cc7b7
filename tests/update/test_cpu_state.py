"""State of the CPUs that an update could harm, or harm the guest with."""

from harness import guests, needs


def test_pages_that_kvm_does_not_own_any_more(vm):
    """KVM writes to where some registers point. A guest that has put something else there since
    keeps it, over updates and over a reset, which leaves none of them on."""
    machine = vm("-kernel", guests.image("real-pv.bin"))
    for _ in range(3):
        machine.expect("real-pv 0000000")
        machine.update()
    for way in ("system_reset", "update"):
        machine.expect("real-pv 0000000")
        machine.seen = len(machine.serial)
        if way == "update":
            machine.update()
        else:
            machine.hmp(way)
            machine.expect("real-pv 00000001")
    machine.expect("real-pv 0000000")
    assert b"FAIL" not in machine.serial


def test_what_pae_paging_has_read(vm):
    """The page-directory-pointer registers, which memory does not agree with any more."""
    machine = vm("-kernel", guests.image("real-pae.bin"))
    verdict = machine.expect("real-pae (00000001|has .*)\r\n")[1].decode()
    if verdict != "00000001":
        needs.another_host(f"this KVM {verdict}")
    number = 0
    for _ in range(3):
        machine.update()
        machine.seen = len(machine.serial)
        found = int(machine.expect(r"real-pae ([0-9a-f]{8})")[1], 16)
        assert found > number
        number = found
    assert machine.serial.count(b"real-pae 00000001\r\n") == 1
    assert b"FAIL" not in machine.serial
