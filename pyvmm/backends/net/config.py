"""What the operator asks for with ``-netdev``, in QEMU's words.

Pure: nothing is opened. Every value is checked here; the factory only reads them.
"""

from __future__ import annotations

from pyvmm._util.keyval import (
    KeyedOption,
    check_id,
    check_keys,
    did_you_mean,
    parse_int,
    parse_keyval,
    shorten,
)
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_TEXT, _FLAG, _PORT, _SECONDS, _MS, _FD, _MTU = "text flag port seconds ms fd mtu".split()
_LIMITS = {
    _PORT: (0, 65535),
    _SECONDS: (0, 86400),
    _MS: (0, 86400_000),
    _FD: (3, 1 << 20),
    _MTU: (68, 65535),
}

# passt's own options, by QEMU's key. A flag is there to switch something off.
_PASST_TEXTS = (
    *("address", "netmask", "gateway", "interface", "outbound", "outbound-if4", "outbound-if6"),
    *("dns", "dns-forward", "search", "tcp-ports", "udp-ports"),
)
_PASST_FLAGS = ("tcp", "udp", "icmp", "dhcp", "ndp", "dhcpv6", "ra", "ipv4", "ipv6")

# The keys of each kind, beside id.
KINDS: dict[str, dict[str, str]] = {
    "tap": {
        "ifname": _TEXT,
        "fd": _FD,
        "script": _TEXT,
        "downscript": _TEXT,
        "vnet_hdr": _FLAG,
        "vhost": _FLAG,
    },
    "stream": {
        "server": _FLAG,
        "addr.type": _TEXT,
        "addr.path": _TEXT,
        "addr.host": _TEXT,
        "addr.port": _PORT,
        "reconnect": _SECONDS,
        "reconnect-ms": _MS,
    },
    "passt": {
        "path": _TEXT,
        "mac": _TEXT,
        "mtu": _MTU,
        **dict.fromkeys(_PASST_TEXTS, _TEXT),
        **dict.fromkeys(_PASST_FLAGS, _FLAG),
    },
}


class NetdevConfig(KeyedOption):
    """One network back end that is asked for.

    :param kind: one of :data:`KINDS`
    :param options: key to value, as typed
    :raises ConfigError: for a key or value that the kind does not have
    """

    __slots__ = ("id", "kind")

    def __init__(self, kind: str, id: str, options: dict[str, str], option: str) -> None:
        self.kind = kind
        self.id = id
        self.options = options
        self.option = f"{option} {kind}"
        self._check()

    def number(self, key: str, default: int = 0) -> int:
        """Return a value that is a number; *default* if it is not given."""
        value = self.options.get(key)
        if value is None:
            return default
        return parse_int(value, self.option, key, *_LIMITS[KINDS[self.kind][key]])

    @property
    def reconnect_s(self) -> float:
        """Seconds until a client calls again; 0 for never."""
        return self.number("reconnect-ms") / 1000 or float(self.number("reconnect"))

    def shape(self) -> str:
        """Return what has to stay the same over a live update."""
        if self.kind == "stream":
            return f"stream {self.id} {'unix' if 'addr.path' in self.options else 'inet'}"
        offloads = "" if self.flag("vnet_hdr", True) else " vnet_hdr=off"
        return f"{self.kind} {self.id}{offloads}"

    def passt_arguments(self) -> list[str]:
        """Return the arguments of passt's command line."""
        words = [f"--{key}={self.text(key)}" for key in _PASST_TEXTS if key in self.options]
        words += [f"--mtu={self.number('mtu')}"] if "mtu" in self.options else []
        words += [f"--mac-addr={self.text('mac')}"] if "mac" in self.options else []
        for key in _PASST_FLAGS:
            if not self.flag(key, True):
                other = {"ipv4": "--ipv6-only", "ipv6": "--ipv4-only"}
                words.append(other.get(key, f"--no-{key}"))
        return words

    def _check(self) -> None:
        keys = KINDS[self.kind]
        check_keys(self.options, keys, self.option)
        for key, value in self.options.items():
            if keys[key] == _FLAG:
                self.flag(key)
            elif keys[key] != _TEXT:
                self.number(key)
            elif not value and key != "addr.host":
                raise self._error(f"{key}= is empty; leave it out or give a value")
        if self.kind == "tap":
            self._check_tap()
        elif self.kind == "stream":
            self._check_stream()
        elif not (self.flag("ipv4", True) or self.flag("ipv6", True)):
            raise self._error("ipv4=off,ipv6=off leaves nothing; leave one out")

    def _check_tap(self) -> None:
        if len(self.text("ifname").encode("utf-8", "surrogateescape")) > 15:
            raise self._error(f"ifname={shorten(self.text('ifname'))} has more than 15 bytes")
        # What the kernel takes for a name (dev_valid_name), as far as it can be printed.
        name = self.text("ifname")
        if not name.isprintable() or name in (".", "..") or set(name) & set("/: "):
            raise self._error(f"ifname={shorten(name)} is no name of an interface; give one: tap0")
        if "ifname" in self.options and "fd" in self.options:
            raise self._error("ifname= and fd= exclude each other; leave one out")
        for key in ("script", "downscript"):
            if self.options.get(key, "no") != "no":
                raise self._error(f"{key}= is run by nobody here; give {key}=no")
        if self.flag("vhost"):
            raise self._error("vhost=on is not supported; give vhost=off")

    def _check_stream(self) -> None:
        given = self.options
        path, inet = "addr.path" in given, "addr.host" in given or "addr.port" in given
        type = given.get("addr.type", "inet" if inet else "unix")
        if type not in ("unix", "inet"):
            raise self._error(f"addr.type={shorten(type)}: give unix or inet")
        if (type == "unix" and not path) or (type == "inet" and "addr.port" not in given):
            raise self._error(
                "an address is missing; give addr.type=unix,addr.path=PATH or"
                " addr.type=inet,addr.host=HOST,addr.port=PORT"
            )
        if path and inet:
            raise self._error("addr.path= and addr.host=, addr.port= exclude each other")
        server = self.flag("server")
        if server and self.reconnect_s:
            raise self._error("reconnect-ms= is for clients; leave it out with server=on")
        if not server and inet and not self.number("addr.port"):
            raise self._error("addr.port=0 is for servers; give the port to connect to")

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.option}: {problem}")


def parse_netdev(text: str, option: str = "-netdev") -> NetdevConfig:
    """Return what the value of ``-netdev`` asks for: ``KIND,id=ID,key=value``.

    :raises ConfigError: naming the option, the value and the mend
    """
    flags = [key for keys in KINDS.values() for key, form in keys.items() if form == _FLAG]
    values = parse_keyval(text, option, implied_key="type", flags=flags)
    kind = values.pop("type", "")
    if kind not in KINDS:
        raise ConfigError(f"{option}: {shorten(kind)} is no network back end; {_mend(kind)}")
    id = values.pop("id", "")
    if not id:
        raise ConfigError(f"{option} {kind}: id= is missing; give the back end a name, id=NAME")
    check_id(id, f"{option} {kind}")
    return NetdevConfig(kind, id, values, option)


def check_netdevs(netdevs: Iterable[NetdevConfig], users: Iterable[str]) -> None:
    """Refuse back ends and devices that do not belong together.

    :param users: ``netdev=`` of each network device
    :raises ConfigError: two of one name, a name that nothing has, two devices on one
    """
    made: set[str] = set()
    given: set[int] = set()
    for netdev in netdevs:
        fd = netdev.number("fd", -1)
        if fd in given:
            raise ConfigError(f"{netdev.option}: fd={fd} is given twice; open one for each")
        given |= {fd} - {-1}
        if netdev.id in made:
            raise ConfigError(f"{netdev.option}: the id {netdev.id} is given twice; rename one")
        made.add(netdev.id)
    used: set[str] = set()
    for user in users:
        if user not in made:
            raise ConfigError(
                f"-device: netdev={shorten(user)}: there is no such back end; add"
                f" -netdev KIND,id={user if user.isidentifier() else 'ID'}"
            )
        if user in used:
            raise ConfigError(f"-device: netdev={user} is in use by another device; add a -netdev")
        used.add(user)


def _mend(kind: str) -> str:
    if kind in ("user", "slirp"):
        return "networking without privileges is -netdev passt here"
    if kind in ("socket", "dgram"):
        return "give stream"
    return did_you_mean(kind, KINDS) or f"give one of {', '.join(KINDS)}"
