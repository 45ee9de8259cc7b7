"""What the operator says about disk images: ``-drive`` and ``-blockdev``.

Pure: nothing is opened or looked up. QEMU's tree of block nodes is taken as far as raw images
need it: a ``raw`` node over a ``file`` or ``host_device`` node, or one of the latter alone.
Left out: other formats, backing files, throttling.
"""

from __future__ import annotations

import os

from pyvmm._util.keyval import check_id, check_keys, parse_bool, parse_keyval, shorten
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SECTOR = 512  # virtio's unit, whatever the disk's

#: ``cache=``: whether writes may wait for a flush, O_DIRECT, whether flushes are ignored.
CACHE_MODES = {
    "writeback": (True, False, False),
    "none": (True, True, False),
    "writethrough": (False, False, False),
    "directsync": (False, True, False),
    "unsafe": (True, False, True),
}
DRIVERS = ("raw", "file", "host_device")
#: What follows an error of the host, in writing and in reading; the first is the default.
WERROR = ("enospc", "report", "ignore", "stop")
RERROR = ("report", "ignore", "stop")
_MEND_FORMAT = (
    "only raw images are possible; convert it with qemu-img convert -O raw, and give format=raw"
)

_NODE = ("driver", "node-name", "read-only", "auto-read-only", "discard", "detect-zeroes")
_CACHE = ("cache.direct", "cache.no-flush")
_PROTOCOL = (*_NODE, *_CACHE, "filename", "aio", "locking")
#: Keys of ``-drive``.
DRIVE_KEYS = (
    *("file", "format", "if", "id", "media", "readonly", "read-only", "cache", "cache.writeback"),
    *(*_CACHE, "discard", "detect-zeroes", "aio", "werror", "rerror", "file.locking"),
)


class BlockConfig:
    """One disk image.

    :ivar id: name of the ``-drive``, or node name of the ``-blockdev``
    :ivar is_drive: whether it is a ``-drive``
    :ivar driver: ``file``, ``host_device``, or empty for whichever the path is
    :ivar stated: whether the operator said that it is raw
    :ivar writeback: whether a write is done when the host's page cache has it
    :ivar direct: bypass the page cache (O_DIRECT)
    :ivar no_flush: ignore flushes
    :ivar unmap: whether discards reach the disk image
    :ivar locking: ``on``, ``off`` or ``auto`` (where the file system can)
    :ivar share_rw: whether others may write the disk image meanwhile
    :ivar werror: one of :data:`WERROR`: ``stop`` pauses the guest, whose request is repeated when
        it goes on, and ``enospc`` does so if there is no space, and tells the guest otherwise
    :ivar rerror: one of :data:`RERROR`
    """

    __slots__ = (
        "direct", "driver", "filename", "id", "is_drive", "locking", "no_flush", "read_only",
        "rerror", "share_rw", "stated", "unmap", "werror", "writeback",
    )  # fmt: skip

    def __init__(self, id: str, filename: str) -> None:
        self.id = id
        self.filename = filename
        self.is_drive = False
        self.driver = ""
        self.stated = True
        self.read_only = self.direct = self.no_flush = self.unmap = self.share_rw = False
        self.writeback = True
        self.locking = "auto"
        self.werror, self.rerror = WERROR[0], RERROR[0]

    @property
    def where(self) -> str:
        """The option that asks for it, for errors."""
        return f"-drive {self.id}" if self.is_drive else f"-blockdev {self.id}"

    def shape(self) -> str:
        """Return what has to stay the same over a live update."""
        access = ",read-only" if self.read_only else ""
        try:
            path = os.path.abspath(self.filename)
        except OSError:  # the working directory was deleted, which both images find
            path = self.filename
        return f"{self.id}={path}{access}"


class BlockOptions:
    """Collects ``-drive`` and ``-blockdev``, and tells in the end what disk images there are.

    :ivar implied: the drives that ``if=virtio`` asks for a device for, in order
    """

    def __init__(self) -> None:
        self._drives: list[BlockConfig] = []
        self._nodes: dict[str, dict[str, str]] = {}
        self.implied: list[str] = []

    def add_drive(self, text: str, option: str = "-drive") -> None:
        """Read the value of ``-drive``.

        :raises ConfigError: naming the option, the value and the mend
        """
        keys = parse_keyval(text, option)
        check_keys(keys, DRIVE_KEYS, option)
        interface = keys.get("if", "virtio")
        if interface not in ("none", "virtio"):
            raise ConfigError(f"{option}: if={shorten(interface)}: give virtio or none")
        filename = keys.get("file", "")
        if not filename:
            raise ConfigError(f"{option}: file= is missing; give the image, file=PATH")
        id = keys.get("id", "")
        if not id and interface == "none":
            raise ConfigError(f"{option}: id= is missing; a -device names the drive by it")
        drive = BlockConfig(id or f"virtio{len(self.implied)}", filename)
        check_id(drive.id, option)
        drive.is_drive = True
        drive.stated = "format" in keys
        if keys.get("format", "raw") != "raw":
            raise ConfigError(f"{option}: format={shorten(keys['format'])}: {_MEND_FORMAT}")
        if keys.get("media", "disk") != "disk":
            raise ConfigError(
                f"{option}: media={shorten(keys['media'])}: give disk, and readonly=on for a CD"
            )
        drive.werror = _policy(keys, "werror", WERROR, option)
        drive.rerror = _policy(keys, "rerror", RERROR, option)
        for key in ("readonly", "read-only"):
            drive.read_only |= _flag(keys, key, option)
        cache = keys.get("cache", "writeback")
        if cache not in CACHE_MODES:
            raise ConfigError(
                f"{option}: cache={shorten(cache)}: give one of {', '.join(CACHE_MODES)}"
            )
        drive.writeback, drive.direct, drive.no_flush = CACHE_MODES[cache]
        drive.writeback = _flag(keys, "cache.writeback", option, drive.writeback)
        drive.direct = _flag(keys, "cache.direct", option, drive.direct)
        drive.no_flush = _flag(keys, "cache.no-flush", option, drive.no_flush)
        drive.unmap = _unmap(keys, option)
        drive.locking = _locking(keys, "file.locking", option)
        _only(keys, "detect-zeroes", "off", option)
        _only(keys, "aio", "threads", option)
        self._check_free(drive.id, option)
        self._drives.append(drive)
        if interface == "virtio":
            self.implied.append(drive.id)

    def add_blockdev(self, text: str, option: str = "-blockdev") -> None:
        """Read the value of ``-blockdev``, with dotted keys or as a JSON object.

        :raises ConfigError: naming the option, the value and the mend
        """
        if text.startswith("{"):
            keys = _flatten(text, option)
        else:
            keys = parse_keyval(text, option, implied_key="driver")
        name = keys.get("node-name", "")
        if not name:
            raise ConfigError(f"{option}: node-name= is missing; a -device names the node by it")
        check_id(name, option)
        where = f"{option} {name}"
        if keys.get("driver") == "raw":
            inner = {
                key[len("file.") :]: value for key, value in keys.items() if key[:5] == "file."
            }
            outer = {key: value for key, value in keys.items() if key[:5] != "file."}
            check_keys(outer, (*_NODE, *_CACHE, "file"), where)
            if ("file" in keys) == bool(inner):
                raise ConfigError(
                    f"{where}: give either file=NODE or file.driver=file,file.filename=PATH"
                )
            if inner:
                self._check_protocol(inner, where)
        else:
            self._check_protocol(keys, where)
        for key in ("read-only", "auto-read-only", "cache.direct", "cache.no-flush"):
            for each in (key, f"file.{key}"):
                _flag(keys, each, where)
        self._check_free(name, option)
        self._nodes[name] = keys

    def complete(self) -> list[BlockConfig]:
        """Return the disk images, each once.

        :raises ConfigError: a ``file=`` that is no node, or is used twice
        """
        found = list(self._drives)
        below: dict[str, str] = {}
        for name, keys in self._nodes.items():
            node = keys.get("file")
            if node is None:
                continue
            where = f"-blockdev {name}"
            if node not in self._nodes or self._nodes[node]["driver"] == "raw":
                raise ConfigError(
                    f"{where}: file={shorten(node)}: there is no such node;"
                    f" add -blockdev driver=file,node-name={shorten(node)[1:-1]},filename=PATH"
                )
            if node in below:
                raise ConfigError(f"{where}: file={node} is in use by {below[node]}; add another")
            below[node] = name
        for name, keys in self._nodes.items():
            if name not in below:
                found.append(self._node(name, keys))
        return found

    def _node(self, name: str, keys: dict[str, str]) -> BlockConfig:
        where = f"-blockdev {name}"
        if keys["driver"] != "raw":
            upper = lower = keys
        elif "file" in keys:
            upper, lower = keys, self._nodes[keys["file"]]
        else:
            # A child without a name of its own has its parent's options unless it says so.
            upper = keys
            lower = {key: keys[key] for key in (*_CACHE, "discard") if key in keys}
            lower |= {key[5:]: value for key, value in keys.items() if key[:5] == "file."}
        config = BlockConfig(name, lower["filename"])
        config.driver = lower["driver"]
        config.read_only = any(_flag(each, "read-only", where) for each in (upper, lower))
        config.direct = _flag(lower, "cache.direct", where)
        config.no_flush = any(_flag(each, "cache.no-flush", where) for each in (upper, lower))
        config.unmap = all(_unmap(each, where) for each in (upper, lower))
        config.locking = _locking(lower, "locking", where)
        return config

    def _check_protocol(self, keys: dict[str, str], where: str) -> None:
        driver = keys.get("driver", "")
        if driver not in DRIVERS[1:]:
            problem = f"driver={shorten(driver)}" if driver else "driver= is missing"
            mend = f"give one of {', '.join(DRIVERS)}"
            raise ConfigError(f"{where}: {problem}; {mend}; {_MEND_FORMAT}")
        check_keys(keys, _PROTOCOL, where)
        if not keys.get("filename"):
            raise ConfigError(f"{where}: filename= is missing; give the image, filename=PATH")
        _only(keys, "aio", "threads", where)
        _only(keys, "detect-zeroes", "off", where)
        _unmap(keys, where)
        _locking(keys, "locking", where)

    def _check_free(self, id: str, option: str) -> None:
        if id in self._nodes or any(drive.id == id for drive in self._drives):
            raise ConfigError(f"{option}: the name {id} is in use; give another")


def check_block(drives: list[BlockConfig], users: Iterable[tuple[str, bool]]) -> None:
    """See that each device has a drive of its own, and tell the drive what the device allows.

    :param users: of each device, the drive that it names, and whether others may write that
    :raises ConfigError: a drive that is not there, or two devices on one
    """
    known = {drive.id: drive for drive in drives}
    used = set()
    for id, share_rw in users:
        where = f"-device virtio-blk-device: drive={shorten(id)}"
        if id not in known:
            raise ConfigError(
                f"{where}: there is no such drive; add -drive file=PATH,format=raw,if=none,"
                f"id={shorten(id)[1:-1]}"
            )
        if id in used:
            raise ConfigError(f"{where}: it has a device already; if=none keeps it for this one")
        used.add(id)
        known[id].share_rw = share_rw


def _flatten(text: str, option: str) -> dict[str, str]:
    import json

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option}: {shorten(text)} is no JSON: {error}") from None
    flat: dict[str, str] = {}

    def walk(prefix: str, node: dict[str, object], depth: int) -> None:
        for key, item in node.items():
            if isinstance(item, dict) and depth < 3:
                walk(f"{prefix}{key}.", item, depth + 1)
            elif isinstance(item, bool):
                flat[prefix + key] = "on" if item else "off"
            elif isinstance(item, str):
                flat[prefix + key] = item
            else:
                raise ConfigError(f"{option}: {shorten(prefix + key)}: give a string or a boolean")

    walk("", value, 0)
    # The same checks as for words: the kernel must be able to take each for a path.
    for key, item in flat.items():
        parse_keyval(f"{key.replace(',', ',,')}={item.replace(',', ',,')}", option)
    return flat


def _flag(keys: Mapping[str, str], key: str, option: str, default: bool = False) -> bool:
    return parse_bool(keys[key], option, key) if key in keys else default


def _unmap(keys: Mapping[str, str], option: str) -> bool:
    value = keys.get("discard", "ignore")
    if value not in ("ignore", "off", "unmap", "on"):
        raise ConfigError(f"{option}: discard={shorten(value)}: give ignore or unmap")
    return value in ("unmap", "on")


def _locking(keys: Mapping[str, str], key: str, option: str) -> str:
    value = keys.get(key, "auto")
    if value not in ("auto", "on", "off"):
        raise ConfigError(f"{option}: {key}={shorten(value)}: give auto, on or off")
    return value


def _policy(keys: Mapping[str, str], key: str, known: tuple[str, ...], option: str) -> str:
    value = keys.get(key, known[0])
    if value not in known:
        raise ConfigError(f"{option}: {key}={shorten(value)}: give one of {', '.join(known)}")
    return value


def _only(keys: Mapping[str, str], key: str, value: str, option: str) -> None:
    if keys.get(key, value) != value:
        raise ConfigError(f"{option}: {key}={shorten(keys[key])}: the one is {value}")
