"""The bytes of the fuzzer, taken apart. Beyond their end are zeros: any bytes are an input."""


class Input:
    """One input, read from its beginning."""

    def __init__(self, data):
        self._data = data
        self._at = 0

    def __bool__(self):
        """Whether something is left."""
        return self._at < len(self._data)

    def bytes(self, count):
        """The next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def number(self, size=1):
        """The next bytes as a number."""
        return int.from_bytes(self.bytes(size), "little")

    def below(self, limit):
        """A number from 0 on."""
        return self.number(1 if limit <= 1 << 8 else 2 if limit <= 1 << 16 else 4) % limit

    def pick(self, choices):
        """One of them."""
        return choices[self.below(len(choices))]

    def rest(self):
        """All that is left."""
        return self.bytes(len(self._data))
