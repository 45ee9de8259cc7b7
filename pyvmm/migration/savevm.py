"""The machine as a stream, and back. The vCPUs are stopped, for both."""

from __future__ import annotations

import os

from pyvmm.core import runstate
from pyvmm.devices import acpi_pm
from pyvmm.errors import VmStateError
from pyvmm.machine.config import MACHINE_TYPE
from pyvmm.vmstate import stream
from pyvmm.vmstate.fields import Buffer, Description, Record, u8, u32
from pyvmm.vmstate.section import Section

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine
    from pyvmm.vmstate.section import Key

_STATE_SIZE = 32
BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"
_NO_BOOT_ID = bytes(16)


def _check_globalstate(state: Record) -> None:
    text = state.runstate.rstrip(b"\0")
    if state.size != len(text) + 1 or text.decode("ascii", "replace") not in runstate.TRANSITIONS:
        raise ValueError(f"there is no run state {text!r}")


GLOBALSTATE = Description(
    "globalstate",
    [
        u32("size"),
        Buffer("runstate", _STATE_SIZE),
        u8("has_vm_was_suspended"),
        u8("vm_was_suspended"),
        # Which boot of which host's kernel wrote it; zeros if it will never see another. QEMU and
        # older images leave these bytes unused, too, and write zeros.
        Buffer("boot_id", len(_NO_BOOT_ID)),
        Buffer("unused", 50),
    ],
    check=_check_globalstate,
)


def save(
    machine: Machine,
    state: str,
    boot_id: bytes = _NO_BOOT_ID,
    *,
    former: bool = False,
    with_cpus: bool = True,
) -> bytes:
    """Return the stream of a stopped machine.

    :param state: the run state that the guest shall be in after a load
    :param boot_id: :func:`read_boot_id`, if it may be loaded after the host was started again
    :param former: call sections as images before do, one of which will load it
    :param with_cpus: whether the vCPUs and all that is KVM's are in it: they go another way when
        the guest runs
    """
    writer = stream.Writer(MACHINE_TYPE, blocks(machine), former=former)
    for section in machine.sections_to_save() if with_cpus else machine.device_sections():
        writer.add(section)
    writer.add(_globalstate(state, boot_id))
    return writer.finish()


def used(machine: Machine) -> list[str]:
    """Return, as the preflight calls them, the sections that not all images know and that the
    state would have now. The guest may run."""
    sections = machine.device_sections()
    return [
        f"{section.name}[{section.instance}]"
        for section in sections
        if section.needed is not None and section.needed()
    ]


def read(machine: Machine, data: bytes) -> stream.Loaded:
    """Return a stream's content, read and checked; the machine stays as it is.

    :raises VmStateError: naming what does not fit this machine
    """
    sections = machine.sections_to_load()
    former = {section.former: section.key for section in sections}
    loaded = stream.read(data, _descriptions(sections), MACHINE_TYPE, former)
    if (GLOBALSTATE.name, 0) not in loaded.records:
        raise VmStateError("", "the stream has no section globalstate[0]")
    for (name, size), (own_name, own_size) in zip(loaded.blocks, blocks(machine), strict=False):
        if name != own_name:
            raise VmStateError("ram", f"Unknown ramblock '{name}', the machine has '{own_name}'")
        if size != own_size:
            raise VmStateError("ram", f"Size mismatch: {name}: {size:#x} != {own_size:#x}")
    if len(loaded.blocks) != len(machine.ram_blocks):
        raise VmStateError(
            "ram", f"{len(loaded.blocks)} blocks, the machine has {len(machine.ram_blocks)}"
        )
    return loaded


def read_boot_id() -> bytes:
    """Return the 16 bytes that tell this boot of the kernel from all others; zeros if it does not
    say."""
    try:
        fd = os.open(BOOT_ID_FILE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return bytes.fromhex(os.read(fd, 64).decode("ascii").replace("-", ""))[:16].ljust(
                16, b"\0"
            )
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return _NO_BOOT_ID


def settle_clocks(machine: Machine, loaded: stream.Loaded) -> None:
    """If the state was written before the host was started, or on another host, see to it that
    the guest's clocks go on from what they showed: the host's, by which they were written down,
    began anew.

    :raises MigrationError: its TSC cannot be had here
    """
    written = bytes(loaded.records[(GLOBALSTATE.name, 0)].boot_id)
    here = read_boot_id()
    if _NO_BOOT_ID in (written, here):
        is_another = machine.platform.is_ahead(loaded.records)
    else:
        is_another = written != here
    if is_another:
        power = loaded.records.get((acpi_pm.AcpiPm.name, 0))
        written_at = machine.platform.boottime(loaded.records)
        if power is not None and written_at:
            acpi_pm.forget_boottime(power, written_at)
        machine.platform.forget_host_clocks(loaded.records)


def apply(machine: Machine, loaded: stream.Loaded, *, with_cpus: bool = True) -> str:
    """Load the state into the machine; return the run state to enter.

    :param with_cpus: as of :func:`save`
    :raises PyvmmError: naming the device or vCPU that does not take its state
    """
    sections = machine.sections_to_load()
    if not with_cpus:
        sections = machine.device_sections()
    elif not any(section.key in loaded.records for section in machine.platform.cpu_sections()):
        raise VmStateError(
            "", "the vCPUs are not in it: they ran through an exec to the image it was made for"
        )
    stream.apply(loaded, sections)
    record = loaded.records[(GLOBALSTATE.name, 0)]
    return bytes(record.runstate).rstrip(b"\0").decode("ascii")


def describe(machine: Machine, loaded: stream.Loaded) -> bytes:
    """Return what to append to the state that was loaded, so that tools can read it; empty if it
    has that already. Takes milliseconds: the guest runs meanwhile."""
    return (
        b""
        if loaded.is_described
        else stream.describe(loaded, _descriptions(machine.sections_to_load()))
    )


def blocks(machine: Machine) -> stream.Blocks:
    """Return name and size of each RAM block."""
    return [(backend.name, backend.size) for backend in machine.ram_blocks]


def _descriptions(sections: list[Section]) -> dict[Key, Description]:
    known = {section.key: section.description for section in sections}
    return known | {(GLOBALSTATE.name, 0): GLOBALSTATE}


def _globalstate(state: str, boot_id: bytes) -> Section:
    record = Record(
        size=len(state) + 1,
        runstate=state.encode().ljust(_STATE_SIZE, b"\0"),
        has_vm_was_suspended=0,
        vm_was_suspended=0,
        boot_id=boot_id,
        unused=bytes(50),
    )
    return Section(GLOBALSTATE.name, 0, GLOBALSTATE, lambda: record, lambda _: None)
