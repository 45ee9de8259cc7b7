"""``pyvmm state check``: would a machine of these options take this state?

The loader stops at the first thing that does not fit; here all of them are looked for, and
the loader has the last word.
"""

from __future__ import annotations

from collections import Counter

from pyvmm.errors import VmStateError
from pyvmm.machine import builder, shape
from pyvmm.machine.config import MACHINE_TYPE, MachineConfig
from pyvmm.migration import savevm
from pyvmm.state.outline import Outline
from pyvmm.vmstate import stream
from pyvmm.vmstate.cursor import Cursor

#: The options that decide how many there are of a section.
_MENDS = {"kvm-vcpu": "-smp", "serial": "-serial"}


def reasons(data: bytes, config: MachineConfig) -> list[str]:
    """Return why the state would be refused, one line each; none if it would be taken."""
    own = shape.descriptions(config) | {(savevm.GLOBALSTATE.name, 0): savevm.GLOBALSTATE}
    former = shape.former_names(config)
    try:
        outline = Outline(data)
    except VmStateError as error:
        return [str(error)]
    found = []
    if outline.machine != MACHINE_TYPE:
        found.append(f"the state is of a {outline.machine} machine, this one is {MACHINE_TYPE}")
    used = {(part.name, part.instance) for part in outline.parts}
    own |= {key: one for key, one in shape.optional_descriptions().items() if key in used}
    known = dict(own)
    found += _block_reasons(outline.blocks, config)
    found += _count_reasons(
        Counter(part.device for part in outline.parts),
        Counter(name.rpartition("/")[2] for name, _ in known),
    )
    for part in outline.parts:
        key = part.name, part.instance
        description = known.pop(former.get(key, key), None)
        if description is None:
            continue  # counted above
        source = Cursor(data[part.start : part.end])
        source.path.append(part.key)
        try:
            description.load(source, part.version)
            left = len(source.data) - source.at
            if left:
                raise source.error(f"{left} bytes more than version {part.version} has")
        except VmStateError as error:
            found.append(str(error))
    if outline.problem:
        found.append(outline.problem)
    if not found:
        try:
            stream.read(data, own, MACHINE_TYPE, former)
        except VmStateError as error:
            found.append(str(error))
    return found


def _count_reasons(state: Counter[str], machine: Counter[str]) -> list[str]:
    return [
        f"{name}: the state has {state[name] or 'none'}, this machine {machine[name] or 'none'}"
        + (f"; make {_MENDS[name]} equal" if name in _MENDS else "")
        for name in dict.fromkeys([*machine, *state])
        if state[name] != machine[name]
    ]


def _block_reasons(blocks: stream.Blocks, config: MachineConfig) -> list[str]:
    # The order counts, too. Of the ROM only the name is known: its size comes with it.
    own = [(builder.block_name(config, block.id), block.size) for block in config.objects]
    if not config.memory_backend:
        own.append((builder.RAM_BLOCK, config.memory_size))
    own.append((builder.ROM_BLOCK, 0))
    found = []
    if [name for name, _ in blocks] != [name for name, _ in own]:
        found.append(
            f"ram: the state has the blocks {_names(blocks)}, this machine {_names(own)}; "
            "make -object equal"
        )
    sizes = dict(own)
    for name, size in blocks:
        if sizes.get(name, 0) not in (0, size):
            found.append(
                f"ram/{name}: {size} bytes in the state, {sizes[name]} in this machine; "
                "make -m and -object equal"
            )
    return found


def _names(blocks: stream.Blocks) -> str:
    return ", ".join(name for name, _ in blocks) or "(none)"
