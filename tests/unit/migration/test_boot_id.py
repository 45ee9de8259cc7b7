"""Whether a state is of this boot of the host, and what follows."""

from types import SimpleNamespace

import pytest

from pyvmm.devices import acpi_pm
from pyvmm.migration import savevm
from pyvmm.vmstate import stream
from pyvmm.vmstate.cursor import Cursor
from pyvmm.vmstate.fields import Record
from pyvmm.x86 import irqchip
from pyvmm.x86.platform import Platform

HERE, ELSEWHERE, NONE = bytes(range(16)), bytes(range(1, 17)), bytes(16)


class Machine:
    """One whose platform notes what it is asked."""

    def __init__(self, ahead=False):
        self.forgot = False
        self.boottime = 0
        self.platform = SimpleNamespace(
            is_ahead=lambda records: ahead,
            forget_host_clocks=self.forget,
            boottime=lambda records: self.boottime,
        )

    def forget(self, records):
        self.forgot = True


@pytest.mark.parametrize(
    ("written", "here", "ahead", "forgets"),
    [
        (HERE, HERE, False, False),
        (HERE, ELSEWHERE, False, True),
        (ELSEWHERE, HERE, True, True),
        # Older images and QEMU do not say it, and neither does a host without /proc.
        (NONE, HERE, False, False),
        (NONE, HERE, True, True),
        (HERE, NONE, False, False),
        (HERE, NONE, True, True),
    ],
)
def test_clocks_of_another_boot_are_forgotten(monkeypatch, written, here, ahead, forgets):
    monkeypatch.setattr(savevm, "read_boot_id", lambda: here)
    loaded = stream.Loaded("microvm")
    loaded.records[(savevm.GLOBALSTATE.name, 0)] = Record(boot_id=written)
    machine = Machine(ahead)
    savevm.settle_clocks(machine, loaded)
    assert machine.forgot == forgets


@pytest.mark.parametrize(("boottime", "offset"), [(5 * 10**9, 5 * 10**9 - 77), (0, None)])
def test_timer_of_another_boot_goes_on(monkeypatch, boottime, offset):
    monkeypatch.setattr(savevm, "read_boot_id", lambda: HERE)
    monkeypatch.setattr(acpi_pm, "boottime", lambda: 77)
    loaded = stream.Loaded("microvm")
    loaded.records[(savevm.GLOBALSTATE.name, 0)] = Record(boot_id=ELSEWHERE)
    power = loaded.records[(acpi_pm.AcpiPm.name, 0)] = Record(sts=0, en=0, cnt=1)
    machine = Machine()
    machine.boottime = boottime
    savevm.settle_clocks(machine, loaded)
    assert machine.forgot
    assert getattr(power, "offset", None) == offset


def test_boot_id_of_this_host():
    found = savevm.read_boot_id()
    with open(savevm.BOOT_ID_FILE) as file:
        assert found.hex() == file.read().strip().replace("-", "")
    assert savevm.read_boot_id() == found


@pytest.mark.parametrize("content", [None, "", "no hex", "12"])
def test_boot_id_that_cannot_be_read(monkeypatch, tmp_path, content):
    path = tmp_path / "boot_id"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(savevm, "BOOT_ID_FILE", str(path))
    assert len(savevm.read_boot_id()) == 16


def test_older_images_read_it_as_what_is_unused():
    """The bytes are where 66 were unused; an older image writes zeros there."""
    out = bytearray()
    section = savevm._globalstate("running", HERE)
    section.description.save(out, section.save())
    assert len(out) == 4 + 32 + 2 + 66
    assert out[38:54] == HERE
    assert not any(out[54:])
    out[38:54] = bytes(16)
    assert savevm.GLOBALSTATE.load(Cursor(bytes(out)), 1).boot_id == NONE


def test_a_state_without_some_section_is_left_to_whom_refuses_it():
    platform = Platform.__new__(Platform)
    platform.vcpus = [SimpleNamespace(index=0)]
    records = {(irqchip.KVMCLOCK.name, 0): Record(clock=1, boottime=1 << 62)}
    assert platform.is_ahead(records)
    assert not platform.is_ahead({})
    assert (platform.boottime(records), platform.boottime({})) == (1 << 62, 0)
    platform.forget_host_clocks(records)
    assert records[(irqchip.KVMCLOCK.name, 0)].boottime == 1 << 62
