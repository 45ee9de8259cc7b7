"""What a real machine writes: read by ``pyvmm state``, and accepted by this build's check."""

import json

import pytest
from harness import run_cli

from pyvmm.testing import streams
from pyvmm.vmstate import stream


@pytest.fixture(scope="module")
def machine_state(tmp_path_factory):
    """The options of a machine with every device, and the state that it wrote."""
    from harness import Vm

    folder = tmp_path_factory.mktemp("state")
    options = ["-device", "pvpanic", "-device", "isa-debug-exit", "-serial", "null"]
    with Vm(folder, *options, append="ticker", smp=2) as machine:
        machine.expect("tick 2")
        # Of a guest that runs through the exec the file has the devices alone.
        machine.plain().update()
        machine.expect("tick 4")
        # The names of the sockets do not matter for the state.
        shape = ["-m", "64M", "-smp", "2", "-serial", "null", *options]
        return shape, folder / "vm.state.0"


def test_a_guest_that_ran_through_leaves_its_devices(vm):
    machine = vm(append="ticker")
    machine.expect("tick 2")
    machine.update()
    path = machine.folder / "vm.state.0"
    shown = json.loads(state("show", "--json", path).stdout)
    assert "problem" not in shown
    names = {part["name"] for part in shown["sections"]}
    assert "serial" in names
    assert "kvm-vcpu" not in names
    result = state("check", path, "--", "-m", "64M")
    assert "kvm-vcpu: the state has none, this machine 1" in result.stdout
    # Nobody else can go on with it, and is told why.
    done = run_cli("run", "-nodefaults", "-m", "64M", "-incoming", f"file:{path}")
    assert done.returncode == 1
    assert "they ran through an exec to the image it was made for" in done.stderr


def state(*argv):
    return run_cli("state", *map(str, argv))


def test_own_options_are_accepted(machine_state):
    options, path = machine_state
    result = state("check", path, "--", *options)
    assert (result.stdout, result.returncode) == (f"{path}: this machine would take it\n", 0)


def test_other_options_are_refused(machine_state):
    _, path = machine_state
    result = state("check", path, "--", "-m", "32M")
    assert result.returncode == 1
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [
        "ram/pc.ram",
        "serial",
        "kvm-vcpu",
    ]


def test_state_is_shown_whole(machine_state):
    _, path = machine_state
    shown = json.loads(state("show", "--json", path).stdout)
    assert "problem" not in shown
    assert {part["name"]: part for part in shown["sections"]}.keys() >= {"serial", "kvm-vcpu"}
    vcpus = [part["fields"] for part in shown["sections"] if part["name"] == "kvm-vcpu"]
    assert len(vcpus) == 2
    assert all(len(vcpu["msrs"]) == vcpu["nmsrs"] > 10 for vcpu in vcpus)
    lines = state("show", path).stdout.splitlines()
    assert "    mxcsr: 0x1f80" in lines
    assert any(line.startswith("    IA32_TSC: 0x") for line in lines)


def test_description_says_the_same_as_this_build(machine_state, tmp_path):
    options, path = machine_state
    data = path.read_bytes()
    own = streams.descriptions(streams.options.parse(options))
    loaded = stream.read(data, own)
    if loaded.is_described:
        data = data[: data.rindex(b"\0\6", 0, data.index(b'{"configuration"')) + 1]
    bare, described = tmp_path / "bare", tmp_path / "described"
    bare.write_bytes(data)
    described.write_bytes(data + stream.describe(loaded, own))
    results = [state("show", "--all", file) for file in (bare, described)]
    assert [result.returncode for result in results] == [0, 0]
    texts = [result.stdout.partition("\n") for result in results]
    assert texts[0][2] == texts[1][2]
    assert "its own description" in texts[1][0]
    assert state("diff", bare, described).returncode == 0
