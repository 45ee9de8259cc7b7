"""State of the CPUs that an update could harm, or harm the guest with."""

from harness import guests


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
