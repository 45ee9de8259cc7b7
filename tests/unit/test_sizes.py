import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm._util.sizes import format_size, parse_size
from pyvmm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1048576", 1 << 20),
        ("4G", 4 << 30),
        ("256m", 256 << 20),
        ("7B", 7),
        ("0x1000", 4096),
        ("0XbE", 0xBE),
        ("007K", 7 << 10),
        ("7E", 7 << 60),
    ],
)
def test_sizes(text, size):
    assert parse_size(text, "-m") == size


def test_default_unit_is_for_bare_decimal_numbers_only():
    assert parse_size("512", "-m", default_unit="M") == 512 << 20
    assert parse_size("512K", "-m", default_unit="M") == 512 << 10
    assert parse_size("0x200000", "-m", default_unit="M") == 2 << 20


@pytest.mark.parametrize(
    "text",
    ["", "G", "1G1", "-5", "+5", "1.5G", "1 G", " 1", "1_000", "1GiB", "1MB", "0x", "0x1G", "x",
     "\u0661", "1\n", "G1", "1e3", "0b1", "\0"],
)  # fmt: skip
def test_what_is_not_a_size(text):
    with pytest.raises(ConfigError, match=r"^-m: .* is not a size; write ") as caught:
        parse_size(text, "-m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "-m: '0' is too small; give at least 2M"),
        ("1", "-m: '1' is too small; give at least 2M"),
        ("99999P", "-m: '99999P' is too large; give at most 1T"),
        ("9" * 19 + "E", "-m: '9999999999999999999E' is too large; give at most 1T"),
        ("1048577K", "-m: '1048577K' is not a multiple of 4K; give 1048580K"),
    ],
)
def test_bounds_name_the_mend(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_size(text, "-m", default_unit="M", minimum=2 << 20, maximum=1 << 40, multiple=4096)
    assert str(caught.value) == message


def test_endless_digits_are_too_large_and_not_repeated_to_the_user():
    with pytest.raises(ConfigError, match="too large") as caught:
        parse_size("9" * 1_000_000, "-m")
    assert len(str(caught.value)) < 120
    assert parse_size("0" * 1000 + "8", "-m") == 8


@given(st.integers(1, (1 << 63) - 1))
def test_format_is_read_back(size):
    assert parse_size(format_size(size), "x", default_unit="M") == size


@given(st.text(max_size=30))
def test_only_config_error_comes_out(text):
    message = "x: "
    try:
        assert parse_size(text, "x") > 0
    except ConfigError as error:
        message = str(error)
    assert message.startswith("x: ")
    assert message.isprintable()


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0B"), (1000, "1000B"), (4 << 30, "4G"), (1536 << 20, "1536M")]
)
def test_format(size, text):
    assert format_size(size) == text
