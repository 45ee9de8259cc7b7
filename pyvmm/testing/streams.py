"""Makes state streams without KVM: every section that a machine writes, with invented values."""

from __future__ import annotations

from pyvmm.core import runstate
from pyvmm.machine import builder, options, shape
from pyvmm.machine.config import MACHINE_TYPE, MachineConfig
from pyvmm.migration import savevm
from pyvmm.vmstate import stream
from pyvmm.vmstate.fields import (
    Array,
    Buffer,
    CStruct,
    Description,
    Field,
    Record,
    Struct,
    StructArray,
    Table,
)
from pyvmm.vmstate.section import Section

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Descriptions = dict[tuple[str, int], Description]

# Counts that the descriptions leave open, large enough to have a meaning.
COUNTS = {"xsave_size": 576, "nr_xcrs": 1, "nmsrs": 3, "nent": 2}
ROM_SIZE = 64 << 10


def machine_config(*arguments: str) -> MachineConfig:
    """Return a machine with a serial port, what ``arguments`` add, and nothing else."""
    return options.parse(["-serial", "null", *arguments])


def descriptions(config: MachineConfig) -> Descriptions:
    """Return the descriptions of what the machine writes, by section and instance."""
    return shape.descriptions(config) | {(savevm.GLOBALSTATE.name, 0): savevm.GLOBALSTATE}


def record(description: Description, seed: int = 0) -> Record:
    """Return a record that the description accepts: zeros, or numbers that count up from ``seed``
    where they need not mean anything."""
    found = Record()
    for field in description.fields:
        setattr(found, field.name, _value(field, found, seed))
    if description is savevm.GLOBALSTATE:
        found.size = len(runstate.RUNNING) + 1
        found.runstate = runstate.RUNNING.encode().ljust(32, b"\0")
    if hasattr(found, "msrs"):
        found.msrs = []
        for number in range(found.nmsrs):
            found.msrs += [(0x10, 0x277, 0x12345)[number % 3] + number // 3, seed + number]
    for part in description.subsections:
        # Kept apart, so that predicates find what they look at.
        found.__dict__.update(record(part, seed).__dict__)
    return found


def make(
    config: MachineConfig,
    *,
    described: bool = False,
    seed: int = 0,
    own: Descriptions | None = None,
    machine: str = MACHINE_TYPE,
) -> bytes:
    """Return the stream of a machine.

    :param described: whether the JSON description is there
    :param own: other sections than the machine's
    """
    blocks = [(builder.block_name(config, block.id), block.size) for block in config.objects]
    if not config.memory_backend:
        blocks.append((builder.RAM_BLOCK, config.memory_size))
    blocks.append((builder.ROM_BLOCK, ROM_SIZE))
    sections = descriptions(config) if own is None else own
    writer = stream.Writer(machine, blocks)
    for (name, instance), description in sections.items():
        state = record(description, seed)
        writer.add(
            Section(name, instance, description, lambda state=state: state, lambda _: None)  # type: ignore[misc]
        )
    data = writer.finish()
    return data + (describe(data, sections) if described else b"")


def describe(data: bytes, sections: Descriptions) -> bytes:
    """Return the description of a stream."""
    loaded = stream.read(data, sections)
    return stream.describe(loaded, sections)


def _value(field: Field, found: Record, seed: int) -> Any:
    if isinstance(field, Array):
        return [0] * field.count
    if isinstance(field, Buffer):
        return bytes(_size(field, found))
    if isinstance(field, CStruct):
        return field.make()
    if isinstance(field, Struct):
        return record(field.inner, seed)
    if isinstance(field, Table):
        return [0] * (_size(field, found) * len(field.inner.fields))
    if isinstance(field, StructArray):
        return [record(field.inner, seed) for _ in range(_size(field, found))]
    return COUNTS.get(field.name, 0)


def _size(field: Buffer | StructArray, found: Record) -> int:
    return field.size if isinstance(field.size, int) else int(getattr(found, field.size))
