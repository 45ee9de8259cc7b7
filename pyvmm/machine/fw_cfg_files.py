"""``-fw_cfg``: items that the operator gives the guest, by QEMU's rules for their names.

A file is read once, at the first start: what a guest was told stays, whatever becomes of the file,
and goes over an update in a sealed memfd (``fw_cfg/NAME``).
"""

from __future__ import annotations

import os

from pyvmm._util import log
from pyvmm._util.keyval import check_keys, parse_keyval, shorten
from pyvmm.cpr.handover import FW_CFG
from pyvmm.devices.fw_cfg import Bytes, FilePart
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.cpr.handover import Handover
    from pyvmm.devices.fw_cfg import Item

#: Bytes of a name, with a NUL behind them.
NAME_SIZE = 56
#: How many items there can be.
MOST = 32
#: Bytes of one file.
LARGEST = 256 << 20
#: What names of users begin with; others are QEMU's and the firmware's.
PREFIX = "opt/"
#: Names that the machine has itself, in the order of their keys: never changed, since a guest
#: remembers keys over an update.
OWN_NAMES = (
    "etc/e820",
    "etc/acpi/rsdp",
    "etc/acpi/tables",
    "etc/table-loader",
    "etc/pvpanic-port",
    "etc/vmcoreinfo",
)
_STEP = 1 << 20


class FwCfgConfig:
    """A ``-fw_cfg``.

    :ivar file: path of its contents; empty if they are ``text``
    """

    __slots__ = ("file", "name", "text")

    def __init__(self, name: str, file: str, text: str) -> None:
        self.name = name
        self.file = file
        self.text = text

    def shape(self) -> str:
        """Return what an update must keep; the contents of a file it keeps itself."""
        return f"{self.name} (file)" if self.file else f"{self.name}={self.text}"


def parse(value: str, option: str, others: Iterable[FwCfgConfig]) -> FwCfgConfig:
    """Return the item that one ``-fw_cfg`` asks for.

    :param others: those before it
    :raises ConfigError: naming the key that cannot be, and the mend
    """
    keys = parse_keyval(value, option, implied_key="name")
    check_keys(keys, ("name", "file", "string"), option)
    name = keys.get("name", "")
    if not name or ("file" in keys) == ("string" in keys):
        raise ConfigError(f"{option}: give name= and one of file= and string=")
    if not name.isascii() or not name.isprintable() or len(name) >= NAME_SIZE:
        raise ConfigError(
            f"{option}: name={shorten(name)}: give at most {NAME_SIZE - 1} ASCII characters"
        )
    if name in OWN_NAMES:
        raise ConfigError(f"{option}: name={name} is the machine's own; choose {PREFIX}...")
    taken = [other.name for other in others]
    if name in taken:
        raise ConfigError(f"{option}: name={name} is given twice; leave one of them out")
    if len(taken) == MOST:
        raise ConfigError(f"{option}: {name} is one too many; at most {MOST}")
    if "file" in keys and not keys["file"]:
        raise ConfigError(f"{option}: file= is empty; give a path")
    return FwCfgConfig(name, keys.get("file", ""), keys.get("string", ""))


class FwCfgFiles:
    """The contents of the items.

    :param handover: has those of files in an update, and takes them to the next
    :raises ConfigError: a file cannot be read
    """

    def __init__(self, configs: Iterable[FwCfgConfig], handover: Handover) -> None:
        self._handover = handover
        self._fds: dict[str, int] = {}
        self.items: dict[str, Item] = {}
        try:
            for config in configs:
                self.items[config.name] = self._open(config)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the memory back."""
        for name, fd in self._fds.items():
            self._handover.parcel(FW_CFG, name).close(fd)
        self._fds.clear()

    def _open(self, config: FwCfgConfig) -> Item:
        if not config.name.startswith(PREFIX) and not self._handover.is_incoming:
            log.say(f"-fw_cfg: name={config.name}: names of users should begin with {PREFIX}")
        if not config.file:
            return Bytes(os.fsencode(config.text))
        parcel = self._handover.parcel(FW_CFG, config.name)
        fd = parcel.require(f"contents of -fw_cfg {config.name}")
        if fd is None:
            try:
                fd = _copy(config)
            except OSError as error:
                raise ConfigError(f"-fw_cfg: file={config.file}: {error.strerror}") from None
        self._fds[config.name] = fd
        parcel.keep(fd)
        return FilePart(fd, 0, os.fstat(fd).st_size)


def _copy(config: FwCfgConfig) -> int:
    """Return a memfd with the file's contents. It may be a pipe."""
    import fcntl

    source = os.open(config.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fd = os.memfd_create("fw_cfg", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            size = 0
            while data := os.read(source, _STEP):
                size += len(data)
                if size > LARGEST:
                    raise ConfigError(
                        f"-fw_cfg: file={config.file} has more than {LARGEST >> 20} MiB; "
                        "give a smaller one"
                    )
                while data:
                    data = data[os.write(fd, data) :]
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
    finally:
        os.close(source)
    return fd
