import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.memory.config import KINDS, RamConfig

MEMFD, FILE, RAM = KINDS
SIZE = 2 << 20


def test_options():
    config = RamConfig.from_options(
        MEMFD,
        {"id": "m", "size": "4G", "share": "off", "hugetlb": "on", "hugetlbsize": "2M",
         "prealloc": "on", "seal": "off", "merge": "off", "dump": "off"},
    )  # fmt: skip
    assert (config.id, config.size, config.share, config.hugetlbsize) == ("m", 4 << 30, False, SIZE)
    assert (config.prealloc, config.seal, config.merge, config.dump) == (True, False, False, False)
    config = RamConfig.from_options(FILE, {"id": "f", "size": "4096", "mem-path": "/x"})
    assert (config.size, config.mem_path, config.share) == (4096, "/x", False)
    assert RamConfig.from_options(MEMFD, {"id": "m", "size": "4K"}).share
    assert not RamConfig.from_options(RAM, {"id": "m", "size": "4K"}).share


GOOD = {"id": "m", "size": "4M"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("memory-backend-shm", GOOD, "unknown kind of memory; use one of"),
        (RAM, {**GOOD, "mem-path": "/x"}, "'mem-path' is not known here; the keys are dump, id,"),
        (FILE, {**GOOD, "mem-path": "/x", "hugetlb": "on"}, "'hugetlb' is not known here"),
        (RAM, {"size": "4M"}, "id is missing; add id="),
        (RAM, {"id": "m"}, "size is missing; add size="),
        (RAM, {"id": "m", "size": "0"}, "size: '0' is too small"),
        (RAM, {"id": "m", "size": "4097"}, "size: '4097' is not a multiple of 4K; give 8K"),
        (RAM, {"id": "m", "size": "1.5G"}, "is not a size"),
        (RAM, {**GOOD, "share": "maybe"}, "share='maybe' is neither on nor off"),
        (FILE, GOOD, "mem-path is missing"),
        (FILE, {**GOOD, "mem-path": "a\0b"}, "no path or name can have"),
        (MEMFD, {**GOOD, "id": "x" * 250}, "too long an id"),
        (MEMFD, {**GOOD, "id": "a\nb"}, "is no name; use letters, digits and -._"),
        (MEMFD, {**GOOD, "id": "1a"}, "is no name"),
        (MEMFD, {**GOOD, "id": "ä"}, "is no name"),
        (MEMFD, {**GOOD, "hugetlbsize": "2M"}, "hugetlbsize needs hugetlb; add hugetlb=on"),
        (MEMFD, {**GOOD, "hugetlb": "on", "hugetlbsize": "8M"}, "hugetlbsize=8M is not a power"),
        (MEMFD, {**GOOD, "hugetlb": "on", "hugetlbsize": "12K"}, "hugetlbsize=12K is not a power"),
    ],
)
def test_options_that_are_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        RamConfig.from_options(kind, options)
    assert str(caught.value).startswith(f"-object {kind}")


KEYS = ["id", "size", "share", "hugetlb", "hugetlbsize", "mem-path", "seal", "x"]


@given(
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(["on", "off", "4M", "1G"]) | st.text()),
)
def test_any_options_give_a_config_or_config_error(kind, options):
    message = f"-object {kind}"
    try:
        assert RamConfig.from_options(kind, options).size % 4096 == 0
    except ConfigError as error:
        message = str(error)
    assert message.startswith(f"-object {kind}")
    assert message.isprintable()
