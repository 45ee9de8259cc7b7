"""Migration parameters and capabilities, under QEMU's names and with its defaults.

Those that belong to ways of migrating that pyvmm does not have can be set and are shown, and
have no effect. No parameter is carried over a live update: the new image begins with the defaults.
"""

from __future__ import annotations

from pyvmm._util.sizes import parse_size
from pyvmm.errors import CommandError, ConfigError
from pyvmm.migration.status import SUPPORTED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MODES = ("normal", "cpr-reboot", "cpr-transfer", "cpr-exec")
MAX_INT = (1 << 63) - 1

# name, default, unit as ``info migrate_parameters`` shows it. A tuple lists the legal words.
_PARAMETERS: tuple[tuple[str, Any, str, tuple[str, ...]], ...] = (
    ("announce-initial", 50, " ms", ()),
    ("announce-max", 550, " ms", ()),
    ("announce-rounds", 5, "", ()),
    ("announce-step", 100, " ms", ()),
    ("throttle-trigger-threshold", 50, "", ()),
    ("cpu-throttle-initial", 20, "", ()),
    ("cpu-throttle-increment", 10, "", ()),
    ("cpu-throttle-tailslow", False, "", ()),
    ("max-cpu-throttle", 99, "", ()),
    ("tls-creds", "", "", ()),
    ("tls-hostname", "", "", ()),
    ("tls-authz", "", "", ()),
    ("max-bandwidth", 134217728, " bytes/second", ()),
    ("avail-switchover-bandwidth", 0, " bytes/second", ()),
    ("max-postcopy-bandwidth", 0, " bytes/second", ()),
    ("downtime-limit", 300, " ms", ()),
    ("x-checkpoint-delay", 20000, " ms", ()),
    ("multifd-channels", 2, "", ()),
    ("multifd-compression", "none", "", ("none", "zlib", "zstd")),
    ("zero-page-detection", "multifd", "", ("none", "legacy", "multifd")),
    ("xbzrle-cache-size", 67108864, " bytes", ()),
    ("x-vcpu-dirty-limit-period", 1000, " ms", ()),
    ("vcpu-dirty-limit", 1, " MB/s", ()),
    ("mode", "normal", "", MODES),
    ("direct-io", False, "", ()),
    ("x-rdma-chunk-size", 1048576, " bytes", ()),
    ("cpr-exec-command", [], "", ()),
    # pyvmm's own: whether the guest runs through the exec, if it can.
    ("cpr-exec-running", True, "", ()),
)

_CAPABILITIES = (
    "xbzrle rdma-pin-all auto-converge events postcopy-ram x-colo release-ram return-path "
    "pause-before-switchover multifd dirty-bitmaps postcopy-blocktime late-block-activate "
    "x-ignore-shared validate-uuid background-snapshot zero-copy-send postcopy-preempt "
    "switchover-ack dirty-limit mapped-ram"
)


class Settings:
    """Named values that keep their type.

    :param values: defaults by name, in the order of ``info``
    :param units: what ``info`` shows behind a value
    :param words: legal words of the values that are one
    """

    def __init__(
        self,
        values: dict[str, Any],
        units: dict[str, str] | None = None,
        words: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        self._values = values
        self._units = units or {}
        self._words = words or {}

    def names(self) -> list[str]:
        """Return all names, in the order of ``info``."""
        return list(self._values)

    def get(self, name: str) -> Any:
        """Return one value."""
        return self._values[name]

    def words(self, name: str) -> tuple[str, ...]:
        """Return the legal values of a name, if they can be listed (for completion)."""
        if name in self._values and isinstance(self.get(name), bool):
            return ("on", "off")
        return self._words.get(name, ())

    def text(self, name: str) -> str:
        """Return one value as ``info`` shows it."""
        value = self.get(name)
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, list):
            return " ".join(value)
        if isinstance(value, str) and name.startswith("tls-"):
            return f"'{value}'"
        return f"{value}{self._units.get(name, '')}"

    def set_text(self, name: str, text: str) -> None:
        """Set one value from what was typed.

        :raises CommandError: with QEMU's texts
        """
        if name not in self._values:
            raise CommandError(f"invalid parameter value: {name}")
        self.update({name: self._parse(name, text)})

    def update(self, values: dict[str, Any]) -> None:
        """Set several values, or none of them.

        :raises CommandError: with QEMU's texts
        """
        for name, value in values.items():
            self._check(name, value)
        for name, value in values.items():
            self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        self._values[name] = value

    def _parse(self, name: str, text: str) -> Any:
        old = self.get(name)
        if isinstance(old, bool):
            if text not in ("on", "off"):
                raise CommandError(f"Parameter '{name}' expects 'on' or 'off'")
            return text == "on"
        if isinstance(old, int):
            try:
                return parse_size(text, name, maximum=MAX_INT)
            except ConfigError:
                raise CommandError(f"Parameter '{name}' expects a number") from None
        return split_command(text) if isinstance(old, list) else text

    def _check(self, name: str, value: Any) -> None:
        if name not in self._values:
            raise CommandError(f"Parameter '{name}' is unexpected")
        old = self.get(name)
        if type(value) is not type(old) or (
            isinstance(value, list) and not all(isinstance(word, str) for word in value)
        ):
            expected = {bool: "boolean", int: "integer", list: "array"}.get(type(old), "string")
            raise CommandError(f"Invalid parameter type for '{name}', expected: {expected}")
        if isinstance(value, int) and not 0 <= value <= MAX_INT:
            raise CommandError(f"Parameter '{name}' expects a value from 0 to {MAX_INT}")
        if isinstance(value, str) and self._words.get(name, (value,)).count(value) == 0:
            raise CommandError(f"Parameter '{name}' does not accept value '{value}'")


class Capabilities(Settings):
    """Capabilities: all known ones are listed, the supported ones can be switched on.

    :param on: names of those that are on, which is kept as it changes
    """

    def __init__(self, on: set[str]) -> None:
        super().__init__(dict.fromkeys(_CAPABILITIES.split(), False))
        self._on = on

    def get(self, name: str) -> Any:
        return name in self._on

    def _set(self, name: str, value: Any) -> None:
        if value:
            self._on.add(name)
        else:
            self._on.discard(name)

    def _check(self, name: str, value: Any) -> None:
        if name not in self._values:
            raise CommandError(f"Parameter 'capability' does not accept value '{name}'")
        super()._check(name, value)
        if value and name not in SUPPORTED:
            raise CommandError(f"Capability '{name}' is not supported by this machine")


def parameters() -> Settings:
    """Return the parameters with their defaults."""
    return Settings(
        {name: default for name, default, _, _ in _PARAMETERS},
        {name: unit for name, _, unit, _ in _PARAMETERS},
        {name: words for name, _, _, words in _PARAMETERS if words},
    )


def split_command(text: str) -> list[str]:
    """Return the words of a command line, split as a shell does.

    :raises CommandError: for quotes that do not close
    """
    import shlex

    try:
        return shlex.split(text)
    except ValueError as error:
        raise CommandError(f"Parameter 'cpr-exec-command': {error}") from None
