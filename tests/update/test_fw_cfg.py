"""fw_cfg, the PM timer and what belongs to them go over updates, whatever the guest is at."""

import shlex

import pytest

UPDATES = 3


@pytest.fixture
def machine(vm, tmp_path):
    """A guest that reads by byte and by long transfers without a pause."""
    path = tmp_path / "content"
    path.write_bytes(bytes(range(251)) * 60)
    machine = vm(
        *("-device", "vmcoreinfo", "-device", "pc-testdev"),
        *("-fw_cfg", f"opt/file,file={path}", "-global", "kvm-pit.lost_tick_policy=discard"),
        append="fwcfg testdev",
        smp=2,
    )
    machine.expect(r"fwcfg 1\r\n")
    # What the guest was told does not come from there again.
    path.unlink()
    return machine


@pytest.mark.parametrize("running", ["on", "off"])
def test_guest_reads_on(machine, running):
    machine.hmp(f"migrate_set_parameter cpr-exec-running {running}")
    for _ in range(UPDATES):
        machine.update()
        machine.expect(r"fwcfg \d+\r\n")
    assert b"FAIL" not in machine.serial
    assert machine.stderr() == ""


def test_command_without_the_item_is_refused(machine):
    command = list(machine.argv)
    at = command.index("-fw_cfg")
    del command[at : at + 2]
    error = machine.hmp(f"update {shlex.join(map(str, command))}")
    assert "-fw_cfg is nothing, this machine has opt/file (file); make them equal" in error
    machine.expect(r"fwcfg \d+\r\n")
