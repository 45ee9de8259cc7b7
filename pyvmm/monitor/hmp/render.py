"""What the commands return, as the text that QEMU's human monitor shows.

Scripts read this text, so widths, blanks and tabs are QEMU's. Lines end with a newline.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    Data = dict[str, Any]

# --- machine -----------------------------------------------------------------------------------


def status(data: Data) -> str:
    """Return the text of ``info status``."""
    state = data["status"]
    if state in ("running", "paused"):
        return f"VM status: {state}\n"
    return f"VM status: paused ({state})\n"


def cpus(data: list[Data], current: int) -> str:
    """Return the text of ``info cpus``; the monitor's own CPU has a star."""
    return "".join(
        f"{'*' if cpu['cpu-index'] == current else ' '} CPU #{cpu['cpu-index']}:"
        f" thread_id={cpu['thread-id']} model={cpu['model']}\n"
        for cpu in data
    )


def chardev(data: list[Data]) -> str:
    """Return the text of ``info chardev``."""
    return "".join(
        f"{entry['label']}: filename={entry['filename']}"
        + (f" ({entry['dropped']} bytes dropped)\n" if "dropped" in entry else "\n")
        for entry in data
    )


def block(data: list[Data]) -> str:
    """Return the text of ``info block``."""
    entries = []
    for entry in data:
        inserted, cache = entry["inserted"], entry["inserted"]["cache"]
        name = entry["device"] or inserted["node-name"]
        access = ", read-only" if inserted["ro"] else ""
        lines = [f"{name}: {inserted['file']} ({inserted['drv']}{access})"]
        if "qdev" in entry:
            lines.append(f"    Attached to:      {entry['qdev']}")
        if entry.get("io-status", "ok") != "ok":
            lines.append(f"    I/O status:       {entry['io-status']}")
        mode = "writeback" if cache["writeback"] else "writethrough"
        mode += ", direct" * cache["direct"] + ", ignore flushes" * cache["no-flush"]
        lines.append(f"    Cache mode:       {mode}")
        entries.append("".join(f"{line}\n" for line in lines))
    return "\n".join(entries)


def network(data: list[Data]) -> str:
    """Return the text of ``info network``: a back end stands below the device that uses it."""
    lines = []
    for entry in data:
        words = [f"type={entry['type']}", *(f"{k}={v}" for k, v in entry["properties"].items())]
        line = f"{entry['id']}: index=0,{','.join(words)}"
        if "nic" in entry:
            nic = entry["nic"]
            lines.append(
                f"{nic['name']}: index=0,type=nic,model={nic['model']},macaddr={nic['mac']}"
            )
            line = f" \\ {line}"
        lines.append(line)
    return "".join(f"{line}\n" for line in lines)


def memdev(data: list[Data]) -> str:
    """Return the text of ``info memdev``."""

    def on(flag: bool) -> str:
        return "true" if flag else "false"

    def collapse(told: Data) -> str:
        pages = [f"{told['huge'] >> 20} MiB in huge pages"] if told["huge"] else []
        took = [f"{told['longest-ms']} ms for one at most"] if "longest-ms" in told else []
        reason = [told["reason"]] if "reason" in told else []
        return "; ".join([told["state"], *pages, *took, *reason])

    return "".join(
        f"memory backend: {entry['id']}\n"
        f"  size:  {entry['size']}\n"
        f"  merge: {on(entry['merge'])}\n"
        f"  dump: {on(entry['dump'])}\n"
        f"  prealloc: {on(entry['prealloc'])}\n"
        f"  share: {on(entry['share'])}\n"
        f"  policy: {entry['policy']}\n"
        f"  host nodes: {','.join(map(str, entry['host-nodes']))}\n"
        f"  collapse: {collapse(entry['collapse'])}\n"
        for entry in data
    )


def ramblock(data: list[Data]) -> str:
    """Return the text of ``info ramblock``."""
    head = "PSize", "Offset", "Used", "Total", "HVA", "RO"
    lines = ["{:>24} {:>8}  {:>18} {:>18} {:>18} {:>18} {:>3}".format("Block Name", *head)]
    for block in data:
        page = f"{block['page-size'] >> 10} KiB"
        sizes = (block["offset"], block["size"], block["size"], block["host-address"])
        numbers = " ".join(f"{number:#018x}" for number in sizes)
        access = "ro" if block["readonly"] else "rw"
        lines.append(f"{block['name']:>24} {page:>8}  {numbers} {access:>3}")
    return "".join(f"{line}\n" for line in lines)


def mtree(data: Data) -> str:
    """Return the text of ``info mtree``: address spaces, then what aliases in them refer to."""
    lines = []
    for space in data["address-spaces"]:
        lines.append(f"address-space: {space['name']}")
        root = "system" if space["name"] == "memory" else "io"
        lines.append(f"  {_range(0, space['size'])} (prio 0, i/o): {root}")
        for region in space["regions"]:
            text = f"    {_range(region['start'], region['size'])} (prio 0, {region['type']}): "
            if "backend" in region:
                within = _range(region["offset"], region["size"])
                text += f"alias {region['name']} @{region['backend']} {within}"
            else:
                text += region["name"]
            lines.append(text)
        lines.append("")
    for region in data["memory-regions"]:
        lines.append(f"memory-region: {region['name']}")
        lines.append(f"  {_range(0, region['size'])} (prio 0, ram): {region['name']}")
        lines.append("")
    return "\n".join(lines) + "\n"


def pci(data: list[Data]) -> str:
    """Return the text of ``info pci``."""
    lines = [] if data else ["there is no PCI bus"]
    for device in (device for bus in data for device in bus["devices"]):
        info, id = device["class_info"], device["id"]
        place = f"device {device['slot']:3}, function {device['function']}"
        lines.append(f"  Bus {device['bus']:2}, {place}:")
        name = info.get("desc", f"Class {info['class']:04}")
        lines.append(f"    {name}: PCI device {id['vendor']:04x}:{id['device']:04x}")
        if id["subsystem-vendor"]:
            lines.append(f"      PCI subsystem {id['subsystem-vendor']:04x}:{id['subsystem']:04x}")
        if "irq" in device:
            lines.append(f"      IRQ {device['irq']}, pin {'ABCD'[device['irq_pin'] - 1]}")
        lines += [_pci_region(region) for region in device["regions"]]
        lines.append(f'      id "{device["qdev_id"]}"')
    return "".join(f"{line}\n" for line in lines)


def _pci_region(region: Data) -> str:
    kind, digits = "I/O", 4
    if region["type"] == "memory":
        digits = 8
        bits = 64 if region["mem_type_64"] else 32
        kind = f"{bits} bit{' prefetchable' if region['prefetch'] else ''} memory"
    first = region["address"]
    if first < 0:
        return f"      BAR{region['bar']}: {kind} of {region['size']:#x} bytes, not enabled."
    last = first + region["size"] - 1
    where = f"0x{first:0{digits}x} [0x{last:0{digits}x}]"
    return f"      BAR{region['bar']}: {kind} at {where}."


def _range(start: int, size: int) -> str:
    return f"{start:016x}-{start + max(size, 1) - 1:016x}"


def qtree(data: list[Data]) -> str:
    """Return the text of ``info qtree``: all devices sit on one bus."""
    lines = ["bus: main-system-bus", "  type System"]
    for device in data:
        lines.append(f'  dev: {device["type"]}, id "{device["id"]}"')
        lines += [
            f"    {name} = {_property(value)}" for name, value in device["properties"].items()
        ]
    return "\n".join(lines) + "\n"


def _property(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value} ({value:#x})"
    return f'"{value}"'


# --- migration ---------------------------------------------------------------------------------


def migrate(data: Data) -> str:
    """Return the text of ``info migrate``: nothing before the first migration."""
    lines = []
    if data.get("blocked-reasons"):
        lines.append("Outgoing migration blocked:")
        lines += [f"  {reason}" for reason in data["blocked-reasons"]]
    if "status" in data:
        error = f" ({data['error-desc']})" if data.get("error-desc") else ""
        lines.append(f"Status: \t\t{data['status']}{error}")
    if data.get("error-where"):
        lines.append(f"Failed in: \t\t{data['error-where']}")
    if "running" in data:
        way = "running" if data["running"] else "stopped"
        reason = f" ({data['fallback']})" if data.get("fallback") else ""
        lines.append(f"Guest in the exec: \t{way}{reason}")
    if data.get("note"):
        lines.append(f"Note: \t\t\t{data['note']}")
    times = [
        f"{label}={data[name]}"
        for label, name in (
            ("total", "total-time"),
            ("setup", "setup-time"),
            ("exp_down", "expected-downtime"),
            ("down", "downtime"),
        )
        if name in data
    ]
    if times:
        lines.append(f"Time (ms): \t\t{', '.join(times)}")
    for cpu in data.get("cpu-pauses", []):
        move, takeover = cpu["move-us"], cpu["takeover-us"]
        lines.append(f"vCPU {cpu['cpu']} stood (us): \tmove={move:.0f}, takeover={takeover:.0f}")
    if "device-stall" in data:
        lines.append(f"Devices stood (ms): \t{data['device-stall']:.1f}")
    if "refault" in data:
        pages, huge, ms = (data["refault"][key] for key in ("pages", "huge", "ms"))
        text = f"{pages} pages mapped again, {huge} of them huge"
        lines.append(f"Memory slow for (ms): \t{ms:.0f} ({text})")
    return "".join(f"{line}\n" for line in lines)


def migrate_globals(only_migratable: bool) -> str:
    """Return what ``info migrate -a`` adds."""
    return (
        "Globals:\n"
        "  store-global-state: on\n"
        f"  only-migratable: {switch(only_migratable)}\n"
        "  send-configuration: on\n"
        "  send-section-footer: on\n"
        "  send-switchover-start: on\n"
        "  clear-bitmap-shift: 18\n"
    )


def switch(value: bool) -> str:
    """Return ``on`` or ``off``."""
    return "on" if value else "off"


# --- memory ------------------------------------------------------------------------------------


def number(value: int, kind: str, size: int = 8) -> str:
    """Return one value as ``print`` shows it; ``value`` is signed."""
    unsigned = value & ((1 << 8 * size) - 1)
    if kind == "c":
        return character(unsigned & 0xFF)
    if kind == "d":
        return str(value)
    if kind == "o":
        return f"0{unsigned:o}" if unsigned else "0"
    return f"{unsigned:#x}" if kind == "x" and unsigned else str(unsigned)


def character(value: int) -> str:
    """Return a byte as a C character constant."""
    special = {39: "\\'", 92: "\\\\", 10: "\\n", 13: "\\r"}
    if 32 <= value <= 126 or value in special:
        return f"'{special.get(value, chr(value))}'"
    return f"'\\x{value:02x}'"


def dump(address: int, data: bytes, kind: str, size: int, digits: int) -> str:
    """Return the text of ``x`` and ``xp``.

    :param size: bytes of one item, 1, 2, 4 or 8; a last item that is not complete is left out
    :param digits: width of the addresses
    """
    per_line = 8 if size == 1 else 16
    lines = []
    for start in range(0, len(data) - size + 1, per_line):
        where = (address + start) & ((1 << 64) - 1)
        items = [
            _item(int.from_bytes(data[at : at + size], "little"), kind, size)
            for at in range(start, min(start + per_line, len(data) - size + 1), size)
        ]
        lines.append(f"{where:0{digits}x}: {' '.join(items)}\n")
    return "".join(lines)


def _item(value: int, kind: str, size: int) -> str:
    bits = 8 * size
    if kind == "c":
        return character(value & 0xFF)
    if kind == "x":
        return f"0x{value:0{bits // 4}x}"
    if kind == "o":
        return f"{'0' + format(value, 'o') if value else '0':>{(bits + 2) // 3}}"
    if kind == "d":
        value = (value ^ 1 << bits - 1) - (1 << bits - 1)
    return f"{value:>{(bits * 10 + 32) // 33}}"


# --- registers ---------------------------------------------------------------------------------

_ROWS = (
    ("rax", "rbx", "rcx", "rdx"),
    ("rsi", "rdi", "rbp", "rsp"),
    ("r8", "r9", "r10", "r11"),
    ("r12", "r13", "r14", "r15"),
)
_SYSTEM_TYPES = {
    1: "TSS16-avl", 2: "LDT", 3: "TSS16-busy", 4: "CallGate16", 5: "TaskGate", 6: "IntGate16",
    7: "TrapGate16", 9: "TSS32-avl", 11: "TSS32-busy", 12: "CallGate32", 14: "IntGate32",
    15: "TrapGate32",
}  # fmt: skip
_SYSTEM_TYPES_64 = {
    2: "LDT", 9: "TSS64-avl", 11: "TSS64-busy", 12: "CallGate64", 14: "IntGate64",
    15: "TrapGate64",
}  # fmt: skip
_EFER_LMA = 1 << 10


def registers(data: Data) -> str:
    """Return the text of ``info registers`` for one vCPU: the 64-bit layout in 64-bit code, else
    the 32-bit one."""
    lma = bool(data["efer"] & _EFER_LMA)
    lines = ["", f"CPU#{data['cpu-index']}", *_general(data, lma and bool(data["cs"]["l"]))]
    width = 16 if lma else 8
    segments = ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr")
    lines += [_segment(name, data[name], lma, width) for name in segments]
    for name in ("gdt", "idt"):
        table = data[name]
        lines.append(f"{name.upper()}=     {table['base']:0{width}x} {table['limit']:08x}")
    lines.append(
        f"CR0={data['cr0']:08x} CR2={data['cr2']:0{width}x}"
        f" CR3={data['cr3']:0{width}x} CR4={data['cr4']:08x}"
    )
    lines.append(" ".join(f"DR{n}={data[f'dr{n}']:016x}" for n in range(4)) + " ")
    lines.append(f"DR6={data['dr6']:016x} DR7={data['dr7']:016x}")
    lines.append(f"EFER={data['efer']:016x}")
    lines += _floating(bytes.fromhex(data["xsave"]), 16 if lma and data["cs"]["l"] else 8)
    return "\n".join(lines) + "\n"


def _general(data: Data, long: bool) -> Iterable[str]:
    flags = data["rflags"]
    letters = "".join(
        letter if flags >> bit & 1 else "-"
        for letter, bit in zip("DOSZAPC", (10, 11, 7, 6, 4, 2, 0), strict=True)
    )
    for row in _ROWS if long else _ROWS[:2]:
        if long:
            yield " ".join(f"{name.upper():<3}={data[name]:016x}" for name in row)
        else:
            yield " ".join(f"E{name[1:].upper()}={data[name] & 0xFFFFFFFF:08x}" for name in row)
    where = f"RIP={data['rip']:016x} RFL=" if long else f"EIP={data['rip'] & 0xFFFFFFFF:08x} EFL="
    # The descriptor privilege level of SS is the processor's own (SDM volume 3, 5.5).
    yield (
        f"{where}{flags:08x} [{letters}] CPL={data['ss']['dpl']} II=0 A20=1 SMM=0"
        f" HLT={int(data['halted'])}"
    )


def _segment(name: str, segment: Data, lma: bool, width: int) -> str:
    kind, code = segment["type"], segment["type"] & 8
    attributes = (
        kind << 8
        | segment["s"] << 12
        | segment["dpl"] << 13
        | segment["present"] << 15
        | segment["avl"] << 20
        | segment["l"] << 21
        | segment["db"] << 22
        | segment["g"] << 23
    )
    text = f"{name.upper():<3}={segment['selector']:04x}"
    text += f" {segment['base']:0{width}x} {segment['limit']:08x} {attributes:08x}"
    if segment["unusable"] or not segment["present"]:
        return text
    text += f" DPL={segment['dpl']} "
    if not segment["s"]:
        return text + (_SYSTEM_TYPES_64 if lma else _SYSTEM_TYPES).get(kind, "Reserved")
    if code:
        text += "CS64" if segment["l"] else "CS32" if segment["db"] else "CS16"
        return f"{text} [{'C' if kind & 4 else '-'}{'R' if kind & 2 else '-'}{_accessed(kind)}]"
    text += "DS  " if segment["db"] or lma else "DS16"
    return f"{text} [{'E' if kind & 4 else '-'}{'W' if kind & 2 else '-'}{_accessed(kind)}]"


def _accessed(kind: int) -> str:
    return "A" if kind & 1 else "-"


def _floating(area: bytes, xmm_count: int) -> Iterable[str]:
    # FXSAVE layout (SDM volume 1, table 10-2). FTW there has a one for each register in use.
    def word(at: int, size: int) -> int:
        return int.from_bytes(area[at : at + size], "little")

    fsw = word(2, 2)
    yield (
        f"FCW={word(0, 2):04x} FSW={fsw & 0xC7FF:04x} [ST={fsw >> 11 & 7}]"
        f" FTW={word(4, 1):02x} MXCSR={word(24, 4):08x}"
    )
    fpr = [f"FPR{n}={word(32 + 16 * n, 8):016x} {word(40 + 16 * n, 2):04x}" for n in range(8)]
    xmm = [
        f"XMM{n:02}={word(168 + 16 * n, 8):016x} {word(160 + 16 * n, 8):016x}"
        for n in range(xmm_count)
    ]
    for row in (fpr, xmm):
        yield from (f"{left} {right}" for left, right in zip(row[::2], row[1::2], strict=True))
