"""A short run of ``make soak``."""

import pytest
import soak


@pytest.mark.slow
def test_sixty_updates(tmp_path):
    rows = []
    with soak.vm(tmp_path, smp=2) as machine:
        pauses = soak.soak(machine, 60, rows.append)
        assert machine.status == "running"
    assert len(pauses) == 60
    assert all(pause > 0 for pause in pauses)
    assert len(rows) == soak.SAMPLES
    assert len({row["fds"] for row in rows}) == 1
    assert rows[-1]["lines"] > rows[0]["lines"]


def test_gap_is_found():
    class Machine:
        serial = bytearray(b"program\r\ntick 1\r\ntick 2\r\ntick 4\r\n")

    with pytest.raises(soak.SoakError, match="gap"):
        soak.check_numbers(Machine)
    Machine.serial[-3:] = b"3\r\n"
    assert soak.check_numbers(Machine) == 3


def test_percentile():
    assert soak.percentile(range(1, 101), 50) == 51
    assert soak.percentile(range(1, 101), 99) == 100
    assert soak.percentile([7], 99) == 7
