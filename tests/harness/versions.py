"""Other versions of pyvmm beside this checkout: built once, from the repository's own history.

A commit is exported into a folder of its own below ``build/versions`` and built there into an
environment of its own: extension, guest, ROM and launcher are the commit's, the packages that it
depends on are this environment's, so no network is needed. A few seconds, once a commit; whoever
comes meanwhile waits. What a run leaves that was killed is removed by the next.
"""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from harness import process

ROOT = Path(__file__).parents[2]
#: Goes with ``make clean``.
CACHE = ROOT / "build" / "versions"
#: The versions that this one can be updated from and to: a commit and a comment a line.
PREDECESSORS = ROOT / "tests" / "upgrade" / "predecessors"

#: The program that builds a version's extension.
BUILD_EXTENSION = Path(__file__).with_name("build_extension.py")


class VersionError(Exception):
    """A version cannot be had; the text says why, and the mend."""


class BuildError(VersionError):
    """It is there and cannot be built."""


class Version:
    """A pyvmm that can be started.

    :ivar name: for people
    :ivar tree: its checkout
    :ivar python: its interpreter
    :ivar pyvmm: its command
    """

    def __init__(self, name, tree, python, pyvmm):
        self.name = name
        self.tree = Path(tree)
        self.python = str(python)
        self.pyvmm = str(pyvmm)

    def __repr__(self):
        return f"Version({self.name})"

    @property
    def run(self):
        """The first words of its ``pyvmm run``."""
        return [self.pyvmm, "run"]

    def faulty(self, *faults):
        """The same with faults in it: see ``tests/faults/inject.py``, which is the version's
        own."""
        words = [fault.replace("\n", "¶") for fault in faults]
        return [self.python, str(self.tree / "tests" / "faults" / "inject.py"), *words, "run"]


def present():
    """This checkout."""
    return Version("present", ROOT, sys.executable, process.pyvmm())


def predecessors():
    """The pinned commits, oldest first, with what the file says of each: (commit, text)."""
    lines = PREDECESSORS.read_text().splitlines()
    words = [line.split(None, 1) for line in lines if line.strip() and not line.startswith("#")]
    return [(commit, *(text or ("",))) for commit, *text in words]


def find(where):
    """A commit, or a folder with a checkout that was built there.

    :raises VersionError: there is no such version, or it cannot be built
    """
    folder = Path(where)
    if not folder.is_dir():
        return commit(where)
    command = folder.resolve() / ".venv" / "bin" / "pyvmm"
    if not command.exists():
        raise VersionError(f"{command} is missing; make -C {folder} build")
    return Version(folder.resolve().name, folder.resolve(), command.with_name("python"), command)


def commit(revision):
    """A commit of this repository's history; built, if it was not yet.

    :raises VersionError: the history is not there
    :raises BuildError: the commit cannot be built
    """
    full = _resolve(revision)
    folder = CACHE / f"{full[:12]}-{Path(sys.prefix).name}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{folder.name}.lock", "w") as lock:
        # Inherited by the build's processes: as long as one of them runs, nobody else begins.
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready = folder / "ready"
        if not ready.exists() or ready.read_text() != _recipe():
            shutil.rmtree(folder, ignore_errors=True)
            _Build(full, folder, lock.fileno()).make()
            ready.write_text(_recipe())
    commands = folder / "venv" / "bin"
    return Version(full[:7], folder / "tree", commands / "python", commands / "pyvmm")


def _resolve(revision):
    if not shutil.which("git"):
        raise VersionError("git is not installed; as root: apt-get install git")
    command = ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.strip()
    if "not a git repository" in done.stderr:
        raise VersionError(f"{revision}: {ROOT} has no history; take a git clone")
    if "dubious ownership" in done.stderr:
        raise VersionError(f"{revision}: {done.stderr.strip().splitlines()[-1].strip()}")
    raise VersionError(f"this clone has no commit {revision}; git fetch --unshallow")


def _recipe():
    """Changes with all that what was built depends on beside the commit."""
    programs = (Path(__file__).read_bytes(), BUILD_EXTENSION.read_bytes())
    facts = (*programs, sys.prefix.encode(), sys.version.encode())
    return hashlib.sha256(b"\0".join(facts)).hexdigest()


class _Build:
    """The making of one version.

    :param lock: descriptor that all processes shall have open
    """

    def __init__(self, commit, folder, lock):
        self._commit = commit
        self._lock = lock
        self._tree = folder / "tree"
        self._venv = folder / "venv"

    def make(self):
        self._tree.mkdir(parents=True)
        archive = self._tree.with_suffix(".tar")
        self._run(["git", "archive", "-o", archive, self._commit], cwd=ROOT)
        self._run(["tar", "-xf", archive, "-C", self._tree])
        archive.unlink()
        images = json.loads(self._run([sys.executable, "-P", BUILD_EXTENSION]).splitlines()[-1])
        for image, folder in images.items():
            jobs = f"-j{os.cpu_count()}"
            self._run(["make", "-s", jobs, "-C", self._tree / folder, f"build/{image}"])
        settings = tomllib.loads((self._tree / "pyproject.toml").read_text())["tool"]["setuptools"]
        self._make_environment(settings["script-files"])
        self._run([self._venv / "bin" / "python", "-m", "compileall", "-q", "pyvmm"])

    def _make_environment(self, scripts):
        """Like one that ``make build`` makes, down to the number of folders on Python's path: what
        is measured beside another shall not pay for how it was built."""
        self._run([sys.executable, "-m", "venv", "--without-pip", self._venv])
        paths = {"base": str(self._venv), "platbase": str(self._venv)}
        packages = Path(sysconfig.get_path("purelib", "venv", paths))
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if not path.name.startswith(("pyvmm", "__")) and path.suffix != ".pth":
                (packages / path.name).symlink_to(path.resolve())
        (packages / "pyvmm.pth").write_text(f"{self._tree}\n")
        for script in scripts:
            _, _, text = (self._tree / script).read_text().partition("\n")
            path = self._venv / "bin" / Path(script).name
            path.write_text(f"#!{self._venv}/bin/python\n{text}")
            path.chmod(0o755)

    def _run(self, command, cwd=None):
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self._tree,
            env=process.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            pass_fds=[self._lock],
        )
        if done.returncode:
            words = shlex.join(str(word) for word in command)[:200]
            raise BuildError(f"{self._commit[:12]} cannot be built: {words}: {done.stderr}")
        return done.stdout
