"""What the operator asks for with ``-chardev``, ``-serial``, ``-monitor`` and their like.

Pure: nothing is opened or looked up, so that a whole command line can be found good or bad
beforehand. Every value is checked here; the factory only reads them.
"""

from __future__ import annotations

from pyvmm._util.keyval import (
    KeyedOption,
    check_id,
    check_keys,
    check_text,
    parse_int,
    parse_keyval,
    shorten,
)
from pyvmm._util.sizes import parse_size
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_TEXT, _FLAG, _PORT, _SECONDS, _SIZE = "text", "flag", "port", "seconds", "size"
_LARGEST_SIZE = 16 << 20  # of a ringbuf, which is carried over an update as state

# The keys of each kind, beside id.
KINDS: dict[str, dict[str, str]] = {
    "null": {"mux": _FLAG},
    "stdio": {"signal": _FLAG, "mux": _FLAG},
    "file": {"path": _TEXT, "append": _FLAG, "mux": _FLAG},
    "pty": {"path": _TEXT, "mux": _FLAG},
    "socket": {
        "path": _TEXT,
        "host": _TEXT,
        "port": _PORT,
        "server": _FLAG,
        "wait": _FLAG,
        "reconnect": _SECONDS,
        "nodelay": _FLAG,
        "mux": _FLAG,
    },
    "ringbuf": {"size": _SIZE, "mux": _FLAG},
}
_KIND_LIST = ", ".join(KINDS)
_SHORT_LIST = (
    "stdio, mon:stdio, pty, null, none, ringbuf, file:PATH, unix:PATH, tcp:HOST:PORT, chardev:ID"
)


class ChardevConfig(KeyedOption):
    """One chardev that is asked for, or (kind ``chardev``) the name of one made elsewhere.

    :param kind: one of :data:`KINDS`, or ``chardev``
    :param options: key to value, as typed
    :param option: the option that asks for it, for errors
    :raises ConfigError: for a key or value that the kind does not have
    """

    __slots__ = ("id", "kind")

    def __init__(self, kind: str, id: str, options: dict[str, str], option: str) -> None:
        self.kind = kind
        self.id = id
        self.options = options
        self.option = option
        self._check()

    def number(self, key: str, default: int = 0) -> int:
        """Return a port, or a number of seconds; *default* if it is not given."""
        value = self.options.get(key)
        largest = 65535 if key == "port" else 86400
        return default if value is None else parse_int(value, self.option, key, 0, largest)

    def size(self, key: str, default: int) -> int:
        """Return a number of bytes; *default* if it is not given."""
        value = self.options.get(key)
        if value is None:
            return default
        return parse_size(value, f"{self.option}: {key}", maximum=_LARGEST_SIZE)

    def line(self) -> str:
        """Return the value of ``-chardev`` that asks for the same."""
        items = [self.kind, f"id={self.id}", *(f"{k}={v}" for k, v in self.options.items())]
        return ",".join(item.replace(",", ",,") for item in items)

    def shape(self) -> str:
        """Return what has to stay the same over a live update, for the descriptors to fit."""
        family = ("unix " if "path" in self.options else "tcp ") if self.kind == "socket" else ""
        return f"{family}{self.kind}{',mux=on' if self.flag('mux') else ''}"

    def _check(self) -> None:
        if self.kind == "chardev":
            return
        keys = KINDS[self.kind]
        check_keys(self.options, keys, f"{self.option} {self.kind}")
        for key in self.options:
            if keys[key] == _FLAG:
                self.flag(key)
            elif keys[key] in (_PORT, _SECONDS):
                self.number(key)
            elif keys[key] == _SIZE:
                self.size(key, 0)
            elif not self.options[key] and key != "host":
                raise self._error(f"{key}= is empty; give a {key}")
        if self.kind == "file" and "path" not in self.options:
            raise self._error("path= is missing; give the file to write, path=FILE")
        if self.kind == "socket":
            self._check_socket()

    def _check_socket(self) -> None:
        given = self.options
        if "path" in given and ("host" in given or "port" in given):
            raise self._error("path= and host=, port= exclude each other; leave one out")
        if "path" not in given and "port" not in given:
            raise self._error("an address is missing; give path=PATH or host=HOST,port=PORT")
        if "path" in given and "nodelay" in given:
            raise self._error("nodelay= is for TCP; leave it out with path=")
        server = self.flag("server")
        if server and "reconnect" in given:
            raise self._error("reconnect= is for clients; leave it out with server=on")
        if not server and "wait" in given:
            raise self._error("wait= is for servers; add server=on")
        if not server and "port" in given and self.number("port") == 0:
            raise self._error("port=0 is for servers; give the port to connect to")

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.option} {self.kind}: {problem}")


def parse_chardev(text: str, option: str = "-chardev") -> ChardevConfig:
    """Return what the value of ``-chardev`` asks for: ``KIND,id=ID,key=value``.

    :raises ConfigError: naming the option, the value and the mend
    """
    values = parse_keyval(text, option, implied_key="backend", flags=_flags(KINDS.values()))
    kind = values.pop("backend", "")
    if kind not in KINDS:
        raise ConfigError(f"{option}: {shorten(kind)} is no chardev; give one of {_KIND_LIST}")
    id = values.pop("id", "")
    if not id:
        raise ConfigError(f"{option} {kind}: id= is missing; give the chardev a name, id=NAME")
    check_id(id, option)
    return ChardevConfig(kind, id, values, option)


def parse_chardev_short(text: str, option: str, id: str) -> ChardevConfig | None:
    """Read the value of ``-serial``, ``-monitor`` or ``-qmp``: a chardev in few words.

    :param id: the name that the chardev gets, e.g. ``serial0``
    :returns: None for ``none``
    :raises ConfigError: naming the option, the value and the mend
    """
    check_text(text, option)
    options: dict[str, str] = {}
    rest = text.removeprefix("mon:")
    if rest != text:
        options["mux"] = "on"
    kind, colon, value = rest.partition(":")
    if rest == "none" and not options:
        return None
    if kind == "chardev" and colon and not options:
        check_id(value, option)
        return ChardevConfig("chardev", value, {}, option)
    if rest == "stdio":
        if options:
            # The terminal is the guest's too, and so is Ctrl-C.
            options["signal"] = "off"
    elif kind == "pty" and value:
        options["path"] = value
    elif kind == "file" and colon:
        options["path"] = value  # to the end, commas and all, as in QEMU
    elif kind in ("unix", "tcp") and colon:
        options |= _parse_address(kind, value, option)
        kind = "socket"
    elif rest not in ("null", "pty", "ringbuf"):
        mend = "there is no display here, give another" if kind == "vc" else "give one"
        raise ConfigError(f"{option}: {shorten(text)} is no chardev; {mend} of {_SHORT_LIST}")
    return ChardevConfig(kind, id, options, option)


def check_chardevs(configs: Iterable[ChardevConfig]) -> None:
    """Refuse chardevs that cannot be there together.

    :raises ConfigError: two of one name, two on stdio, or a name that nothing has
    """
    configs = list(configs)
    made: dict[str, ChardevConfig] = {}
    stdio: ChardevConfig | None = None
    for config in configs:
        if config.kind == "chardev":
            continue
        if config.id in made:
            raise ConfigError(
                f"{config.option}: the name {config.id} is in use by {made[config.id].option};"
                " give another id"
            )
        made[config.id] = config
        if config.kind == "stdio":
            if stdio is not None:
                raise ConfigError(
                    f"{config.option} {config.id}: stdio is in use by {stdio.option} {stdio.id};"
                    " share it with mux=on, or use mon:stdio"
                )
            stdio = config
    users: dict[str, str] = {}
    for config in configs:
        if config.kind != "chardev":
            continue
        if config.id not in made:
            raise ConfigError(
                f"{config.option}: there is no chardev {config.id};"
                f" add -chardev KIND,id={config.id}"
            )
        if config.id in users and not made[config.id].flag("mux"):
            raise ConfigError(
                f"{config.option}: chardev {config.id} is in use by {users[config.id]};"
                " give the chardev mux=on"
            )
        users[config.id] = config.option


def _parse_address(kind: str, text: str, option: str) -> dict[str, str]:
    """Return the options in ``PATH,key=value`` or ``HOST:PORT,key=value``."""
    values = parse_keyval(text, option, implied_key="address", flags=_flags([KINDS["socket"]]))
    address = values.pop("address", "")
    for key in ("path", "host", "port"):
        if key in values:
            raise ConfigError(f"{option} {kind}: {key}= is given before the first comma already")
    if kind == "unix":
        values["path"] = address
        return values
    host, colon, port = address.rpartition(":")
    if not colon:
        raise ConfigError(f"{option} tcp: {shorten(address)} has no port; write HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    values["host"] = host
    values["port"] = port
    return values


def _flags(kinds: Iterable[dict[str, str]]) -> list[str]:
    return [key for keys in kinds for key, form in keys.items() if form == _FLAG]
