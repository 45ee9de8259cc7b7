"""The source archive is complete, and so is the wheel made of it, which works anywhere."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pyvmm

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run(*command, cwd):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tree as git would have it, with what is not yet committed and without products."""
    tree = tmp_path_factory.mktemp("source")
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


@pytest.fixture(scope="module")
def dist(source, tmp_path_factory):
    """The folder with a source archive and with the wheel that was built of that archive."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "-o", folder, ".", cwd=source)
    return folder


@pytest.fixture
def wheel(dist):
    (path,) = dist.glob("pyvmm_kvm-*.whl")
    return path


def test_source_archive_has_all_sources_and_no_products(dist, source):
    (path,) = dist.glob("pyvmm_kvm-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {Path(*Path(entry.name).parts[1:]) for entry in archive if entry.isfile()}
    hidden = {".gitignore", ".ci"}
    # The build itself leaves byte code in the folder that it builds from.
    files = {path for path in source.rglob("*") if path.is_file()}
    tracked = {path.relative_to(source) for path in files if path.suffix != ".pyc"}
    assert {name for name in tracked if name.parts[0] not in hidden} - names == set()
    added = {name for name in names - tracked if "egg-info" not in str(name)}
    assert added == {Path("PKG-INFO"), Path("setup.cfg")}


def test_wheel_is_complete(wheel, source):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(source)) for path in source.glob("pyvmm/**/*.py")}
    types = {str(path.relative_to(source)) for path in source.glob("pyvmm/**/*.pyi")}
    data = {"pyvmm/data/guest.elf", "pyvmm/data/bios.bin", "pyvmm/py.typed", *types}
    assert modules | data | {"pyvmm/_native/_kvm.abi3.so"} <= names
    others = {name.split("/")[0] for name in names} - {"pyvmm"}
    assert others == {f"pyvmm_kvm-{pyvmm.__version__}.{end}" for end in ("data", "dist-info")}


def test_wheel_serves_all_supported_pythons(wheel):
    assert "-cp311-abi3-" in wheel.name


def test_installed_command_works_from_an_empty_folder(wheel, tmp_path):
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "venv", venv, cwd=empty)
    run(venv / "bin/python", "-m", "pip", "install", "-q", wheel, cwd=empty)
    expected = f"pyvmm {pyvmm.__version__}"
    assert run(venv / "bin/pyvmm", "--version", cwd=empty).startswith(expected)
    assert run(venv / "bin/python", "-m", "pyvmm", "--version", cwd=empty).startswith(expected)


def test_launcher_imports_nothing_but_the_command():
    launcher = (ROOT / "pyvmm/_native/bin/pyvmm").read_text().splitlines()
    assert launcher == ["#!python", "from pyvmm.cli import command", "command()"]


def test_missing_toolchain_is_one_line(source, tmp_path):
    """Without a compiler on PATH the build names what to install, and shows no traceback."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, "."]
    result = subprocess.run(
        build, cwd=source, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "error: cannot find gcc, ld, make: apt-get install gcc binutils make" in result.stderr
    assert "Traceback" not in result.stderr
