"""What tests need is installed, with patience, or named: on hosts that these tests make up."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import needs, network

TESTS = Path(__file__).parents[1]

#: Stands for apt-get: does the next thing in ``answers``, and "installs" into its own folder.
APT_GET = """#!/bin/sh
cd "$(dirname "$0")" || exit 1
command=$1
shift 6
echo "$command $*" >>calls
read -r answer <answers
sed -i 1d answers
case $answer in
    '') ;;
    *) echo "$answer" >&2; exit 100 ;;
esac
if [ "$command" = install ]; then
    for program in $INSTALLS; do ln -sf /bin/true "$program"; done
fi
"""
LOOK_UP = "E: Failed to fetch http://mirror.invalid/x  Temporary failure resolving 'mirror.invalid'"
NOT_FOUND = "E: Failed to fetch http://mirror.invalid/x  404  Not Found [IP: ::1 80]"
UNKNOWN = "E: Unable to locate package passt"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host without any program but what this needs, and an apt-get."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dirname", "sed", "ln"):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    apt_get = folder / "apt-get"
    apt_get.write_text(APT_GET)
    apt_get.chmod(0o755)
    (folder / "answers").touch()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("INSTALLS", " ".join(needs.PACKAGES))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(needs, "PAUSES_S", (0, 0))
    return folder


def calls(host):
    return (host / "calls").read_text().splitlines()


def test_what_is_missing_is_installed(host, capsys):
    needs.main()
    names = " ".join(needs.PACKAGES.values())
    assert capsys.readouterr() == (f"installing {names}\n", "")
    assert calls(host) == ["update ", f"install -y --no-install-recommends {names}"]
    needs.main()
    assert capsys.readouterr() == ("", "")
    assert len(calls(host)) == 2


def test_only_what_is_missing_is_installed(host):
    for name in needs.PACKAGES:
        (host / name).symlink_to("/bin/true")
    (host / "ip").unlink()
    needs.main()
    assert calls(host)[1:] == ["install -y --no-install-recommends iproute2"]


def test_look_up_that_failed_is_repeated(host, capsys):
    (host / "answers").write_text(f"{LOOK_UP}\n\n{LOOK_UP}\n{LOOK_UP}\n")
    needs.main()
    assert [line.split()[0] for line in calls(host)] == ["update"] * 2 + ["install"] * 3
    assert "apt-get update: no answer, once more in 0 s" in capsys.readouterr().err
    assert not needs.lacking()


def test_no_network_at_all(host, capsys):
    """What is in apt's cache is installed all the same, and nothing is asked for again."""
    (host / "answers").write_text(f"{LOOK_UP}\n" * 3)
    needs.main()
    assert [line.split()[0] for line in calls(host)] == ["update"] * 3 + ["install"]
    assert not needs.lacking()


def test_package_that_does_not_exist_keeps_no_other_away(host, capsys):
    (host / "answers").write_text(f"\n{UNKNOWN}\n")
    needs.main()
    each = [f"install -y --no-install-recommends {name}" for name in needs.PACKAGES.values()]
    assert calls(host)[2:] == each
    assert capsys.readouterr().err == f"{UNKNOWN}\n"


def test_old_list_is_not_asked_again(host):
    (host / "answers").write_text(f"{NOT_FOUND}\n")
    assert needs.apt_get("download", "x").stderr == f"{NOT_FOUND}\n"
    assert len(calls(host)) == 1


def test_who_may_not_install_is_told(host, monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    needs.main()
    names = " ".join(needs.PACKAGES.values())
    assert capsys.readouterr().err == f"tests need more; as root: apt-get install {names}\n"
    assert not (host / "calls").exists()


def test_it_needs_nothing_but_python(host):
    """It runs before anything else is known to work."""
    for name in needs.PACKAGES:
        (host / name).symlink_to("/bin/true")
    command = [sys.executable, "-I", "-S", TESTS / "harness" / "needs.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("variable", ["CI", "PYVMM_REQUIRE_KVM"])
def test_missing_program_is_named_and_demanded(host, monkeypatch, variable):
    for name in ("CI", "PYVMM_REQUIRE_KVM"):
        monkeypatch.delenv(name, raising=False)
    text = "^passt is not installed; as root: apt-get install passt"
    with pytest.raises(pytest.skip.Exception, match=f"{text}$"):
        needs.program("passt")
    monkeypatch.setenv(variable, "1")
    with pytest.raises(pytest.fail.Exception, match=text):
        needs.program("passt")


def test_program_that_is_there(host):
    (host / "passt").symlink_to("/bin/true")
    assert needs.program("passt") == str(host / "passt")


def test_failure_in_a_namespace_leaves_it():
    """Packages are fetched after other tests, by the same thread."""

    def fail():
        with network.namespace():
            assert os.readlink("/proc/thread-self/ns/net") != before
            raise ZeroDivisionError

    before = os.readlink("/proc/thread-self/ns/net")
    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.readlink("/proc/thread-self/ns/net") == before


def test_folder_in_memory():
    assert needs.in_memory("/dev/shm")
    assert not needs.in_memory("/proc")


SKIPS = {"pytest.skip", "pytest.importorskip", "pytest.mark.skip", "pytest.mark.skipif"}


def skips(tree):
    """Lines that leave a test out by themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in SKIPS:
            yield node.lineno


def test_tests_are_left_out_in_one_place_only():
    """That one names what is missing, and does not do it where every test counts."""
    found = [
        f"{path.relative_to(TESTS)}:{line}: use harness.needs"
        for path in sorted(TESTS.rglob("*.py"))
        if path not in (TESTS / "harness" / "needs.py", Path(__file__))
        for line in skips(ast.parse(path.read_bytes(), str(path)))
    ]
    assert not found, "\n".join(found)


def test_skips_are_found():
    source = "@pytest.mark.skipif(x)\ndef f():\n    pytest.skip('x')\n    config.skip()\n"
    assert list(skips(ast.parse(source))) == [1, 3]
