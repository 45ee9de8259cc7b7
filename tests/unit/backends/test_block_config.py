"""-drive, -blockdev and the disk device's properties: what is taken, and each refusal."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.backends.block_config import (
    CACHE_MODES,
    BlockOptions,
    check_block,
)
from pyvmm.errors import ConfigError


def drive(text):
    options = BlockOptions()
    options.add_drive(text)
    (config,) = options.complete()
    return config


def nodes(*texts):
    options = BlockOptions()
    for text in texts:
        options.add_blockdev(text)
    return options.complete()


def test_drive_in_few_words():
    config = drive("file=disk.img,format=raw")
    assert (config.id, config.filename, config.is_drive) == ("virtio0", "disk.img", True)
    assert config.stated
    assert config.writeback
    assert not any((config.read_only, config.direct, config.no_flush, config.unmap))
    assert config.locking == "auto"


@pytest.mark.parametrize("mode", CACHE_MODES)
def test_cache_modes(mode):
    config = drive(f"file=x,cache={mode}")
    assert (config.writeback, config.direct, config.no_flush) == CACHE_MODES[mode]


def test_cache_modes_in_parts():
    config = drive("file=x,cache=none,cache.direct=off,cache.no-flush=on,cache.writeback=off")
    assert (config.writeback, config.direct, config.no_flush) == (False, False, True)


def test_drives_without_if_ask_for_a_device():
    options = BlockOptions()
    options.add_drive("file=a")
    options.add_drive("file=b,if=none,id=b,readonly=on,discard=unmap,file.locking=off")
    options.add_drive("file=c,,d,if=virtio")
    a, b, c = options.complete()
    assert options.implied == ["virtio0", "virtio1"]
    assert (b.read_only, b.unmap, b.locking) == (True, True, "off")
    assert not a.stated
    assert c.filename == "c,d"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("format=raw", "file= is missing; give the image, file=PATH"),
        ("file=x,format=qcow2", "format='qcow2': only raw images are possible; convert it"),
        ("file=x,if=ide", "if='ide': give virtio or none"),
        ("file=x,if=none", "id= is missing"),
        ("file=x,id=1", "id='1' is no name"),
        ("file=x,media=cdrom", "media='cdrom': give disk, and readonly=on"),
        ("file=x,cache=fast", "cache='fast': give one of writeback, none"),
        ("file=x,discrad=unmap", "'discrad' is not known here; did you mean discard?"),
        ("file=x,discard=yes", "discard='yes': give ignore or unmap"),
        ("file=x,werror=stopp", "werror='stopp': give one of enospc, report, ignore, stop"),
        ("file=x,rerror=enospc", "rerror='enospc': give one of report, ignore, stop"),
        ("file=x,aio=native", "aio='native': the one is threads"),
        ("file=x,file.locking=maybe", "file.locking='maybe': give auto, on or off"),
        ("file=x,readonly=maybe", "readonly='maybe' is neither on nor off"),
    ],
)
def test_drive_refused(text, problem):
    with pytest.raises(ConfigError) as caught:
        drive(text)
    assert str(caught.value).startswith("-drive")
    assert problem in str(caught.value)


def test_one_name_is_given_once():
    options = BlockOptions()
    options.add_drive("file=a,id=disk")
    with pytest.raises(ConfigError, match="the name disk is in use"):
        options.add_drive("file=b,id=disk")
    with pytest.raises(ConfigError, match="the name disk is in use"):
        options.add_blockdev("driver=file,node-name=disk,filename=b")


def test_raw_node_over_a_file_node():
    (config,) = nodes(
        "driver=raw,node-name=disk,file=host,discard=unmap",
        "driver=file,node-name=host,filename=a.img,read-only=on,cache.direct=on,discard=unmap",
    )
    assert (config.id, config.filename, config.driver) == ("disk", "a.img", "file")
    assert (config.read_only, config.direct, config.unmap, config.stated) == (True,) * 4


def test_discard_needs_both_nodes():
    (config,) = nodes(
        "driver=raw,node-name=disk,file=host,discard=unmap",
        "driver=file,node-name=host,filename=a.img",
    )
    assert not config.unmap


def test_child_without_a_name_has_its_parents_options():
    (config,) = nodes(
        "raw,node-name=disk,file.driver=host_device,file.filename=/dev/x,cache.direct=on,"
        "discard=unmap,file.locking=off"
    )
    assert (config.driver, config.direct, config.unmap) == ("host_device", True, True)
    assert config.locking == "off"


def test_blockdev_as_json():
    node = {"driver": "raw", "node-name": "d", "read-only": True}
    node["file"] = {"driver": "file", "filename": "a,b.img", "cache": {"direct": True}}
    (config,) = nodes(json.dumps(node))
    assert (config.filename, config.read_only, config.direct) == ("a,b.img", True, True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("driver=raw,file=x", "node-name= is missing"),
        ("driver=qcow2,node-name=n,file=x", "driver='qcow2'; give one of raw, file, host_device"),
        ("node-name=n,filename=x", "driver= is missing; give one of"),
        ("driver=raw,node-name=n", "give either file=NODE or file.driver=file"),
        ("driver=raw,node-name=n,file=a,file.driver=file", "give either file=NODE"),
        ("driver=raw,node-name=n,file=a", "file='a': there is no such node"),
        ("driver=raw,node-name=n,file=n", "file='n': there is no such node"),
        ("driver=file,node-name=n", "filename= is missing"),
        ("driver=file,node-name=n,filename=x,cache.derict=on", "did you mean cache.direct?"),
        ("driver=raw,node-name=n,file.driver=raw,file.file=x", "driver='raw'; give one of"),
        ("driver=file,node-name=n,filename=x,read-only=2", "read-only='2' is neither on nor off"),
        ("{", "is no JSON"),
        ("[" * 100000, "node-name= is missing"),
        ('{"a":' * 100000, "is no JSON"),
        ('{"driver": 1}', "'driver': give a string or a boolean"),
        ('{"driver": "file", "node-name": "n", "filename": "a\\u0000"}', "no path or name"),
    ],
)
def test_blockdev_refused(text, problem):
    with pytest.raises(ConfigError) as caught:
        nodes(text)
    assert str(caught.value).startswith("-blockdev")
    assert problem in str(caught.value)


def test_node_below_two_is_refused():
    with pytest.raises(ConfigError, match="file=c is in use by a"):
        nodes(
            "driver=file,node-name=c,filename=x",
            "driver=raw,node-name=a,file=c",
            "driver=raw,node-name=b,file=c",
        )


def test_each_device_has_a_drive_of_its_own():
    options = BlockOptions()
    options.add_drive("file=a,if=none,id=a")
    drives = options.complete()
    one = ("a", True)
    check_block(drives, [one])
    assert drives[0].share_rw
    with pytest.raises(ConfigError, match="drive='a': it has a device already"):
        check_block(drives, [one, one])
    with pytest.raises(ConfigError, match="drive='b': there is no such drive; add -drive"):
        check_block(drives, [("b", False)])


def test_shape_names_the_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert drive("file=a.img,id=d").shape() == f"d={tmp_path}/a.img"
    assert (
        drive(f"file={tmp_path}/a.img,id=d,readonly=on").shape() == f"d={tmp_path}/a.img,read-only"
    )


def test_shape_without_a_working_directory(tmp_path, monkeypatch):
    """It was deleted since the start: that is no obstacle to an update."""
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert drive("file=a.img,id=d").shape() == "d=a.img"


words = st.sampled_from(
    (
        *("driver", "raw", "file", "=", ",", "file.", "filename", "node-name", "n", "{", '"', ":"),
        *("}", "cache", "none", "read-only", "on", "discard", "unmap", "id", "if", "é", "\0"),
    )
)


@given(st.lists(words, max_size=20).map("".join) | st.text())
def test_only_config_errors(text):
    for read in (drive, nodes):
        problem = ""
        try:
            read(text)
        except ConfigError as error:
            problem = str(error)
        assert len(problem.splitlines()) <= 1
