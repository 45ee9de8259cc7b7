"""``pyvmm state``: what it prints, what it exits with, and what hostile files make of it."""

import json
import os
import struct
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm import cli
from pyvmm.cpr import state as cpr_state
from pyvmm.errors import PyvmmError, VmStateError
from pyvmm.state import check, diff, main, registers, show
from pyvmm.state.outline import Outline, find_description
from pyvmm.testing import streams
from pyvmm.vmstate.fields import Buffer, Description, u8, u32, u64

CONFIG = streams.machine_config("-m", "16M", "-smp", "2")
DATA = streams.make(CONFIG, seed=0x1234)
DESCRIBED = streams.make(CONFIG, described=True, seed=0x1234)
PROGRAM = "import sys; from pyvmm.state import main; sys.exit(main(sys.argv[1:]))"
OWN = streams.descriptions(CONFIG)
# A device that this build does not know; one of its bytes looks like the footer's beginning.
FOREIGN = Description(
    "foreign",
    [u32("count"), Buffer("data", 6), u8("last")],
    version=9,
    subsections=[Description("foreign/more", [u64("deep")], version=2)],
)
MIXED = {("serial", 0): OWN[("serial", 0)], ("foreign", 3): FOREIGN, **OWN}


@pytest.fixture
def file(tmp_path):
    """Writes a file and gives its path."""

    def make(data, name="vm.state"):
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return make


def run(capsys, *argv):
    """Exit code, lines and error text of a verb."""
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def tree(lines):
    """Indented lines as (path, text) pairs."""
    found, path = {}, []
    for line in lines[1:]:
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, value = line.strip().partition(": ")
        path[depth:] = [name]
        found["/".join(path)] = value
    return found


@pytest.mark.parametrize("data", [DATA, DESCRIBED])
def test_show_prints_all_sections_with_their_fields(capsys, file, data):
    code, lines, errors = run(capsys, "show", file(data))
    assert (code, errors) == (0, "")
    how = "its own description" if data is DESCRIBED else "what this build knows"
    assert lines[0] == f"state of a pyvmm machine, {len(data)} bytes, by {how}"
    found = tree(lines)
    titles = [path for path in found if "/" not in path]
    assert titles == ["ram"] + [
        f"{name}[{instance}] version {own.version}" for (name, instance), own in OWN.items()
    ]
    assert found["ram/pc.ram"] == "16M"
    assert found["ioapic[0] version 3/ioredtbl"] == "[0 0 0 0 0 0 0 0 ... (24 in all)]"
    msrs = "IA32_TSC=0x1234 IA32_PAT=0x1235 0x12345=0x1236"
    assert found["kvm-vcpu[1] version 1/msrs"] == msrs
    assert found["kvm-vcpu[0] version 1/lapic/raw"] == "1024 bytes, all 0"
    assert found["globalstate[0] version 1/runstate"] == '"running"'


def test_show_is_the_same_with_and_without_the_description(file, capsys):
    without = run(capsys, "show", "--all", file(DATA))[1][1:]
    assert run(capsys, "show", "--all", file(DESCRIBED))[1][1:] == without


def test_show_json_is_complete(capsys, file):
    code, lines, _ = run(capsys, "show", "--json", file(DESCRIBED))
    found = json.loads("\n".join(lines))
    assert code == 0
    assert found["machine"] == "pyvmm"
    assert found["ram"][0] == {"name": "pc.ram", "size": 16 << 20}
    assert [(part["name"], part["instance"]) for part in found["sections"]] == list(OWN)
    vcpu = next(part for part in found["sections"] if part["name"] == "kvm-vcpu")
    assert vcpu["fields"]["msrs"][1] == {"index": 0x277, "data": 0x1235}
    assert vcpu["fields"]["lapic"] == "00" * 1024
    assert len(vcpu["fields"]["cpuid"]) == streams.COUNTS["nent"]


def test_show_selects_sections(capsys, file):
    name = file(DATA)

    def titles(*patterns):
        return [line for line in run(capsys, "show", name, *patterns)[1][1:] if line[0] != " "]

    assert titles("kvm-vcpu[1]") == ["kvm-vcpu[1] version 1"]
    assert sorted(titles("i8*", "serial")) == [
        "i8254[0] version 3",
        "i8259[0] version 1",
        "i8259[1] version 1",
        "serial[0] version 3",
    ]
    code, lines, errors = run(capsys, "show", name, "hpet")
    assert (code, lines, errors) == (2, [], "pyvmm: there is no section hpet in it\n")


def test_unknown_section_is_read_by_the_description_alone(capsys, file):
    data = streams.make(CONFIG, own=MIXED, described=True, machine="other", seed=5)
    _, lines, _ = run(capsys, "show", file(data))
    found = tree(lines)
    assert lines[0].startswith("state of a other machine")
    assert found["foreign[3] version 9/count"] == "0"
    assert found["foreign[3] version 9/data"] == "000000000000"
    assert found["foreign[3] version 9/foreign/more"] == "deep=0"
    assert found["globalstate[0] version 1/size"] == "8"


def test_unknown_section_without_a_description_is_bytes(capsys, file):
    data = streams.make(CONFIG, own=MIXED)
    code, lines, errors = run(capsys, "show", file(data))
    found = tree(lines)
    assert (code, errors) == (0, "")
    size = 4 + 6 + 1 + 2 + len("foreign/more") + 4 + 8
    assert found["foreign[3] version 9/data"].startswith(f"{size} bytes, 0000")
    assert found["globalstate[0] version 1/size"] == "8"


def test_truncated_file_is_shown_as_far_as_it_goes(capsys, file):
    name = file(DATA[:-200])
    code, lines, errors = run(capsys, "show", name)
    assert code == 2
    assert "serial[0] version 3" in lines
    assert errors.startswith(f"pyvmm: {name}: ")
    assert "problem" in json.loads("\n".join(run(capsys, "show", "--json", name)[1]))


@pytest.mark.parametrize("data", [b"", b"Q", b"x" * 5000, b"\x7fELF" + bytes(100)])
@pytest.mark.parametrize("verb", ["show", "diff", "check"])
def test_what_is_no_state_is_an_error(capsys, file, data, verb):
    name = file(data)
    more = {"diff": [name], "check": ["--"], "show": []}[verb]
    code, lines, errors = run(capsys, verb, name, *more)
    if verb == "check":
        assert (code, errors) == (1, "")
        assert len(lines) == 1
    else:
        assert (code, lines) == (2, [])
        assert errors.startswith("pyvmm: ")


def test_cpr_state_is_shown_too(capsys, file):
    data = cpr_state.encode(cpr_state.CprState({("ram0", 0): 11}, {"progress": bytes(64)}))
    code, lines, _ = run(capsys, "show", file(data))
    found = tree(lines)
    assert code == 0
    assert found["descriptors/ram0[0]"] == "0xb"
    assert found["values/progress"] == "64 bytes, all 0"
    assert json.loads("\n".join(run(capsys, "show", "--json", file(data))[1])) == {
        "descriptors": {"ram0[0]": 11},
        "values": {"progress": "00" * 64},
    }


def test_state_at_an_offset(capsys, file):
    name = file(bytes(4096) + DATA)
    assert run(capsys, "show", name)[0] == 2
    assert run(capsys, "show", f"{name},offset=4k")[0] == 0
    assert run(capsys, "diff", f"file:{name},offset=4096", file(DATA, "b"))[0] == 0


def test_missing_file_is_named(capsys, tmp_path):
    code, _, errors = run(capsys, "show", tmp_path / "nowhere")
    assert code == 2
    assert f"'{tmp_path / 'nowhere'}': No such file or directory" in errors


# ---- diff -------------------------------------------------------------------------------


def test_equal_states_have_no_difference(capsys, file):
    assert run(capsys, "diff", file(DATA, "a"), file(DESCRIBED, "b")) == (0, [], "")


def test_diff_names_every_value_that_differs(capsys, file):
    other = bytearray(streams.make(CONFIG, seed=0x1235))
    other[other.index(b"ioapic") + 6 + 8] ^= 0x80  # its id
    lapic = other.rindex(bytes(1024))
    other[lapic + 0x20] = 7
    code, lines, _ = run(capsys, "diff", file(DATA, "a"), file(bytes(other), "b"))
    assert code == 1
    assert "ioapic[0]/id: 0 -> 0x80" in lines
    for vcpu in (0, 1):
        assert f"kvm-vcpu[{vcpu}]/msrs/IA32_TSC: 0x1234 -> 0x1235" in lines
    assert [line for line in lines if "bytes differ" in line]
    assert len(lines) == 1 + 2 * 3 + 1


def test_diff_leaves_out_what_is_to_be_ignored(capsys, file):
    other = file(streams.make(CONFIG, seed=0x1235), "b")
    argv = ["diff", file(DATA, "a"), other, "--ignore", "*/msrs/*"]
    assert run(capsys, *argv) == (0, [], "")
    argv[-1] = "kvm-vcpu[1]/*"
    assert all(line.startswith("kvm-vcpu[0]/") for line in run(capsys, *argv)[1])


def test_diff_of_machines_with_different_devices():
    fewer = streams.make(streams.machine_config("-m", "32M"))
    lines = list(diff.compare(DATA, fewer, []))
    assert "ram/pc.ram: 0x1000000 -> 0x2000000" in lines
    assert "kvm-vcpu[1]/mp_state: 0 -> nothing" in lines
    assert "kvm-vcpu[1]/mp_state: nothing -> 0" in list(diff.compare(fewer, DATA, []))


def test_diff_of_half_a_state_is_an_error(capsys, file):
    assert run(capsys, "diff", file(DATA, "a"), file(DATA[:-1], "b"))[0] == 2


# ---- check ------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [DATA, DESCRIBED])
def test_state_of_the_same_machine_is_accepted(capsys, file, data):
    name = file(data)
    argv = ["check", name, "--", "-m", "16M", "-smp", "2", "-serial", "null"]
    assert run(capsys, *argv) == (0, [f"{name}: this machine would take it"], "")


def test_all_reasons_are_told(capsys, file):
    argv = ["-m", "32M", "-smp", "3", "-serial", "null", "-serial", "null"]
    code, lines, _ = run(capsys, "check", file(DATA), "--", *argv)
    assert code == 1
    assert lines == [
        "ram/pc.ram: 16777216 bytes in the state, 33554432 in this machine; "
        "make -m and -object equal",
        "serial: the state has 1, this machine 2; make -serial equal",
        "kvm-vcpu: the state has 2, this machine 3; make -smp equal",
    ]


def test_other_blocks_devices_versions_and_values_are_told():
    own = dict(OWN)
    del own[("port92", 0)]
    own[("ioapic", 0)] = Description("ioapic", OWN[("ioapic", 0)].fields, version=4)
    own[("foreign", 0)] = FOREIGN
    data = bytearray(streams.make(CONFIG, own=own, machine="microvm"))
    rtc = data.index(b"mc146818rtc") + 11 + 8 + 128
    data[rtc] = 0xFF  # cmos_index
    config = streams.machine_config(
        "-smp", "2", "-object", "memory-backend-memfd,id=ram0,size=16M"
    )  # fmt: skip
    found = check.reasons(bytes(data), config)
    assert found[0] == "the state is of a microvm machine, this one is pyvmm"
    assert found[1].startswith("ram: the state has the blocks pc.ram, pc.bios, this machine ram0")
    assert "port92: the state has none, this machine 1" in found
    assert "foreign: the state has 1, this machine none" in found
    assert any(line.startswith("ioapic[0]: version 4 of ioapic") for line in found)
    assert any(line.startswith("mc146818rtc[0]: cmos_index 255") for line in found)
    assert len(found) == 6


def test_check_agrees_with_the_loader_at_every_byte():
    config = streams.machine_config("-m", "16M")
    data = streams.make(config)
    own = streams.descriptions(config)
    for at in range(0, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        try:
            streams.stream.read(bytes(changed), own, "pyvmm")
            refused = False
        except VmStateError:
            refused = True
        if refused:
            assert check.reasons(bytes(changed), config), at


def test_bad_options_are_an_error(capsys, file):
    for argv in (["-m", "0"], ["-nonsense"], ["kernel"], ["-help"]):
        code, lines, errors = run(capsys, "check", file(DATA), "--", *argv)
        assert (code, lines) == (2, [])
        assert errors.startswith("pyvmm: ")


# ---- hostile files ----------------------------------------------------------------------


def look(data):
    """Everything that is done with a file; it either works or is refused."""
    for verb in (
        lambda: "\n".join(show.document(data, []).lines(fold=True)),
        lambda: json.dumps(show.document(data, []).as_json()),
        lambda: list(diff.compare(data, DATA, [])),
        lambda: check.reasons(data, CONFIG),
    ):
        try:
            verb()
        except PyvmmError:
            continue


@given(st.data())
@settings(max_examples=60)
def test_changed_bytes_are_shown_or_refused(data):
    changed = bytearray(DESCRIBED)
    for _ in range(data.draw(st.integers(1, 6))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    look(bytes(changed))


@pytest.mark.parametrize("step", [97])
def test_truncation_is_shown_or_refused(step):
    for end in range(0, len(DESCRIBED), step):
        look(DESCRIBED[:end])


def with_json(value):
    text = (value if isinstance(value, str) else json.dumps(value)).encode()
    while b"{" in struct.pack(">I", len(text)):
        text += b" "
    return DATA + b"\6" + struct.pack(">I", len(text)) + text


def device(**entry):
    return {"devices": [{"name": "serial", "instance_id": 0, "fields": [{"name": "x"} | entry]}]}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"devices": None},
        {"devices": [1, None, [], {"name": []}]},
        {"devices": {"a": 1}},
        {"configuration": 3},
        {"configuration": {"subsections": [{"vmsd_name": "x"}]}},
        device(),
        device(type="uint8"),
        device(type="uint8", size=-1),
        device(type="uint8", size=1 << 70),
        device(type="uint8", size=1.5),
        device(type="uint8", size=True),
        device(type="uint8", size="1"),
        device(type=[], size=3),
        device(type="uint64", size=3),
        device(type="buffer", size=0, array_len=1 << 60),
        device(type="buffer", size=0, array_len=3000),
        device(type="buffer", size=1, array_len=-3),
        device(type="struct"),
        device(type="struct", struct=[]),
        device(type="struct", struct={"fields": 3}),
        {"devices": [{"name": "serial", "instance_id": 0, "fields": [{"name": 3}]}]},
        {"devices": [{"name": "serial", "instance_id": 0, "fields": [None]}]},
        {"devices": [{"name": "serial", "instance_id": 0, "fields": [], "subsections": [1]}]},
        {"devices": [{"name": "serial", "instance_id": 0, "fields": [
            {"name": "a", "type": "uint8", "size": 1},
            {"name": "a", "type": "uint8", "size": 1, "index": 0},
        ]}]},
        '{"devices": [' + '{"a":' * 100_000,
        '{"a": ' + "9" * 10_000 + "}",
        '{"a": NaN, "a": Infinity}',
        "{",
        "{}}",
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_absurd_description_does_no_harm(value):
    begin = time.thread_time()
    data = with_json(value)
    look(data)
    assert time.thread_time() - begin < 5
    # What this build knows of itself remains.
    if not isinstance(value, dict) or "configuration" not in value:
        keys = [(part.name, part.instance) for part in Outline(data).parts]
        assert keys == list(OWN)


def test_deep_description_is_given_up():
    inner = {"fields": []}
    for _ in range(200):
        inner = {"fields": [{"name": "x", "type": "struct", "struct": inner}]}
    look(with_json({"devices": [{"name": "serial", "instance_id": 0} | inner]}))


def test_multiplying_description_is_given_up():
    inner = {"fields": [{"name": "x", "type": "buffer", "size": 0}]}
    for _ in range(6):
        inner = {"fields": [{"name": "x", "type": "struct", "struct": inner, "array_len": 1000}]}
    begin = time.thread_time()
    look(with_json({"devices": [{"name": "serial", "instance_id": 0} | inner]}))
    assert time.thread_time() - begin < 30


def test_control_characters_do_not_reach_the_terminal(capsys, file):
    evil = Description("e\x1b[2Jvil", [u8("f\x1b[0mield")])
    own = {("e\x1b[2Jvil", 0): evil}
    data = streams.make(CONFIG, own=own, described=True, machine="m\x1b\x07").replace(
        b"pc.bios", b"pc\x1bbios"
    )
    for argv in (
        ["show", file(data)],
        ["diff", file(data), file(DATA, "b")],
        ["check", file(data), "--", "-m", "16M"],
    ):
        main(argv)
    captured = capsys.readouterr()
    assert "vil" in captured.out
    assert not set(captured.out + captured.err) & {"\x1b", "\x07"}


def test_lone_surrogate_in_a_name_is_printed(file):
    serial = Outline(DATA).parts[0]
    value = device(type="buffer", size=serial.end - serial.start)
    value["devices"][0]["fields"][0]["name"] = "\ud800"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "show", file(with_json(value)), "serial"],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert b"\\xd800: " in result.stdout


# ---- what the buffers hold --------------------------------------------------------------


def test_xsave_area():
    raw = bytearray(1024)
    struct.pack_into("<HHBxHQQII", raw, 0, 0x37F, 1, 2, 3, 4, 5, 0x1F80, 0xFFFF)
    raw[32:42] = b"\1" + bytes(8) + b"\x80"
    raw[160:176] = bytes(15) + b"\2"
    struct.pack_into("<QQ", raw, 512, 7, 1 << 63)
    found = registers.xsave(bytes(raw))
    assert (found["fcw"], found["fsw"], found["ftw"], found["fop"]) == (0x37F, 1, 2, 3)
    assert (found["fip"], found["fdp"], found["mxcsr"], found["mxcsr_mask"]) == (
        4, 5, 0x1F80, 0xFFFF,
    )  # fmt: skip
    assert found["st0"] == 0x80 << 72 | 1
    assert found["xmm0"] == 2 << 120
    assert found["xmm15"] == 0
    assert (found["xstate_bv"], found["xcomp_bv"]) == (7, 1 << 63)
    assert registers.xsave(bytes(511)) == {}


def test_lapic_page():
    raw = bytearray(1024)
    struct.pack_into("<I", raw, 0x20, 3 << 24)
    struct.pack_into("<I", raw, 0x200, 1 << 5)
    struct.pack_into("<I", raw, 0x270, 1 << 31)
    struct.pack_into("<I", raw, 0x320, 0x20030)
    found = registers.lapic(bytes(raw))
    assert found["id"] == 3 << 24
    assert found["irr"] == [5, 255]
    assert found["isr"] == []
    assert found["lvt_timer"] == 0x20030
    assert registers.lapic(bytes(100)) == {}


def test_msr_names():
    assert registers.msr_name(0x10) == "IA32_TSC"
    assert registers.msr_name(0x405) == "IA32_MC1_STATUS"
    assert registers.msr_name(0xDEAD) == "0xdead"
    assert len(set(registers.MSR_NAMES.values())) == len(registers.MSR_NAMES)


def test_description_is_found_as_other_tools_find_it():
    assert find_description(DATA) is None
    assert find_description(DESCRIBED)["page_size"] == 4096
    assert find_description(DESCRIBED + b"trailing") == find_description(DESCRIBED)
    assert find_description(DESCRIBED + b"\0") is None


# ---- the command line -------------------------------------------------------------------


def test_verb_of_the_command_line(capsys, file):
    assert cli.main(["state", "show", file(DATA), "serial"]) == 0
    assert "serial[0] version 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [[], ["paint"], ["show"], ["diff", "a"], ["show", "--nonsense", "a"], ["show", "--js", "a"]],
)
def test_wrong_usage(capsys, argv):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "usage: pyvmm state" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        main(["-h"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "pyvmm state check vm.state -- -m 1G -smp 2" in text
    assert "exit codes" in text


def test_options_behind_dashes_are_for_check_only(capsys, file):
    assert run(capsys, "show", file(DATA), "--", "-m", "1G")[0] == 2


@pytest.mark.parametrize("option", ["--all", "--json"])
def test_reader_that_went_away_is_no_traceback(file, option):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, "show", option, file(DATA)],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (2, b"")
