"""The module that cffi compiles: access to C's types, and what is in lib.pyi."""

from typing import Any

from _cffi_backend import FFI as _FFI

from pyvmm._native import lib as lib

class FFI(_FFI):
    # The members of structures and the items of arrays have no static type.
    def new(self, cdecl: Any, init: Any = ...) -> Any: ...
    def cast(self, cdecl: Any, value: Any) -> Any: ...
    def unpack(self, cdata: Any, length: int) -> Any: ...

ffi: FFI
