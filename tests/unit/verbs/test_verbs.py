"""What the verbs print, and their exit codes where no VM is needed."""

import pytest
from harness import run_cli

from pyvmm import rundir
from pyvmm.verbs import list as listing
from pyvmm.verbs.monitor import failed
from pyvmm.verbs.update import downtime


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m 0s"), (3725, "1h 2m"), (93784, "1d 2h"), (-5, "0s")],
)
def test_duration(seconds, text):
    assert listing.duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "is_failure"),
    [
        ("", False),
        ("VM status: running\n", False),
        ("Error: no\n", True),
        ("unknown command: 'x'\n", True),
        ('migrate: string expected\nTry "help migrate" for more information\n', True),
        ("an Error: inside\n", False),
    ],
)
def test_output_of_a_command_that_failed(text, is_failure):
    assert failed(text) is is_failure


def test_downtime_begins_with_the_stop():
    assert downtime({"phases": {"setup": 100, "stop": 1, "save": 2, "load": 0.5}}) == 3.5
    assert downtime({"downtime": 7}) == 7
    assert downtime({}) == 0


def test_a_vm_that_does_not_answer_is_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    starting, silent = rundir.reserve("starting"), rundir.reserve("\x1bsilent")
    silent.write_info({"pid": 12, "memory": 1 << 20, "smp": "many", "started": 1})
    assert listing.show(as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:6] for line in lines[1:]] == [
        ["?silent", "12", "unknown", "1", "MiB", "-"],
        ["starting", "-", "starting", "-", "-", "-"],
    ]
    starting.remove()
    silent.remove()


@pytest.mark.parametrize(
    "words",
    [
        ["list", "--bogus"],
        ["monitor"],
        ["update"],
        ["update", "vm", "extra"],
        ["update", "--timeout", "soon", "vm"],
        ["update", "--timeout", "-1", "vm"],
        ["update", "--timeout", "nan", "vm"],
        ["monitor", "vm", "info\nstatus"],
    ],
)
def test_wrong_usage(words):
    done = run_cli(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["monitor", "vm"], ["update", "vm"]])
def test_an_unknown_name(words, tmp_path):
    done = run_cli(*words, XDG_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "pyvmm: vm: there is no VM of that name; none runs\n"


def test_nothing_to_list(tmp_path):
    done = run_cli("list", XDG_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "no VM runs\n", "")
    assert run_cli("list", "--json", XDG_RUNTIME_DIR=str(tmp_path)).stdout == "[]\n"


def test_help_lists_all_verbs():
    text = run_cli("--help").stdout
    for verb in ("run", "list", "monitor", "update"):
        assert f"pyvmm {verb} " in text
        done = run_cli(verb, "-help" if verb == "run" else "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"usage: pyvmm {verb} " in done.stdout
