"""What the operator says about a block of RAM: ``-object memory-backend-...`` and its defaults."""

from __future__ import annotations

from pyvmm._util.keyval import check_keys, check_text, parse_bool, shorten
from pyvmm._util.sizes import format_size, parse_size
from pyvmm.errors import ConfigError

KINDS = ("memory-backend-memfd", "memory-backend-file", "memory-backend-ram")

_PAGE = 4096
_NAME_MAX = 249  # memfd_create(2)


class RamConfig:
    """What the operator asked for; the names are QEMU's properties.

    ``share`` None means the kind's own default: on for memfd, off for the others. ``hugetlbsize``
    0 means the host's default huge page.
    """

    __slots__ = (
        "dump", "hugetlb", "hugetlbsize", "id", "kind", "mem_path", "merge", "prealloc", "seal",
        "share", "size",
    )  # fmt: skip

    def __init__(
        self,
        kind: str,
        id: str,
        size: int,
        *,
        mem_path: str = "",
        share: bool | None = None,
        hugetlb: bool = False,
        hugetlbsize: int = 0,
        prealloc: bool = False,
        seal: bool = True,
        merge: bool = True,
        dump: bool = True,
    ) -> None:
        self.kind = kind
        self.id = id
        self.size = size
        self.mem_path = mem_path
        self.share = kind == "memory-backend-memfd" if share is None else share
        self.hugetlb = hugetlb
        self.hugetlbsize = hugetlbsize
        self.prealloc = prealloc
        self.seal = seal
        self.merge = merge
        self.dump = dump
        self._check()

    @classmethod
    def from_options(cls, kind: str, options: dict[str, str]) -> RamConfig:
        """Return what ``-object KIND,key=value,...`` asks for.

        :raises ConfigError: unknown kind or key, missing id or size, impossible value
        """
        where = f"-object {kind}"
        if kind not in KINDS:
            raise ConfigError(f"{where}: unknown kind of memory; use one of {', '.join(KINDS)}")
        known = {"id", "size", "share", "prealloc", "merge", "dump"}
        if kind == "memory-backend-memfd":
            known |= {"hugetlb", "hugetlbsize", "seal"}
        elif kind == "memory-backend-file":
            known.add("mem-path")
        check_keys(options, sorted(known), where)
        for key in ("id", "size"):
            if not options.get(key):
                raise ConfigError(f"{where}: {key} is missing; add {key}=...")
        id = options["id"]
        if (
            not id.isascii()
            or not id[0].isalpha()
            or not all(c.isalnum() or c in "-._" for c in id)
        ):
            raise ConfigError(f"{where}: id={shorten(id)} is no name; use letters, digits and -._")

        def flag(key: str, default: bool) -> bool:
            return parse_bool(options[key], where, key) if key in options else default

        huge = options.get("hugetlbsize")
        return cls(
            kind,
            id,
            parse_size(options["size"], f"{where}: size", multiple=_PAGE),
            mem_path=options.get("mem-path", ""),
            share=flag("share", kind == KINDS[0]),
            hugetlb=flag("hugetlb", False),
            hugetlbsize=parse_size(huge, f"{where}: hugetlbsize", minimum=_PAGE) if huge else 0,
            prealloc=flag("prealloc", False),
            seal=flag("seal", True),
            merge=flag("merge", True),
            dump=flag("dump", True),
        )

    def _check(self) -> None:
        where = f"-object {self.kind},id={self.id}"
        if self.size <= 0 or self.size % _PAGE:
            raise ConfigError(f"{where}: size={self.size} is not a multiple of 4K above 0")
        if len(self.id) > _NAME_MAX:
            raise ConfigError(f"{where}: too long an id; use at most {_NAME_MAX} characters")
        check_text(self.mem_path, f"{where},mem-path")
        if self.kind == "memory-backend-file" and not self.mem_path:
            raise ConfigError(f"{where}: mem-path is missing; add mem-path=FILE or DIRECTORY")
        huge = self.hugetlbsize
        if huge and not self.hugetlb:
            raise ConfigError(f"{where}: hugetlbsize needs hugetlb; add hugetlb=on")
        if huge and (huge & (huge - 1) or self.size % huge):
            raise ConfigError(
                f"{where}: hugetlbsize={format_size(huge)} is not a power of two that divides"
                f" size={format_size(self.size)}"
            )
