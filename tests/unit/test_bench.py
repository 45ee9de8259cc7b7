"""What the benchmarks compute, apart from what they measure."""

import json
import mmap
import os
import re
import select
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
from bench import beside, chain, compare, exits, host, move, pause, report, startup, updates
from bench.__main__ import measure
from bench.life import Life
from bench.machines import BenchError, Qemu, QemuDefault, QemuVirtio, Vmm, qemu_version
from bench.memory import beside_ram
from bench.plan import Plan, cpu_counts
from bench.spawn import first_output
from bench.stall import Arrivals
from bench.watcher import Watched, Watcher, longest
from harness import DEADLINE_S
from harness.process import Deadline
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


MS = 1_000_000


def test_gaps_are_those_that_overlap():
    gaps = [(0, 9 * MS, 0), (20 * MS, 25 * MS, 0), (26 * MS, 27 * MS, 0), (28 * MS, 28 * MS + 9, 0)]
    watched = Watched(gaps, [])
    assert watched.standing(10 * MS, 30 * MS) == [5, 1]
    assert watched.standing(24 * MS, 30 * MS) == [5, 1]
    assert watched.standing(25 * MS, 30 * MS) == [1]
    assert watched.standing(10 * MS, 11 * MS) == []
    assert [longest([5, 1]), longest([])] == [5, 0.1]


def test_what_a_late_watcher_missed_is_no_gap():
    """The counter goes at 3 a ns; of 4 ms it was seen at the ends of it was there for 3.5, then for
    all of them."""
    watched = Watched([(0, 4 * MS, 3 * 3_500_000), (9 * MS, 13 * MS, 3 * 4_000_000)], [])
    assert watched.standing(0, 20 * MS, 3) == [0.5]
    assert watched.standing(0, 20 * MS) == [4, 4]


def test_whether_the_counter_moved_to_the_end():
    assert Watched([(0, MS, 0)], []).moves
    assert not Watched([(0, 11 * MS, 0)], []).moves


def test_speed_of_a_counter_and_when_it_is_back():
    """1000 a ms for 50 ms, then 10 for 30, then 960."""
    notes, value = [], 0
    for at in range(200):
        notes.append((at * MS, value))
        value += 1000 if at < 50 else 10 if at < 80 else 960
    watched = Watched([], notes)
    assert watched.speed(10 * MS, 40 * MS) == pytest.approx(1000 / MS)
    assert watched.speed(55 * MS, 75 * MS) == pytest.approx(10 / MS)
    assert watched.speed(300 * MS, 400 * MS) == 0
    # As many of a window's 20 ms were slow as were not when it began at 70.
    assert watched.back_at(50 * MS, 950 / MS, 20 * MS) in (70 * MS, 71 * MS)
    assert watched.back_at(100 * MS, 950 / MS, 20 * MS) == 100 * MS
    assert watched.back_at(50 * MS, 990 / MS, 20 * MS) is None


@pytest.fixture
def counting(tmp_path):
    """A counter in a file that goes on while ``going`` is set; (path, going)."""
    path = tmp_path / "ram"
    path.write_bytes(bytes(2 * mmap.PAGESIZE))
    going, ended = threading.Event(), threading.Event()
    with open(path, "r+b") as file:
        page = mmap.mmap(file.fileno(), mmap.PAGESIZE, offset=mmap.PAGESIZE)

    def work():
        with memoryview(page).cast("Q") as counter:
            while not ended.is_set():
                if going.wait(0.01):
                    counter[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    going.set()
    yield path, going
    ended.set()
    thread.join()
    page.close()


def test_a_counter_that_stands_is_seen_from_another_process(counting):
    path, going = counting
    with Watcher(str(path), mmap.PAGESIZE) as watcher:
        start = time.monotonic_ns()
        going.clear()
        select.select([], [], [], 0.05)
        end = time.monotonic_ns()
        going.set()
        # Until it has been seen to go on.
        select.select([], [], [], 0.05)
        watched = watcher.stop()
    # The counter's thread may do one more increment after the start.
    assert max(watched.standing(start, end)) > 20
    assert watched.notes[0][1] < watched.notes[-1][1]


def test_arrivals_have_gaps_between_them():
    here, there = socket.socketpair()
    with here, there:
        here.settimeout(0.01)
        arrived = threading.Event()

        def receive():
            data = here.recv(100)
            arrived.set()
            return data

        with Arrivals(receive) as arrivals:
            there.send(b"x")
            assert arrived.wait(DEADLINE_S)
            select.select([], [], [], 0.03)
            start = time.monotonic_ns()
            there.send(b"x")
        assert longest(arrivals.watched.standing(0, start)) > 10
        with Arrivals(lambda: here.recv(100)) as arrivals:
            there.shutdown(socket.SHUT_WR)  # it ends by itself
            arrivals._thread.join()
        assert len(arrivals.watched.gaps) == 1


INFOS = [
    {
        "running": True,
        "cpu-pauses": [
            {"cpu": 0, "move-us": 20.0, "takeover-us": 300.0},
            {"cpu": 1, "move-us": 30.0, "takeover-us": 250.0},
        ],
        "device-stall": 31.5,
        "timeline": [{"name": "stop", "begin-us": 0.0, "end-us": 5.0}],
    },
    {"running": False, "fallback": "no room"},
    {},
]


def chained(infos=INFOS, problem=None):
    """Three updates: with gaps of 2 and 1 ms, of 3 ms, of none."""
    gaps = [(110 * MS, 112 * MS, 0), (115 * MS, 116 * MS, 0), (510 * MS, 513 * MS, 0)]
    gaps += [(700 * MS, 701 * MS, 0), (2000 * MS, 2000 * MS, 0)]
    times = [(100 * MS, 150 * MS), (500 * MS, 560 * MS), (710 * MS, 730 * MS)]
    return chain.Chain(Watched(gaps, []), times, infos, problem)


def test_a_chain_of_updates_has_longest_gaps_sums_and_a_floor():
    rows = chained().rows("updates 1M", 1.0, 2.0)
    assert [(row.name, row.samples) for row in rows] == [
        ("updates 1M", [2, 3, 0.1]),
        ("  sum of gaps, 1M", [3, 3, 0]),
        ("  jitter floor, 1M", [0.1, 0.1, 1]),
        ("  command to prompt, 1M", [50, 60, 20]),
    ]
    assert (rows[0].limit, rows[0].tail) == (1.0, 2.0)
    assert rows[0].note == "the guest ran through 1 of 2 execs; 1 times no room"
    assert chained([{}] * 3).ways() == ""


def test_updates_with_what_pyvmm_tells_and_a_picture(tmp_path, monkeypatch):
    asked = []

    def fake(name, plan, runs, size, **_):
        asked.append((name, runs, size >> 20))
        return chained(problem="killed" if size > updates.SMALL else None)

    monkeypatch.setattr(updates, "chain", fake)
    monkeypatch.setattr(updates, "left_out", lambda _plan, _size: None)
    monkeypatch.setattr(updates, "qemu_version", lambda: (0, 0))
    rows = updates.bench_updates(Plan(3, updates=7, pictures=str(tmp_path / "new")))
    found = {}
    with pytest.raises(BenchError, match="killed"):
        found.update((row.name, row) for row in rows)
    assert asked == [("updates 256M", 7, 256), ("updates 8192M", 7, 8192)]
    assert (found["updates 256M"].limit, found["updates 256M"].tail) == (0.5, 2.0)
    assert found["  move, 256M"].samples == [0.03]
    assert found["  takeover, 256M"].samples == [0.3]
    assert found["  without devices, 256M"].samples == [31.5]
    assert found["updates qemu"].note == updates.QEMU_ABSENT
    # What was found before a failure is told.
    assert found["updates 8192M"].samples == [2, 3, 0.1]
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {
        f"update-{size}.{kind}" for size in ("256M", "8192M") for kind in ("svg", "json")
    }
    assert json.loads((tmp_path / "new" / "update-256M.json").read_text())["traceEvents"]
    assert "update 1 of 3: 2.00 ms" in (tmp_path / "new" / "update-256M.svg").read_text()


def test_a_size_that_does_not_fit_is_left_out(monkeypatch):
    assert updates.left_out(Plan(1, quick=True), updates.SMALL) is None
    assert "--quick" in updates.left_out(Plan(1, quick=True), updates.LARGE)
    monkeypatch.setattr(os, "sysconf", lambda _name: 4096)
    assert updates.left_out(Plan(1), updates.LARGE) == "left out: 16 MiB of memory are free"
    monkeypatch.setattr(os, "sysconf", lambda _name: 1 << 20)
    assert updates.left_out(Plan(1), updates.LARGE) is None


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
def test_qemu_version(tmp_path, says, version):
    program = tmp_path / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert qemu_version(str(program)) == version


def test_table_and_json_say_what_was_met(tmp_path):
    results = [
        report.Result("good", [1.0, 2.0, 9.0], "ms", limit=2.0),
        report.Result("bad", [3.0], "ms", limit=2.0),
        report.Result("plain", [3.0, 4.0], "us"),
        report.Result("tailed", [1.0] * 9 + [5.0], "ms", limit=2.0, tail=4.0),
        report.Result("absent", [], "ms", limit=2.0, tail=2.0, note="left out"),
    ]
    good, bad, plain, tailed, absent, note = report.table(results, colour=False).splitlines()[1:]
    assert good.split() == "good ms 3 2.00 1.20 7.60 8.86 <= 2.00 pass".split()
    assert bad.endswith("FAIL")
    assert plain.split() == "plain us 2 3.50 3.10 3.90 3.99".split()
    assert tailed.split()[3:] == "1.00 1.00 1.40 4.64 <= 2.00, p99 <= 4.00 FAIL".split()
    assert absent.split() == "absent ms 0 <= 2.00, p99 <= 2.00".split()
    assert note.strip() == "left out"
    assert "\x1b[31mFAIL" in report.table(results, colour=True)
    report.write_json(tmp_path / "out.json", {"load": (0.5, 1.0)}, results)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["host"] == {"load": [0.5, 1.0]}
    assert [one["pass"] for one in written["results"]] == [True, False, None, False, None]
    assert [one.get("target-p99") for one in written["results"]] == [None, None, None, 4.0, 2.0]
    assert written["results"][0]["p99"] == pytest.approx(8.86)
    assert written["results"][0]["samples"] == [1.0, 2.0, 9.0]


def test_rows_of_one_thing_name_it_once_and_ratios_say_of_what_they_are():
    rows = [
        report.Result("disk: pyvmm", [1.0], "IOPS"),
        report.Result("disk: qemu", [123456.7], "IOPS"),
        report.paired("disk: qemu/pyvmm", [2.0, 6.0], [1.0, 2.0]),
        report.Result("tape: pyvmm", [1.0], "IOPS"),
    ]
    lines = report.table(rows, colour=False).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "disk: pyvmm",
        "",
        "",
        "tape: pyvmm",
        lines[5],
    ]
    assert lines[2].split() == "qemu IOPS 1 123457 123457 123457 123457".split()
    assert lines[3].split() == "qemu/pyvmm x 2 2.50 2.10 2.90 2.99".split()
    assert lines[5] == f"x: {report.UNITS['x']}"


def test_ratio_of_medians_has_the_spread_that_the_samples_give_it():
    steady = report.of_medians("it", [4.0] * 9, [2.0] * 5)
    assert set(steady.samples) == {2.0}
    own, other = [10.0 + n for n in range(20)], [10.0] * 20
    ratio = report.of_medians("it", own, other)
    assert ratio.samples == report.of_medians("it", own, other).samples
    assert ratio.median == pytest.approx(1.95, abs=0.15)
    low, high = (report.percentile(ratio.samples, percent) for percent in (10, 90))
    # Narrower than the samples are, which go from 1.0 to 2.9.
    assert 1.5 < low < ratio.median < high < 2.4


@pytest.mark.parametrize(
    ("text", "value"), [("always [never] madvise\n", "never"), ("performance\n", "performance")]
)
def test_settings_of_the_kernel_are_read(text, value):
    assert host.chosen(text) == value


def test_header_has_a_line_for_each_fact():
    facts = {"load": (0.5, 1.25), "memory": {"a": "memfd", "b": "file"}, "exit, ns": 44000}
    assert report.header(facts).splitlines() == [
        "load      0.50 1.25",
        "memory    a: memfd; b: file",
        "exit, ns  44000",
    ]


def test_what_takes_long_is_said_again(capsys):
    progress = report.Progress()
    progress.repeat(0.01)
    progress.tell("updates")
    deadline = Deadline()
    said = ""
    while said.count("\n") < 3 and not deadline.over:
        said += capsys.readouterr().err
    assert re.match(r"updates\n(updates: \d+ s\n){2}", said)
    progress.tell("")


@pytest.fixture
def qemu(tmp_path, monkeypatch):
    """There is a QEMU, by its name."""
    program = tmp_path / Qemu.program
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


SPEEDS = {Vmm: 2.0, QemuVirtio: 3.0, QemuDefault: 8.0}


def test_qemu_is_measured_with_the_same_memory_and_with_its_own(qemu):
    rows = beside.beside("disk", "MB/s", Plan(2), SPEEDS.get, limit=2.0)
    assert [(row.name, row.samples, row.limit) for row in rows] == [
        ("disk: pyvmm", [2.0, 2.0], None),
        ("disk: qemu", [3.0, 3.0], None),
        ("disk: qemu, own memory", [8.0, 8.0], None),
        ("disk: qemu/pyvmm", [1.5, 1.5], 2.0),
        ("disk: qemu, own memory/pyvmm", [4.0, 4.0], None),
    ]
    quick = beside.beside("trip", "us", Plan(1, quick=True), SPEEDS.get, 1.0, less_is_better=True)
    assert [(row.name, row.samples) for row in quick[2:]] == [("trip: pyvmm/qemu", [2 / 3])]
    with pytest.raises(BenchError, match="disk: qemu did nothing"):
        beside.beside("disk", "MB/s", Plan(1), lambda kind: kind is Vmm, limit=2.0)


def test_pyvmm_is_measured_alone_where_there_is_no_qemu(tmp_path, monkeypatch, qemu):
    (row,) = beside.beside("disk", "MB/s", Plan(1, beside=False), SPEEDS.get)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    (other,) = beside.beside("disk", "MB/s", Plan(1), SPEEDS.get)
    assert row.note == other.note == "no QEMU to compare with"


def test_kinds_of_memory_are_in_qemus_commands():
    memfd = "memory-backend-memfd,id=ram0,size=64M,share=on"
    assert memfd in Qemu.command(64 << 20)
    assert memfd in QemuVirtio.command(64 << 20)
    assert "memory-backend" not in " ".join(QemuDefault.command(64 << 20))
    assert Qemu.memory == QemuVirtio.memory == Vmm.memory != QemuDefault.memory


def test_a_failure_of_any_kind_costs_its_own_rows_alone(capsys):
    def bench(error):
        yield report.Result("before", [1.0], "ms")
        raise error

    late = subprocess.TimeoutExpired("it", 5)
    rows = [*measure("a", bench(late)), *measure("b", bench(BenchError("why")))]
    assert [(row.name, row.note) for row in rows] == [
        ("before", ""),
        ("a", "failed: Command 'it' timed out after 5 seconds"),
        ("before", ""),
        ("b", "failed: why"),
    ]
    assert [row.failed for row in rows] == [False, True, False, True]
    assert capsys.readouterr().err.count("Traceback") == 1  # why needs none


def test_life_of_a_process():
    code = "import time; x = bytearray(50 << 20); time.sleep(0.05); raise SystemExit(3)"
    life = Life.of([sys.executable, "-I", "-S", "-c", code], os.environ)
    assert life.code == 3
    assert life.wall_ms > 50
    assert life.processor_ms > 0
    # Without what this process, its parent's, needs.
    assert 50 < life.peak_mib < 80


def test_an_exit_loop_without_kvm():
    with exits._built() as library:
        for access in (*exits.NATIVE, *exits.PYTHON):
            times = json.loads(exits._run([], library, access, 100, 2).stdout)
            assert len(times) == 2
            assert min(times) > 0


def test_programs_fit_the_reset_vector_and_jump_to_their_start():
    for code in (startup.HELLO, startup.END, exits.exit_loop(0xEE), exits.exit_loop(0xEC)):
        assert len(code) <= 16
        assert startup.rom(code)[-16:].startswith(code)
    loop = exits.exit_loop(0xEE)
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
        ("  own/other", 0.5, report.MEDIANS),
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
