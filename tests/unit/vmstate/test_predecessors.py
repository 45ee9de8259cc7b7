"""What earlier versions saved is read, and means the same to this one."""

import json
import lzma
import re
import shlex
from pathlib import Path

import pytest
from harness import run_cli, versions

from pyvmm.cpr import state as cpr_state
from pyvmm.machine import options, shape
from pyvmm.state import check
from pyvmm.state.outline import Outline
from pyvmm.testing import streams
from pyvmm.vmstate import stream
from pyvmm.vmstate.cursor import Cursor
from pyvmm.vmstate.fields import Description

ROOT = Path(__file__).parents[3]
STATES = ROOT / "tests" / "upgrade" / "states"
MACHINES = [
    (folder.name, name, shlex.split(words))
    for folder in sorted(STATES.iterdir())
    if folder.is_dir()
    for name, words in json.loads((folder / "machines.json").read_text()).items()
]
EACH = pytest.mark.parametrize(
    ("version", "name", "words"),
    MACHINES,
    ids=[f"{version} {name}" for version, name, _ in MACHINES],
)


def saved(version, name, kind):
    return lzma.decompress((STATES / version / f"{name}.{kind}.xz").read_bytes())


def test_there_is_something_of_every_predecessor():
    pinned = [commit for commit, _ in versions.predecessors()]
    assert [commit[:7] for commit in pinned] == [
        path.name for path in STATES.iterdir() if path.is_dir()
    ]
    assert len(MACHINES) >= len(pinned)


@EACH
def test_a_machine_takes_the_stream(version, name, words):
    config = options.parse(words)
    data = saved(version, name, "stream")
    assert check.reasons(data, config) == []
    own = streams.descriptions(config)
    loaded = stream.read(data, own, "pyvmm", shape.former_names(config))
    assert loaded.records.keys() == own.keys()
    assert loaded.is_described


def were_there(description, record):
    """The subsections that a record was read from."""
    names = record.__dict__
    return [part for part in description.subsections if all(f.name in names for f in part.fields)]


@EACH
def test_what_was_read_is_written_as_it_was(version, name, words, monkeypatch):
    """A section whose version is the same has the same bytes: no field was added, removed, moved
    or made wider."""
    # Whether a subsection is needed is asked of devices.
    monkeypatch.setattr(Description, "_needed_parts", were_there)
    data = saved(version, name, "stream")
    config = options.parse(words)
    own, former = streams.descriptions(config), shape.former_names(config)
    for part in Outline(data).parts:
        key = part.name, part.instance
        description = own[former.get(key, key)]
        source = Cursor(data[part.start : part.end])
        record = description.load(source, part.version)
        assert source.at == len(source.data)
        if part.version == description.version:
            out = bytearray()
            description.save(out, record)
            assert bytes(out) == source.data, part.key


@EACH
def test_state_show_shows_it(version, name, words, tmp_path):
    path = tmp_path / "state"
    path.write_bytes(saved(version, name, "stream"))
    done = run_cli("state", "show", "--json", str(path))
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert "problem" not in shown
    vcpus = [part for part in shown["sections"] if part["name"] == "kvm-vcpu"]
    assert len(vcpus) == options.parse(words).smp
    done = run_cli("state", "check", str(path), "--", *words)
    assert (done.returncode, done.stdout) == (0, f"{path}: this machine would take it\n")


@EACH
def test_cpr_state_is_read(version, name, words):
    data = saved(version, name, "cpr")
    state = cpr_state.decode(data)
    assert cpr_state.encode(state) == data
    names = {name for name, _ in state.fds}
    assert {"pc.ram", "pc.bios", "kvm", "cpr/vmstate", "cpr/exe"} <= names
    assert state.values["rollback/command"].split(b"\0")[-2:] == [b"-incoming", b"memfd:"]


def test_page_has_the_same_table():
    """docs/state.md tells users what the file tells the tests."""
    text = (ROOT / "docs" / "state.md").read_text()
    _, _, table = text.partition("## Predecessors\n")
    rows = re.findall(r"(?m)^\| `(\w+)` \| ([^|]+?) \|", table)
    assert rows == [(commit[:7], said) for commit, said in versions.predecessors()]
