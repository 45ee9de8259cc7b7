"""Saving and loading the machine, and live update by exec."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.migration.channel import Channel


def open_channel(uri: str) -> "Channel":
    """Return the channel that a URI names, which nothing has touched yet.

    :raises MigrationError: with QEMU's texts
    """
    from pyvmm.migration import channel

    if uri == channel.MemoryChannel.text:
        return channel.MemoryChannel()
    # Time of an update's pause for those that need none; ``outgoing`` has imported it.
    from pyvmm.migration import file_channel

    return file_channel.FileChannel(uri)
