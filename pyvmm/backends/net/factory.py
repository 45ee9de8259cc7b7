"""All network back ends of a machine: made from configurations, found by name, saved, closed.

Loop thread only.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.backends.net.base import NetBackend
    from pyvmm.backends.net.config import NetdevConfig
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover


class NetdevSet:
    """The back ends, in the order in which they were made."""

    def __init__(self, loop: EventLoop, handover: Handover) -> None:
        self._loop = loop
        self._handover = handover
        self._netdevs: dict[str, NetBackend] = {}

    def create(self, config: NetdevConfig) -> NetBackend:
        """Make a back end and return it.

        :raises ConfigError: if what it names cannot be opened
        :raises VmStateError: if an inherited descriptor is of another kind
        """
        netdev = self._netdevs[config.id] = _make(config, self._loop, self._handover)
        netdev.parcel.board(netdev)
        return netdev

    def get(self, id: str) -> NetBackend:
        """Return the back end of that name; the caller knows that there is one."""
        return self._netdevs[id]

    def items(self) -> list[tuple[str, NetBackend]]:
        """Return names and back ends."""
        return list(self._netdevs.items())

    def load_state(self) -> None:
        """Go on with what the image before saved. State of one that is gone is dropped.

        :raises VmStateError: if a state is not possible
        """
        for netdev in self._netdevs.values():
            state = netdev.parcel.take_state()
            if state:
                netdev.load_state(state)

    def close(self) -> None:
        """Close all."""
        while self._netdevs:
            _id, netdev = self._netdevs.popitem()
            netdev.close()


def _make(config: NetdevConfig, loop: EventLoop, handover: Handover) -> NetBackend:
    # Modules are imported as they are needed: a live update waits for each.
    if config.kind == "tap":
        from pyvmm.backends.net.tap import TapBackend

        return TapBackend(
            config.id,
            loop,
            handover,
            ifname=config.text("ifname"),
            fd=config.number("fd", -1),
            vnet_hdr=config.flag("vnet_hdr", True),
            option=config.option,
        )
    if config.kind == "passt":
        from pyvmm.backends.net.passt import PROGRAM, PasstBackend

        return PasstBackend(
            config.id,
            loop,
            handover,
            program=config.text("path") or PROGRAM,
            arguments=config.passt_arguments(),
            option=config.option,
        )
    from pyvmm.backends.net.stream import SocketBackend
    from pyvmm.chardev.address import Address, TcpAddress, UnixAddress

    address: Address
    if config.text("addr.path"):
        address = UnixAddress(config.text("addr.path"), config.option)
    else:
        host, port = config.text("addr.host"), config.number("addr.port")
        address = TcpAddress(host, port, config.option)
    return SocketBackend(
        config.id,
        loop,
        handover,
        address=address,
        server=config.flag("server"),
        reconnect_s=config.reconnect_s,
    )
