"""Puts a machine together, in boot order.

:func:`build` reads top to bottom: each step a paragraph, with a comment where the order
matters. The same function serves a live update's new image: whatever was inherited is taken
from the hand-over instead of being opened.
"""

from __future__ import annotations

import os

from pyvmm.boot import builtin, rom
from pyvmm.chardev.factory import ChardevSet
from pyvmm.core.bus import Bus, Nobody
from pyvmm.cpr.handover import KVM, OWN, RAM, RESERVED
from pyvmm.devices import acpi_pm, fw_cfg, i8042
from pyvmm.devices.acpi_pm import AcpiPm
from pyvmm.devices.fw_cfg import FwCfg
from pyvmm.devices.rtc import Rtc
from pyvmm.devices.serial import Serial
from pyvmm.kvm.answers import Answers
from pyvmm.kvm.system import System
from pyvmm.machine.guest_end import GuestEnd
from pyvmm.machine.machine import Machine
from pyvmm.machine.parts import Events, Opened, Parts
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemory
from pyvmm.x86 import layout
from pyvmm.x86.platform import Platform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pyvmm.backends.block import BlockFile
    from pyvmm.backends.net.factory import NetdevSet
    from pyvmm.chardev.base import Chardev
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover
    from pyvmm.machine.config import MachineConfig

ROM_BLOCK = "pc.bios"
RAM_BLOCK = "pc.ram"


def build(
    config: MachineConfig,
    loop: EventLoop,
    handover: Handover,
    on_end: Callable[[], None],
) -> Machine:
    """Return a machine ready to start, or to have a state loaded into it.

    :param handover: what the process before left, and what the next one takes
    :param on_end: called when the machine has come to its end; who called this closes it then
    :raises PyvmmError: naming the option or what the host lacks; nothing is left behind
    """
    opened = Opened()
    try:
        # The permission to use KVM is checked before anything is created on disk.
        system = opened.add(open_system(handover))
        events = Events()
        end = GuestEnd(loop, config.actions, events.emit, on_end)
        # Memory before the VM: a wrong -object is found while there is nothing to undo.
        memory, ram_blocks = make_memory(config, handover, opened)
        memory.report = end.on_ram_error
        platform = opened.add(
            Platform(system, memory, config.topology, config.cpu_changes, config.pit_reinjects),
            in_vm=True,
        )
        # Chardevs and back ends before devices: each device is given its own.
        chardevs = opened.add(ChardevSet(loop, handover, end.quit))
        for chardev in config.chardevs:
            chardevs.create(chardev)
        parts = Parts(
            loop=loop,
            handover=handover,
            opened=opened,
            events=events,
            end=end,
            memory=memory,
            ram_blocks=ram_blocks,
            platform=platform,
            ports=Bus("I/O", 1 << 16),
            mmio=Bus("memory", 1 << 64, memory),
            power=AcpiPm(platform.irqs.line(acpi_pm.SCI, AcpiPm.name), end.request_power_off, loop),
            fw_cfg=FwCfg(memory, loop),
            chardevs=chardevs,
            drives=make_drives(config, handover, opened),
            netdevs=make_netdevs(config, loop, handover, opened),
            rngs={rng.id: rng for rng in config.rngs},
        )
        add_devices(parts, config)
        Answers(platform.vcpus, parts.ports, parts.mmio)
        # The serial ports come first on a mux: the console begins with the focus.
        parts.monitors += [chardevs.claim(monitor.chardev) for monitor in config.monitors]
        # All chardevs are there, and nobody reads them yet: what they did in the image before
        # goes on.
        chardevs.load_state()
        # An update's guest stands still: it waits for nobody.
        if not config.incoming:
            chardevs.wait_connected()
        machine = Machine(parts, config)
        # In a live update memory has it all already, the kernel, its data and its changes.
        if not config.incoming:
            machine.kernel.load()
    except BaseException:
        # What was inherited stays open: the old image needs it for its return.
        if not handover.is_incoming:
            opened.close()
        raise
    return machine


def block_name(config: MachineConfig, id: str) -> str:
    """Return the name of an object's memory in states and in what an exec hands over: the object's
    ``id``, or ``ram/ID`` if the machine itself uses that name."""
    own = [*RESERVED, ROM_BLOCK]
    if not config.memory_backend:
        own.append(RAM_BLOCK)
    return f"ram/{id}" if id in own else id


def open_system(handover: Handover) -> System:
    """Return /dev/kvm: the inherited descriptor, or a fresh one."""
    parcel = handover.parcel(OWN, KVM)
    inherited = parcel.take()
    if inherited is None:
        system = System.open()
    else:
        system = System(inherited)
        system.check("The inherited /dev/kvm")
    parcel.keep(system.fd)
    return system


def make_memory(
    config: MachineConfig, handover: Handover, opened: Opened
) -> tuple[GuestMemory, list[RamBackend]]:
    """Make RAM from the objects (or one object for ``-m``) and the ROM; return guest memory, and
    all the host's memory that is behind it."""
    memory = GuestMemory()
    blocks = []
    ram = None
    for object_config in config.objects:
        name = block_name(config, object_config.id)
        blocks.append(_make_block(object_config, name, handover, opened))
        if object_config.id == config.memory_backend:
            ram = blocks[-1]
    if ram is None:
        kind = "memory-backend-memfd" if config.anon_alloc == "memfd" else "memory-backend-ram"
        ram_config = RamConfig(kind, RAM_BLOCK, config.memory_size)
        ram = _make_block(ram_config, RAM_BLOCK, handover, opened)
        blocks.append(ram)
    memory.add_ram(ram, layout.ram_ranges(ram.size))
    blocks.append(_make_rom(config, handover, opened))
    rom.add(memory, blocks[-1], ram)
    return memory, blocks


def make_drives(config: MachineConfig, handover: Handover, opened: Opened) -> dict[str, BlockFile]:
    """Open the disk images; return them by id."""
    if not config.drives:
        return {}
    from pyvmm.backends.block import BlockFile

    return {drive.id: opened.add(BlockFile(drive, handover)) for drive in config.drives}


def make_netdevs(
    config: MachineConfig, loop: EventLoop, handover: Handover, opened: Opened
) -> NetdevSet | None:
    """Make the network back ends; return None if there are none."""
    if not config.netdevs:
        return None
    from pyvmm.backends.net.factory import NetdevSet

    netdevs = opened.add(NetdevSet(loop, handover))
    for netdev in config.netdevs:
        netdevs.create(netdev)
    netdevs.load_state()
    return netdevs


def add_devices(parts: Parts, config: MachineConfig) -> None:
    """The devices on the buses."""
    platform, end = parts.platform, parts.end
    for number, chardev_config in enumerate(config.serials):
        ports, irq = layout.COM_PORTS[number]
        if chardev_config is None:
            from pyvmm.chardev.null import NullChardev

            chardev: Chardev = NullChardev("null", parts.loop, parts.handover)
        else:
            chardev = parts.chardevs.claim(chardev_config)
        line = platform.irqs.line(irq, f"serial {number}")
        parts.add_isa(Serial(line, chardev, iobase=ports[0], index=number), *ports)
    rtc = Rtc(platform.irqs.line(layout.IRQ_RTC, Rtc.name), parts.loop)
    low = min(config.memory_size, layout.BELOW_4G_END)
    rtc.set_memory_size(low, config.memory_size - low)
    parts.add_isa(rtc, *layout.CMOS)
    parts.add_isa(i8042.I8042(end.request_reset), layout.I8042_DATA[0], i8042.PORTS)
    parts.add_isa(i8042.Port92(end.request_reset), *layout.PORT92)
    parts.add_isa(parts.power, acpi_pm.IOBASE, acpi_pm.PORTS, acpi_pm.WIDTH)
    if config.fw_cfg:
        from pyvmm.machine import fw_cfg_files

        parts.fw_cfg_files = parts.opened.add(
            fw_cfg_files.FwCfgFiles(config.fw_cfg, parts.handover)
        )

    def make_items(files: Mapping[str, int]) -> dict[int, fw_cfg.Item]:
        from pyvmm.machine import fw_cfg_items

        return fw_cfg_items.make(parts, config, files)

    parts.fw_cfg.make_items = make_items
    if config.has_pci:
        add_pci(parts, config)
    # The order in which their state is written, too.
    for bus in ("isa", "virtio", "pci"):
        for device in config.devices:
            if device.driver.bus == bus:
                device.driver.add(parts, device)
    # Unless a -device has some of them, as images before fw_cfg allow.
    first, count = layout.FW_CFG
    if not any(parts.ports.find(port) for port in range(first, first + count)):
        parts.add_isa(parts.fw_cfg, first, count, fw_cfg.WIDTH)
    # Unless a -device has it.
    if parts.ports.find(layout.POST_CODE[0]) is None:
        parts.ports.add(*layout.POST_CODE, Nobody(), "post-code")


def add_pci(parts: Parts, config: MachineConfig) -> None:
    """The PCI bus, with its host bridge alone."""
    from pyvmm.devices.pci.host import ECAM_SIZE, WIDTH, Ecam, PciHost, Window

    irqs = parts.platform.irqs
    parts.pci = PciHost(
        parts.ports,
        parts.mmio,
        io=Window(*layout.PCI_IO),
        low=Window(*layout.PCI_LOW),
        high=Window(*layout.pci_high(config.memory_size)),
        lines=[irqs.line(gsi, f"PCI interrupt {n}") for n, gsi in enumerate(layout.IRQ_PCI)],
        kicks=irqs,
    )
    parts.add_isa(parts.pci, *layout.PCI_CONFIG, WIDTH)
    parts.mmio.add(layout.PCI_ECAM, ECAM_SIZE, Ecam(parts.pci), "pcie-mmcfg", width=WIDTH)


def _make_rom(config: MachineConfig, handover: Handover, opened: Opened) -> RamBackend:
    # Preserved like RAM, whatever the new image brings: the guest may be executing it.
    inherited = _take_block(ROM_BLOCK, ROM_BLOCK, handover)
    if inherited is None:
        contents = rom.read(config.bios or builtin.path(builtin.ROM))
        size = len(contents)
    else:
        size = os.fstat(inherited).st_size
    rom_config = RamConfig("memory-backend-memfd", ROM_BLOCK, size)
    block = _keep_block(RamBackend(rom_config, inherited, ROM_BLOCK), handover, opened)
    if inherited is None:
        block.write(0, contents)
    return block


def _make_block(config: RamConfig, name: str, handover: Handover, opened: Opened) -> RamBackend:
    fd = _take_block(name, config.id, handover)
    return _keep_block(RamBackend(config, fd, name), handover, opened)


def _take_block(name: str, id: str, handover: Handover) -> int | None:
    # A fresh block would be empty, and the guest's memory lost.
    return handover.parcel(RAM, name).require(f"memory of {id}")


def _keep_block(block: RamBackend, handover: Handover, opened: Opened) -> RamBackend:
    opened.add(block, in_vm=True)
    if block.fd is not None and block.is_shared:
        handover.parcel(RAM, block.name).keep(block.fd)
    return block
