"""What was asked for: the same for every benchmark."""


class Plan:
    """How to measure.

    :ivar runs: samples of each
    :ivar quick: leave out what takes long
    :ivar smp: numbers of vCPUs, for those that vary them; empty: one, as ever
    :ivar updates: how many of those of which the longest pause counts
    :ivar pictures: a folder for pictures of one of them, or None
    :ivar plain: updates stop the guest first
    :ivar beside: measure QEMU, too, where there is one
    :ivar version: the :class:`harness.versions.Version` that is measured
    """

    def __init__(
        self,
        runs,
        *,
        quick=False,
        smp=(),
        updates=1000,
        pictures=None,
        plain=False,
        beside=True,
        version=None,
    ):
        self.runs = runs
        self.updates = updates
        self.pictures = pictures
        self.plain = plain
        self.beside = beside
        self.quick = quick
        self.smp = smp
        self.version = version

    def but(self, **changes):
        """The same, with other values."""
        return Plan(**self.__dict__ | changes)


def cpu_counts(text):
    """The numbers in ``--smp``'s value.

    :raises ValueError: it is none
    """
    words = text.split(",")
    if not all(word.isascii() and word.isdecimal() and int(word) for word in words):
        raise ValueError(f"{text!r} is no list of numbers of vCPUs, such as 1,8,16")
    return tuple(int(word) for word in words)
