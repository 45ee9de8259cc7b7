import pytest

from pyvmm.testing.images import guest_memory
from pyvmm.x86.hardware import Hardware


@pytest.fixture
def memory():
    memory = guest_memory(16 << 20)
    memory.fill(0, 0xA0000, 0xEE)
    return memory


@pytest.fixture
def hardware():
    """Makes a :class:`Hardware` with a bit of everything."""

    def make(cpus=2, virtio=3):
        return Hardware(
            cpus,
            pm1_base=0x600,
            sci=9,
            serials=[(0x3F8, 8, 4), (0x2F8, 8, 3)],
            virtio_mmio=[(0xFEB00000 + 0x200 * i, 0x200, 5 + i % 19) for i in range(virtio)],
            pvpanic=0x505,
            has_fw_cfg=True,
        )

    return make
