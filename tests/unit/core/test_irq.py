from pyvmm.core.irq import IrqLine
from pyvmm.testing.fake_irq import FakeIrq


def test_only_changes_are_delivered():
    seen = []
    line = IrqLine(4, lambda *change: seen.append(change))
    for level in (False, True, True, False, False, True):
        line.set_level(level)
    assert seen == [(4, True), (4, False), (4, True)]


def test_restored_level_is_not_delivered_again():
    line = FakeIrq(9)
    line.restore_level(True)
    line.set_level(True)
    assert (line.number, line.level, line.changes) == (9, True, [])
    line.set_level(False)
    line.set_level(True)
    assert (line.changes, line.edges) == ([False, True], 1)
