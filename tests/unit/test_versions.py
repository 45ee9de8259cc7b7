"""Other versions are built once, by one of those who come at once, and whole or not at all."""

import subprocess
import threading

import pytest
from harness import needs, versions


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """What was built, without building it."""
    made = []

    class Build:
        def __init__(self, commit, folder, lock):
            assert not folder.exists()
            self.folder = folder
            self.commit = commit

        def make(self):
            made.append(self.commit)
            (self.folder / "tree").mkdir(parents=True)

    monkeypatch.setattr(versions, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(versions, "_Build", Build)
    monkeypatch.setattr(versions, "_resolve", lambda revision: revision * 4)
    return made


def test_a_commit_is_built_once(builds):
    first = versions.commit("0123456789")
    assert first.name == "0123456"
    assert first.tree.is_dir()
    assert first.run == [first.pyvmm, "run"]
    assert versions.commit("0123456789").tree == first.tree
    assert len(builds) == 1
    versions.commit("abcdef0123")
    assert len(builds) == 2


def test_what_a_killed_run_left_is_built_anew(builds):
    first = versions.commit("0123456789")
    (first.tree.parent / "ready").unlink()
    (first.tree / "half").touch()
    assert versions.commit("0123456789").tree == first.tree
    assert len(builds) == 2
    assert not (first.tree / "half").exists()


def test_another_interpreter_or_recipe_builds_anew(builds, monkeypatch):
    versions.commit("0123456789")
    monkeypatch.setattr(versions.sys, "version", "4.0")
    versions.commit("0123456789")
    assert len(builds) == 2


def test_two_at_once_build_once(builds):
    threads = [threading.Thread(target=versions.commit, args=["0123456789"]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_missing_history_names_the_mend(tmp_path, monkeypatch):
    needs.program("git")
    with pytest.raises(versions.VersionError, match="has no commit 0123456; git fetch --unshallow"):
        versions.commit("0123456")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    with pytest.raises(versions.VersionError, match="has no history; take a git clone"):
        versions.commit("0123456")
    with pytest.raises(versions.VersionError, match=r"pyvmm is missing; make -C \S+ build"):
        versions.find(tmp_path)


def test_predecessors_have_a_comment_each():
    pinned = versions.predecessors()
    assert pinned
    assert all(len(commit) == 40 and text for commit, text in pinned)


@pytest.mark.slow
def test_the_last_commit_can_be_built(tmp_path, monkeypatch):
    """As later ones will need it; its extension, images and launcher are its own."""
    monkeypatch.setattr(versions, "CACHE", tmp_path)
    try:
        version = versions.commit("HEAD")
    except versions.BuildError:
        raise
    except versions.VersionError as error:
        needs.missing(str(error))
    code = (
        "import pyvmm._native as n; from pyvmm.boot import builtin as b; "
        "print(n._kvm.__file__, b.path(b.GUEST), b.path(b.ROM))"
    )
    done = subprocess.run([version.python, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stderr == ""
    assert all(path.startswith(str(version.tree)) for path in done.stdout.split())
    done = subprocess.run([version.pyvmm, "--version"], capture_output=True, text=True, cwd="/")
    assert done.stdout.startswith("pyvmm ")
