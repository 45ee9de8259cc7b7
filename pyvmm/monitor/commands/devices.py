"""What the machine is made of: vCPUs, devices, address spaces, memory."""

from __future__ import annotations

import os

from pyvmm._native import ffi
from pyvmm.monitor.registry import Argument, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.monitor.registry import Shape

_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr")
_GPRS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)
_MP_STATE_HALTED = 3


def query_cpus_fast(context: Context) -> list[dict[str, Any]]:
    """Return the vCPUs and the host threads that run them; disturbs no guest."""
    return [
        {
            "thread-id": cpu.thread_id,
            "qom-path": f"/machine/cpu[{cpu.index}]",
            "cpu-index": cpu.index,
            "target": "x86_64",
            "model": "host",
        }
        for cpu in context.machine.cpus
    ]


def query_registers(context: Context, cpu_index: int | None = None) -> dict[str, Any]:
    """Return the registers of one vCPU, by their names in the SDM; the guest may go on running.

    ``xsave`` is the first 512 bytes of the XSAVE area (SDM volume 1, 10.5.1) in hexadecimal;
    segments are dicts of base, limit, selector and the descriptor's attributes.
    """
    cpu = context.cpu(cpu_index)
    return {"cpu-index": cpu.index, **cpu.call(_collect_registers)}


def _collect_registers(vcpu: Any) -> dict[str, Any]:
    # KVM_GET_MP_STATE goes first: it may deliver an INIT or SIPI, which changes the others.
    halted = vcpu.get_mp_state() == _MP_STATE_HALTED
    regs, sregs, debug = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_debugregs()
    found: dict[str, Any] = {name: getattr(regs, name) for name in _GPRS}
    for name in _SEGMENTS:
        segment = getattr(sregs, name)
        found[name] = {
            field: getattr(segment, field)
            for field in (
                *("selector", "base", "limit", "type", "s", "dpl", "present"),
                *("avl", "l", "db", "g", "unusable"),
            )
        }
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        found[name] = {"base": table.base, "limit": table.limit}
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer"):
        found[name] = getattr(sregs, name)
    for number in range(4):
        found[f"dr{number}"] = debug.db[number]
    found |= {"dr6": debug.dr6, "dr7": debug.dr7, "halted": halted}
    found["xsave"] = vcpu.get_xsave()[:512].hex()
    return found


def query_memdev(context: Context) -> list[dict[str, Any]]:
    """Return the memory backends, sizes in bytes and times in ms.

    ``collapse`` says what became of making huge pages of them (``memory.upkeep``).
    """
    upkeep = context.machine.upkeep
    return [
        {
            "id": backend.id,
            "size": backend.size,
            "merge": backend.config.merge,
            "dump": backend.config.dump,
            "prealloc": backend.config.prealloc,
            "share": backend.config.share,
            "host-nodes": [],
            "policy": "default",
            "collapse": upkeep.describe(backend) if upkeep else {"state": "off", "huge": 0},
        }
        for backend in context.machine.ram_blocks
    ]


def query_mtree(context: Context) -> dict[str, Any]:
    """Return the address spaces: who answers where. Sizes and addresses are in bytes."""
    machine = context.machine
    memory = [
        {
            "start": region.gpa,
            "size": region.size,
            "name": region.name,
            "type": "rom" if region.readonly else "ram",
            "backend": region.backend.name,
            "offset": region.offset,
        }
        for region in machine.memory.regions
    ]
    memory += [_io_region(region) for region in machine.mmio.regions]
    spaces = [
        {
            "name": machine.ports.name,
            "size": machine.ports.size,
            "regions": [_io_region(region) for region in machine.ports.regions],
        },
        {
            "name": "memory",
            "size": machine.mmio.size,
            "regions": sorted(memory, key=lambda region: int(region["start"])),
        },
    ]
    backends = [{"name": backend.name, "size": backend.size} for backend in machine.ram_blocks]
    return {"address-spaces": spaces, "memory-regions": backends}


def _io_region(region: Any) -> dict[str, Any]:
    return {"start": region.start, "size": region.length, "name": region.name, "type": "i/o"}


def query_qtree(context: Context) -> list[dict[str, Any]]:
    """Return the devices and their properties."""
    return [
        {"type": device.name, "id": device.id, "properties": device.properties()}
        for device in context.machine.devices
    ]


def query_ramblock(context: Context) -> list[dict[str, Any]]:
    """Return the RAM blocks and where they are mapped in this process, in bytes."""
    found = []
    offset = 0
    for backend in context.machine.ram_blocks:
        found.append(
            {
                "name": backend.name,
                "page-size": os.sysconf("SC_PAGE_SIZE"),
                "offset": offset,
                "size": backend.size,
                "host-address": int(ffi.cast("uintptr_t", ffi.from_buffer(backend.view))),
                "readonly": False,
            }
        )
        offset += backend.size
    return found


_CPU: Shape = {
    "thread-id": "int",
    "qom-path": "str",
    "cpu-index": "int",
    "target": "str",
    "model": "str",
}
_MEMDEV: Shape = {
    "id": "str",
    "size": "int",
    "merge": "bool",
    "dump": "bool",
    "prealloc": "bool",
    "share": "bool",
    "host-nodes": ["int"],
    "policy": ("default",),
    "collapse": {
        "state": ("off", "waiting", "working", "paused", "refused"),
        "huge": "int",
        "*longest-ms": "number",
        "*reason": "str",
    },
}
_RAMBLOCK: Shape = {
    "name": "str",
    "page-size": "int",
    "offset": "int",
    "size": "int",
    "host-address": "int",
    "readonly": "bool",
}
_REGION: Shape = {
    "start": "int",
    "size": "int",
    "name": "str",
    "type": ("ram", "rom", "i/o"),
    "*backend": "str",
    "*offset": "int",
}

COMMANDS = (
    Command("query-cpus-fast", query_cpus_fast, returns=[_CPU]),
    Command(
        "x-query-registers",
        query_registers,
        Argument("cpu-index", "integer", "which vCPU; by default the first", optional=True),
        returns="any",
    ),
    Command("query-memdev", query_memdev, returns=[_MEMDEV]),
    Command("x-query-ramblock", query_ramblock, returns=[_RAMBLOCK]),
    Command(
        "x-query-mtree",
        query_mtree,
        returns={
            "address-spaces": [{"name": "str", "size": "int", "regions": [_REGION]}],
            "memory-regions": [{"name": "str", "size": "int"}],
        },
    ),
    Command(
        "x-query-qtree",
        query_qtree,
        returns=[{"type": "str", "id": "str", "properties": "any"}],
    ),
)
