"""Which registers are a vCPU's state."""

from pyvmm.x86 import msrs


class Vcpu:
    """One that has only the registers given."""

    def __init__(self, **values):
        self.values = {int(name[1:], 16): value for name, value in values.items()}

    def get_msrs(self, indices):
        return {index: self.values[index] for index in indices if index in self.values}


def test_branch_records_are_not_offered():
    assert msrs.at_power_on(Vcpu(x345=0x5_20C5)) == {0x2FF: 0x806, 0x345: 0x5_20C0}
    assert msrs.at_power_on(Vcpu(x345=0x2000)) == {0x2FF: 0x806}
    assert msrs.at_power_on(Vcpu()) == {0x2FF: 0x806}


def test_nothing_is_read_twice():
    found = msrs.carried([0x10, 0x1D9, 0x11, 0x400, 0x277, 0x40000021, 0x4B564D07])
    assert len(set(found)) == len(found)
    assert found[:4] == [0x10, 0x1D9, 0x400, 0x277]
    assert not {0x11, 0x40000021, 0x4B564D07} & set(found)
