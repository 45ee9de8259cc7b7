"""The port of POST codes, where nobody listens: guests write there for the time that it takes.

Native code answers it, and the bus gives what it gives everywhere else without a device. Has no
state.
"""

from __future__ import annotations

from pyvmm._native import ffi, lib
from pyvmm.core.native import NativeAnswers
from pyvmm.devices.base import Device


class PostPort(Device):
    """The port."""

    name = "post-code"

    def __init__(self) -> None:
        super().__init__()
        self.answers = NativeAnswers(lib.PYVMM_NOBODY, ffi.NULL, (0,), (0,))
