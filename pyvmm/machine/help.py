"""What ``-OPTION help`` and ``-OPTION KIND,help`` print. Imported only when that is asked for."""

from __future__ import annotations

from pyvmm._util.keyval import did_you_mean, shorten
from pyvmm.errors import ConfigError
from pyvmm.machine.options import OPTIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def describe(option: str, kind: str) -> str:
    """Return the text for an option; for all options if it is empty.

    :param kind: what stood before ``,help``; empty for the option itself
    :raises ConfigError: there is no such kind
    """
    kinds = _kinds(option)
    if kind and kinds:
        if kind not in kinds:
            mend = did_you_mean(kind, kinds) or f"give one of {', '.join(kinds)}"
            raise ConfigError(f"-{option}: {shorten(kind)} is not known here; {mend}")
        return f"-{option} {kind}:\n" + "".join(f"  {key}\n" for key in kinds[kind])
    lines = [] if option else ["usage: pyvmm run [OPTION...]\n\n"]
    for name in [option] if option else OPTIONS:
        argument, text, _ = OPTIONS[name]
        if name == "device":
            text = f"{text}:\n{_drivers()}"
        lines.append(f"  -{name} {argument}".rstrip() + "\n")
        lines += [f"        {line}\n" for line in text.split("\n")]
    if option == "cpu":
        from pyvmm.x86.cpu_features import known

        lines += ["\n", *_wrap("features", known())]
    elif option == "drive":
        from pyvmm.backends.block_config import DRIVE_KEYS

        lines += ["\n", *_wrap("keys", DRIVE_KEYS)]
    elif kinds:
        lines.append(f"\nThe keys of each: -{option} KIND,help\n")
    return "".join(lines)


def _wrap(title: str, words: Iterable[str]) -> list[str]:
    from textwrap import wrap

    text = f"{title}: {' '.join(words)}"
    return [f"{line}\n" for line in wrap(text, subsequent_indent="  ", break_on_hyphens=False)]


def _drivers() -> str:
    from pyvmm.machine import drivers

    width = max(map(len, drivers.FILES))
    lines = [f"{name:{width}}  {drivers.find(name).help}" for name in drivers.FILES]
    return "\n".join([*lines, f"{', '.join(drivers.ALIASES)}: the same as with -pci"])


def _kinds(option: str) -> dict[str, Iterable[str]]:
    """Return the keys of each kind that an option has."""
    if option == "device":
        from pyvmm.machine import drivers

        found = {name: drivers.find(name) for name in drivers.FILES}
        return {name: [one.name for one in driver.properties] for name, driver in found.items()}
    if option == "netdev":
        from pyvmm.backends.net import config as netdevs

        return {kind: ("id", *keys) for kind, keys in netdevs.KINDS.items()}
    if option == "chardev":
        from pyvmm.chardev import config as chardevs

        return {kind: ("id", *keys) for kind, keys in chardevs.KINDS.items()}
    return {}
