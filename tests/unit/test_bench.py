"""What the benchmarks compute, apart from what they measure."""

import json
import os
import stat
import sys

import pytest
from bench import compare, move, pause, report, startup
from bench.machines import BenchError
from bench.memory import beside_ram
from bench.plan import Plan, cpu_counts
from bench.poller import longest
from bench.spawn import first_output
from harness.versions import Version

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


def test_longest_gap_is_the_one_that_overlaps():
    gaps = [(0, 9_000_000), (20_000_000, 25_000_000), (26_000_000, 27_000_000)]
    assert longest(gaps, 10_000_000, 30_000_000) == 5
    assert longest(gaps, 24_000_000, 30_000_000) == 5
    assert longest(gaps, 25_000_000, 30_000_000) == 1
    assert longest(gaps, 10_000_000, 11_000_000) == 0.2


def test_guest_ram_is_not_counted():
    assert beside_ram(SMAPS) == {"Pss": 1.5, "Rss": 2.0}


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", (7, 2)),
        ("QEMU emulator version 10.2.0", (10, 2)),
        ("QEMU emulator version 11.1.3", (11, 1)),
        ("something else", (0, 0)),
    ],
)
def test_qemu_version(tmp_path, monkeypatch, says, version):
    program = tmp_path / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert pause.qemu_version(str(program)) == version
    if version < (10, 2):
        (row,) = pause.bench_qemu(Plan(1))
        assert (row.samples, row.note) == ([], "qemu: not found or older than 10.2")


def test_no_qemu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (row,) = pause.bench_qemu(Plan(1))
    assert row.note == "qemu: not found or older than 10.2"


def test_table_and_json_say_what_was_met(tmp_path):
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


def test_programs_fit_the_reset_vector_and_jump_to_their_start():
    for code in (startup.HELLO, startup.exit_loop(0xEE), startup.exit_loop(0xEC)):
        assert len(code) <= 16
        assert startup.rom(code)[-16:].startswith(code)
    loop = startup.exit_loop(0xEE)
    assert len(loop) + int.from_bytes(loop[-1:], "little", signed=True) == 0


def test_output_is_waited_for_and_the_command_ended():
    code = "import os, time; os.write(1, b'one '); os.write(2, b'two\\0'); time.sleep(60)"
    command = [sys.executable, "-I", "-S", "-c", code]
    seconds, output = first_output(command, b"\0", errors=True)
    assert output == b"one two\0"
    assert 0 < seconds < 60
    assert first_output(command, errors=False)[1] == b"one "
    with pytest.raises(BenchError, match="no b'two' within 0 s"):
        first_output(command, b"two", 0)
    with pytest.raises(BenchError, match=r"ended without b'two': b'one '"):
        first_output([*command[:-1], "print('one ', end='')"], b"two")


def test_imported_modules_are_counted():
    command = [sys.executable, "-S", "-c"]
    code = "import os, {}; os.write(1, b'\\0'); import json"
    counts = [startup.imports([*command, code.format(modules)]) for modules in ("os", "os, bisect")]
    assert counts[1] - counts[0] == 2  # bisect and _bisect


def test_counts_of_vcpus():
    assert cpu_counts("1,8,62") == (1, 8, 62)
    for nonsense in ("", "0", "1,,2", "x", "-1"):
        with pytest.raises(ValueError, match="vCPUs"):
            cpu_counts(nonsense)


def test_versions_are_measured_in_turns():
    """As many samples of each, in turns that begin with either; then their ratio."""
    own, other = (Version(name, ".", "python", "pyvmm") for name in ("own", "other"))
    turns = []

    def bench(plan):
        turns.append((plan.version.name, plan.runs))
        speed = 1 if plan.version is own else 2
        yield report.Result("it", [speed] * plan.runs, "ms", limit=5, note="of it")
        name = "new" if plan.version is own else "old"
        yield report.Result(name, [7.0] * plan.runs, "ms")
        yield report.Result("large", [], "ms", note="left out")

    rows = list(compare.bench(bench, Plan(12, version=own), other, turn=5))
    assert turns == [
        *[("own", 5), ("other", 5), ("other", 5), ("own", 5), ("own", 2), ("other", 2)],
    ]
    assert [(row.name, row.median, row.unit) for row in rows] == [
        ("it", 1, "ms"),
        ("  other", 2, "ms"),
        ("  own/other", 0.5, "x"),
        ("new", 7.0, "ms"),
        ("large", None, "ms"),
        ("old, only in other", 7.0, "ms"),
    ]
    assert (rows[0].limit, rows[0].note, len(rows[0].samples)) == (5, "of it", 12)
    assert {row.limit for row in rows[1:]} == {None}


def test_what_was_measured_before_a_failure_is_told():
    own, other = (Version(name, ".", "python", "pyvmm") for name in ("own", "other"))

    def bench(plan):
        yield report.Result("it", [1.0], "ms")
        if plan.version is other:
            raise BenchError("why")

    rows = compare.bench(bench, Plan(1, version=own), other, turn=1)
    assert [next(rows).name for _ in range(3)] == ["it", "  other", "  own/other"]
    with pytest.raises(BenchError, match="why"):
        next(rows)


def test_pause_by_vcpus_tells_what_each_costs(monkeypatch):
    monkeypatch.setattr(
        pause,
        "_pause",
        lambda name, _plan, _size, smp: [report.Result(name, [30.0 + 2 * smp], "ms")],
    )
    rows = list(pause.bench_pause(Plan(3, smp=(1, 8, 62))))
    assert [(row.name, row.median) for row in rows] == [
        ("pause memfd 256M, 1 vCPUs", 32.0),
        ("pause memfd 256M, 8 vCPUs", 46.0),
        ("pause memfd 256M, 62 vCPUs", 154.0),
        ("pause, each vCPU up to 8", 2.0),
        ("pause, each vCPU up to 62", 2.0),
    ]


def test_move_counts_the_vcpu_that_stands_still_longest():
    assert move._result("x", 0, "1.0 3.5\n2.5 2.0\n").samples == [3.5, 2.5]
    with pytest.raises(BenchError, match="ended with 3: why"):
        move._result("x", 3, "", "why")
