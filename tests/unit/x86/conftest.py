import pytest

from pyvmm.testing.images import guest_memory
from pyvmm.x86.hardware import Hardware, PciHardware


@pytest.fixture
def memory():
    memory = guest_memory(16 << 20)
    memory.fill(0, 0xA0000, 0xEE)
    return memory


PCI = PciHardware(
    0xE0000000,
    (0xC000, 0x10000),
    [(0xC0000000, 0xE0000000), (0x10_0000_0000, 0x20_0000_0000)],
    [(1, 11), (2, 5), (5, 11)],
)


@pytest.fixture
def hardware():
    """Makes a :class:`Hardware` with a bit of everything, and with PCI if that is asked for."""

    def make(cpus=2, virtio=3, pci=False):
        return Hardware(
            cpus,
            pm1_base=0x600,
            sci=9,
            serials=[(0x3F8, 8, 4), (0x2F8, 8, 3)],
            virtio_mmio=[(0xFEB00000 + 0x200 * i, 0x200, 5 + i % 19) for i in range(virtio)],
            pvpanic=0x505,
            pci=PCI if pci else None,
            has_fw_cfg=True,
        )

    return make
