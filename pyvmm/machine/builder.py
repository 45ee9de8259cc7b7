"""Puts a machine together, in boot order.

:func:`build` reads top to bottom: each step a paragraph, with a comment where the order
matters. The same function serves a live update's new image: whatever was inherited is taken
from the hand-over instead of being opened.
"""

from __future__ import annotations

import os

from pyvmm._util.keyval import parse_int
from pyvmm.boot import builtin, rom
from pyvmm.chardev.config import ChardevConfig
from pyvmm.core.bus import Bus
from pyvmm.cpr.handover import KVM, OWN, RAM, RESERVED
from pyvmm.devices import acpi_pm, i8042
from pyvmm.devices.rtc import Rtc
from pyvmm.devices.serial import Serial
from pyvmm.errors import ConfigError, InternalError
from pyvmm.kvm.system import System
from pyvmm.machine.cpu import Cpu
from pyvmm.machine.machine import Machine
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemory
from pyvmm.x86 import irqchip, layout, vcpu_state
from pyvmm.x86.platform import Platform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.chardev.base import Chardev
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover
    from pyvmm.devices.base import Device
    from pyvmm.machine.config import DeviceConfig, MachineConfig
    from pyvmm.vmstate.fields import Description

ROM_BLOCK = "pc.bios"
RAM_BLOCK = "pc.ram"

COM_PORTS = ((layout.COM1, layout.IRQ_COM1), (layout.COM2, layout.IRQ_COM2))


def build(config: MachineConfig, loop: EventLoop, handover: Handover) -> Machine:
    """A machine ready to start, or to have a state loaded into it.

    :param handover: what the image before left, and what the next one takes
    :raises PyvmmError: naming the option or what the host lacks; nothing is left behind
    """
    machine = Machine(config, loop, handover)
    try:
        # The permission to use KVM is checked before anything is created on disk.
        machine.system = open_system(handover)
        # Memory before the VM: a wrong -object is found while there is nothing to undo.
        machine.memory = add_memory(machine)
        machine.platform = Platform(
            machine.system, machine.memory, config.topology, config.cpu_changes
        )
        # Chardevs and back ends before devices: each device is given its own.
        for chardev in config.chardevs:
            machine.chardevs.create(chardev)
        add_drives(machine)
        if config.netdevs:
            from pyvmm.machine import netdev

            netdev.add_netdevs(machine)
        add_devices(machine)
        # The serial ports come first on a mux: the console begins with the focus.
        machine.monitors = [
            (monitor, machine.chardevs.claim(monitor.chardev)) for monitor in config.monitors
        ]
        # All chardevs are there, and nobody reads them yet: what they did in the image before
        # goes on.
        machine.chardevs.load_state()
        # An update's guest stands still: it waits for nobody.
        if not config.incoming:
            machine.chardevs.wait_connected()
        machine.cpus = [
            Cpu(vcpu, machine.ports, machine.mmio, machine, machine.memory)
            for vcpu in machine.platform.vcpus
        ]
        machine.pic_watch = irqchip.PicWatch(
            loop, machine.runstate, machine.platform.vm, machine.cpus[0].recheck_interrupts
        )
        # In a live update memory has it all already, the kernel, its data and its changes.
        if not config.incoming:
            machine.kernel.load()
    except BaseException:
        # What was inherited stays open: the old image needs it for its return.
        if not handover.is_incoming:
            machine.close()
        raise
    return machine


def descriptions(config: MachineConfig) -> dict[tuple[str, int], Description]:
    """What a machine of this configuration writes into a state, by section and instance;
    without building it."""
    found = {(Serial.name, number): Serial.vmstate for number in range(len(config.serials))}
    for device in (Rtc, i8042.I8042, i8042.Port92, acpi_pm.AcpiPm):
        found[(device.name, 0)] = device.vmstate
    for index in range(config.smp):
        found[(vcpu_state.VCPU.name, index)] = vcpu_state.VCPU
    for chip in (irqchip.I8259, irqchip.IOAPIC, irqchip.I8254, irqchip.KVMCLOCK):
        found[(chip.name, 0)] = chip
    found[(irqchip.I8259.name, 1)] = irqchip.I8259
    if any(device.driver.startswith("virt") for device in config.devices):
        from pyvmm.machine import virtio

        found |= virtio.descriptions(config.devices)
    return found


def block_name(config: MachineConfig, id: str) -> str:
    """What the memory of the object ``id`` is called in states and in what an exec hands over:
    the id, unless that is a name of the machine's own."""
    own = [*RESERVED, ROM_BLOCK]
    if not config.memory_backend:
        own.append(RAM_BLOCK)
    return f"ram/{id}" if id in own else id


def open_system(handover: Handover) -> System:
    """/dev/kvm: the inherited descriptor, or a fresh one."""
    parcel = handover.parcel(OWN, KVM)
    inherited = parcel.take()
    if inherited is None:
        system = System.open()
    else:
        system = System(inherited)
        system.check("The inherited /dev/kvm")
    parcel.keep(system.fd)
    return system


def add_memory(machine: Machine) -> GuestMemory:
    """RAM from the objects (or one made for ``-m``), and the ROM."""
    config = machine.config
    memory = GuestMemory()
    memory.report = machine.on_ram_error
    ram = None
    for object_config in config.objects:
        name = block_name(config, object_config.id)
        backend = _add_backend(machine, object_config, name)
        if object_config.id == config.memory_backend:
            ram = backend
    if ram is None:
        kind = "memory-backend-memfd" if config.anon_alloc == "memfd" else "memory-backend-ram"
        ram = _add_backend(machine, RamConfig(kind, RAM_BLOCK, config.memory_size), RAM_BLOCK)
    memory.add_ram(ram, layout.ram_ranges(ram.size))
    rom.add(memory, _add_rom(machine), ram)
    return memory


def add_drives(machine: Machine) -> None:
    """The disk images."""
    if machine.config.drives:
        from pyvmm.backends.block import BlockFile

        for drive in machine.config.drives:
            machine.drives[drive.id] = BlockFile(drive, machine.handover)


def add_devices(machine: Machine) -> None:
    """The buses and what is on them."""
    config = machine.config
    machine.ports = Bus("I/O", 1 << 16)
    machine.mmio = Bus("memory", 1 << 64, machine.memory)
    for number, chardev_config in enumerate(config.serials):
        ports, irq = COM_PORTS[number]
        if chardev_config is None:
            from pyvmm.chardev.null import NullChardev

            chardev: Chardev = NullChardev("null", machine.loop, machine.handover)
        else:
            chardev = machine.chardevs.claim(chardev_config)
        line = machine.platform.irqs.line(irq, f"serial {number}")
        serial = Serial(line, chardev, iobase=ports[0], index=number)
        _add(machine, serial, *ports)
    irqs = machine.platform.irqs
    rtc = Rtc(irqs.line(layout.IRQ_RTC, Rtc.name), machine.loop)
    low = min(config.memory_size, layout.BELOW_4G_END)
    rtc.set_memory_size(low, config.memory_size - low)
    _add(machine, rtc, *layout.CMOS)
    _add(machine, i8042.I8042(machine.request_reset), layout.I8042_DATA[0], i8042.PORTS)
    _add(machine, i8042.Port92(machine.request_reset), *layout.PORT92)
    machine.power = acpi_pm.AcpiPm(
        irqs.line(acpi_pm.SCI, acpi_pm.AcpiPm.name), machine.request_power_off
    )
    _add(machine, machine.power, acpi_pm.IOBASE, acpi_pm.PORTS, acpi_pm.WIDTH)
    for device in config.devices:
        if not device.driver.startswith("virt"):
            add_device(machine, device)
    if any(device.driver.startswith("virt") for device in config.devices):
        from pyvmm.machine import virtio

        virtio.add_devices(machine)


def add_device(machine: Machine, config: DeviceConfig) -> None:
    """One ``-device``; ``options`` has checked driver and properties."""
    properties = config.properties

    def number(key: str, default: int) -> int:
        where = f"-device {config.driver}"
        return parse_int(properties[key], where, key, 0, 0xFFFF) if key in properties else default

    # Each is imported where it is wanted: that is time of an update's pause.
    if config.driver == "isa-debug-exit":
        from pyvmm.devices import debugexit

        iobase = number("iobase", debugexit.IOBASE)
        iosize = number("iosize", debugexit.IOSIZE)
        exit = debugexit.DebugExit(machine.request_exit, iobase=iobase, iosize=iosize)
        _add(machine, exit, iobase, iosize, debugexit.WIDTH)
    elif config.driver == "isa-debugcon":
        from pyvmm.devices import debugcon

        iobase = number("iobase", debugcon.IOBASE)
        chardev = None
        if "chardev" in properties:
            name = properties["chardev"]
            chardev = machine.chardevs.claim(ChardevConfig("chardev", name, {}, "-device"))
        _add(machine, debugcon.DebugConsole(chardev, iobase=iobase), iobase, 1)
    else:
        from pyvmm.devices import pvpanic

        ioport = number("ioport", pvpanic.IOPORT)
        _add(machine, pvpanic.PvPanic(machine.report_panic, ioport=ioport), ioport, 1)


def _add(machine: Machine, device: Device, port: int, count: int, width: int = 1) -> None:
    machine.devices.append(device)
    try:
        machine.ports.add(port, count, device, device.name, width=width)
    except InternalError as error:
        raise ConfigError(f"-device {device.name}: {error}; choose other ports") from None


def _add_rom(machine: Machine) -> RamBackend:
    # Preserved like RAM, whatever the new image brings: the guest may be executing it.
    inherited = _take_block(machine, ROM_BLOCK, ROM_BLOCK)
    if inherited is None:
        image = rom.read(machine.config.bios or builtin.path(builtin.ROM))
        size = len(image)
    else:
        size = os.fstat(inherited).st_size
    config = RamConfig("memory-backend-memfd", ROM_BLOCK, size)
    backend = _insert_backend(machine, RamBackend(config, inherited, ROM_BLOCK))
    if inherited is None:
        backend.write(0, image)
    return backend


def _add_backend(machine: Machine, config: RamConfig, name: str) -> RamBackend:
    fd = _take_block(machine, name, config.id)
    return _insert_backend(machine, RamBackend(config, fd, name))


def _take_block(machine: Machine, name: str, id: str) -> int | None:
    # A fresh block would be empty, and the guest's memory lost.
    return machine.handover.parcel(RAM, name).require(f"memory of {id}")


def _insert_backend(machine: Machine, backend: RamBackend) -> RamBackend:
    machine.backends.append(backend)
    if backend.fd is not None and backend.is_shared:
        machine.handover.parcel(RAM, backend.name).keep(backend.fd)
    return backend
