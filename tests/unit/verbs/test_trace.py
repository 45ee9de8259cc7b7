"""What ``pyvmm update --trace`` writes: lanes, Chrome trace events, the picture, the file."""

import json
import os
import re
from xml.etree import ElementTree

import pytest
from harness import run_cli

from pyvmm.errors import ConfigError, HostError
from pyvmm.verbs import picture
from pyvmm.verbs.timeline import Lane, Span, lanes
from pyvmm.verbs.trace import TraceFile, events, render

SVG = "{http://www.w3.org/2000/svg}"


def entry(name, begin, end, cpu=None):
    """One of query-migrate's ``timeline``."""
    return {"name": name, "begin-us": begin, "end-us": end} | ({} if cpu is None else {"cpu": cpu})


STEPS = [entry("preflight", 0.0, 150e3), entry("stop", 150e3, 160e3), entry("load", 160e3, 200e3)]


def running(cpus):
    """The timeline of an update that the guest ran through."""
    of_cpus = (
        (
            entry("takeover", 199e3, 199.3e3 + cpu, cpu),
            entry("move", 155e3 + cpu, 155.02e3 + cpu, cpu),
            entry("carried", 155.02e3 + cpu, 199e3, cpu),
        )
        for cpu in range(cpus)
    )
    return [*STEPS, *(one for entries in of_cpus for one in entries)]


def test_a_vcpu_runs_when_nothing_else_is_said_of_it():
    main, first, second = lanes(running(2))
    assert main == Lane("main", [Span(*one.values()) for one in STEPS])
    assert first == Lane(
        "vCPU 0",
        [
            Span("running", 0, 155e3),
            Span("moving", 155e3, 155.02e3),
            Span("carried", 155.02e3, 199e3),
            Span("stopped", 199e3, 199.3e3),
            Span("running", 199.3e3, 200e3),
        ],
    )
    assert second.name == "vCPU 1"
    for lane in (first, second):
        for span, following in zip(lane.spans, lane.spans[1:], strict=False):
            assert span.end == following.begin


def test_all_vcpus_stand_from_the_stop_on_in_an_update_that_stops_the_guest():
    _, vcpus = lanes(STEPS)
    assert vcpus == Lane("all vCPUs", [Span("running", 0, 150e3), Span("stopped", 150e3, 200e3)])


def test_a_timeline_may_have_names_that_are_new_or_nothing_in_it():
    *_, vcpu = lanes([*STEPS, entry("dancing", 10, 20, 3)])
    assert vcpu.name == "vCPU 3"
    assert [span.name for span in vcpu.spans] == ["running", "dancing", "running"]
    assert lanes([]) == [Lane("main", []), Lane("all vCPUs", [])]
    assert "<svg" in picture.draw("nothing", lanes([]))


def test_events_are_chrome_trace_events():
    found = json.loads(render("trace.json", "web", 42, running(2)))
    assert found == events("web", 42, running(2))
    named = [one for one in found["traceEvents"] if one["ph"] == "M"]
    assert [
        (one["name"], one["tid"], one["args"]["name"]) for one in named if "name" in one["args"]
    ] == [
        ("process_name", 0, "web"),
        ("thread_name", 0, "main"),
        ("thread_name", 1, "vCPU 0"),
        ("thread_name", 2, "vCPU 1"),
    ]
    spans = [one for one in found["traceEvents"] if one["ph"] == "X"]
    assert len(spans) + len(named) == len(found["traceEvents"])
    assert {one["pid"] for one in found["traceEvents"]} == {42}
    stopped = [one for one in spans if one["name"] == "stopped"]
    assert [(one["tid"], one["ts"], one["dur"]) for one in stopped] == [
        (1, 199e3, 300),
        (2, 199e3, 301),
    ]


def bars(text, name):
    """Widths of the bars of that name."""
    found = [
        float(bar.get("width"))
        for bar in ElementTree.fromstring(text).iter(f"{SVG}rect")
        if (title := bar.find(f"{SVG}title")) is not None and title.text.startswith(f"{name},")
    ]
    assert found
    return found


@pytest.mark.parametrize("cpus", [1, 16, 62])
def test_a_takeover_is_seen_though_it_is_a_thousandth_of_the_update(cpus):
    text = render("trace.SVG", "web", 42, running(cpus))
    stopped = bars(text, "stopped")
    # In the whole update a line, in the second picture of it most of the width.
    assert len(stopped) == 2 * cpus
    assert min(stopped[:cpus]) >= 1
    assert min(stopped[cpus:]) > 400
    assert max(bars(text, "moving")[cpus:]) > (400 if cpus == 1 else 100)
    assert len(bars(text, "preflight")) == 1
    shown = [one.text for one in ElementTree.fromstring(text).iter(f"{SVG}text")]
    assert f"vCPUs stand: {0.3 + (cpus - 1) / 1000:.3f} ms at the longest" in shown
    for word in ("running", "moving", "carried", "stopped", "main", "vCPU 0", "load 40.0 ms"):
        assert word in shown


def test_a_picture_is_whole_in_itself_and_readable_in_light_and_dark():
    text = picture.draw('<a & "b">', lanes(running(1)))
    root = ElementTree.fromstring(text)
    assert root.find(f"{SVG}title").text == '<a & "b">'
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"(href|url\(|@import|<script)", text)
    assert text.count("http") == 1  # the namespace
    width, height = float(root.get("width")), float(root.get("height"))
    for bar in root.iter(f"{SVG}rect"):
        right = float(bar.get("x", 0)) + float(bar.get("width"))
        below = float(bar.get("y", 0)) + float(bar.get("height"))
        assert right <= width
        assert below <= height


def test_an_axis_has_round_numbers_in_ms():
    text = picture.draw("web", lanes(running(1)))
    ticks = [one.text for one in ElementTree.fromstring(text).iter(f"{SVG}text")]
    for tick in ("0", "50", "200", "0.000", "0.020", "0.0", "0.2"):
        assert tick in ticks


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere/trace.svg", "No such file or directory"),
        (".", "Is a directory"),
        ("", "No such file or directory"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_of_at_once(tmp_path, monkeypatch, path, reason):
    monkeypatch.chdir(tmp_path)
    mend = "name a file in a directory that you may write to"
    with pytest.raises(ConfigError) as caught:
        TraceFile(path)
    assert str(caught.value) == f"--trace {path}: {reason}; {mend}"
    assert list(tmp_path.iterdir()) == []


def test_a_file_stays_as_it_is_until_there_is_a_trace(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("x" * 100_000)
    for path in (old, new):
        with TraceFile(str(path)):
            assert path.exists()
    assert (old.stat().st_size, new.exists()) == (100_000, False)
    for path in (old, new):
        with TraceFile(str(path)) as file:
            file.write("web", 42, STEPS)
        assert json.loads(path.read_text()) == events("web", 42, STEPS)


def test_a_full_disk_is_told_of():
    with TraceFile("/dev/full") as file, pytest.raises(HostError) as caught:
        file.write("web", 42, STEPS)
    assert str(caught.value) == ("--trace /dev/full: No space left on device; it is incomplete")
    assert os.path.exists("/dev/full")


def test_wrong_file_is_found_before_the_vm_is_looked_for(tmp_path):
    done = run_cli("update", "--trace", "/nowhere/t.svg", "vm", XDG_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "pyvmm: --trace /nowhere/t.svg: No such file or directory; "
        "name a file in a directory that you may write to\n"
    )
    assert "--trace FILE" in run_cli("update", "--help").stdout
