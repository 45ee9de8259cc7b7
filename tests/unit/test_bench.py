"""What the benchmarks compute, apart from what they measure."""

import importlib
import json
import os
import stat
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
MODULES = ("boards", "memory", "pause", "poller", "report", "vmm")

SMAPS = """\
7f00-7f01 rw-s 00000000 00:01 17        /memfd:pc.ram (deleted)
Size:               2048 kB
Rss:                2048 kB
Pss:                2048 kB
7f01-7f02 r--p 00000000 08:01 99        /usr/bin/python3
Rss:                1024 kB
Pss:                 512 kB
7f02-7f03 rw-p 00000000 00:00 0
Rss:                1024 kB
Pss:                1024 kB
"""


@pytest.fixture
def bench(monkeypatch):
    """The modules of tests/bench, which run as a program with that folder as their path."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


def test_longest_gap_is_the_one_that_overlaps(bench):
    gaps = [(0, 9_000_000), (20_000_000, 25_000_000), (26_000_000, 27_000_000)]
    longest = bench("poller").longest
    assert longest(gaps, 10_000_000, 30_000_000) == 5
    assert longest(gaps, 24_000_000, 30_000_000) == 5
    assert longest(gaps, 25_000_000, 30_000_000) == 1
    assert longest(gaps, 10_000_000, 11_000_000) == 0.2


def test_guest_ram_is_not_counted(bench):
    assert bench("memory").beside_ram(SMAPS) == {"Pss": 1.5, "Rss": 2.0}


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", (7, 2)),
        ("QEMU emulator version 10.2.0", (10, 2)),
        ("QEMU emulator version 11.1.3", (11, 1)),
        ("something else", (0, 0)),
    ],
)
def test_qemu_version(bench, tmp_path, monkeypatch, says, version):
    program = tmp_path / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    pause = bench("pause")
    assert pause.qemu_version(str(program)) == version
    if version < (10, 2):
        (row,) = pause.bench_qemu(1, True)
        assert (row.samples, row.note) == ([], "qemu: not found or older than 10.2")


def test_no_qemu(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (row,) = bench("pause").bench_qemu(1, True)
    assert row.note == "qemu: not found or older than 10.2"


def test_table_and_json_say_what_was_met(bench, tmp_path):
    report = bench("report")
    results = [
        report.Result("good", [1.0, 2.0, 9.0], "ms", limit=2.0),
        report.Result("bad", [3.0], "ms", limit=2.0),
        report.Result("plain", [3.0, 4.0], "us"),
        report.Result("absent", [], "ms", limit=2.0, note="left out"),
    ]
    good, bad, plain, absent, note = report.table(results, colour=False).splitlines()[1:]
    assert good.split() == "good ms 3 2.00 1.20 7.60 1.00 9.00 <= 2.00 pass".split()
    assert bad.endswith("FAIL")
    assert plain.split() == "plain us 2 3.50 3.10 3.90 3.00 4.00".split()
    assert absent.split() == "absent ms 0 <= 2.00".split()
    assert note.strip() == "left out"
    assert "\x1b[31mFAIL" in report.table(results, colour=True)
    report.write_json(tmp_path / "out.json", report.host(), results)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [one["pass"] for one in written["results"]] == [True, False, None, None]
    assert written["results"][0]["samples"] == [1.0, 2.0, 9.0]


def test_programs_fit_the_reset_vector_and_jump_to_their_start(bench):
    boards = bench("boards")
    for code in (boards.HELLO, boards.exit_loop(0xEE), boards.exit_loop(0xEC)):
        assert len(code) <= 16
        assert boards.rom(code)[-16:].startswith(code)
    loop = boards.exit_loop(0xEE)
    assert len(loop) + int.from_bytes(loop[-1:], "little", signed=True) == 0


def test_stream_reads_in_order_through_escapes(bench):
    vmm = bench("vmm")
    read_fd, write_fd = os.pipe()
    stream = vmm.Stream(read_fd)
    os.write(write_fd, b"\x1b[1mready\x1b[0m 1\r\n(pyvmm) ready 2\r\n")
    assert stream.expect(r"ready (\d)")[1] == "1"
    assert stream.expect(r"ready (\d)")[1] == "2"
    with pytest.raises(vmm.BenchError, match="no 'ready'"):
        stream.expect("ready", timeout=0)
    os.close(write_fd)
    with pytest.raises(vmm.Closed):
        stream.expect("ready")
    stream.close()
