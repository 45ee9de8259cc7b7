"""The option syntax: what is split where, and that nothing but ConfigError comes out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm._util.keyval import check_keys, parse_bool, parse_int, parse_keyval
from pyvmm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("stdio,id=c0", {"backend": "stdio", "id": "c0"}),
        ("id=c0", {"id": "c0"}),
        ("file,path=a,,b=c", {"backend": "file", "path": "a,b=c"}),
        ("file,path=a,,", {"backend": "file", "path": "a,"}),
        ("file,path=,,,id=x", {"backend": "file", "path": ",", "id": "x"}),
        ("socket,server,nowait", {"backend": "socket", "server": "on", "wait": "off"}),
        ("socket,nodelay", {"backend": "socket", "nodelay": "on"}),
        ("a=b=c", {"a": "b=c"}),
        ("stdio,", {"backend": "stdio"}),
        ("a=", {"a": ""}),
        ("", {"backend": ""}),
    ],
)
def test_split(text, values):
    flags = ("server", "wait", "nodelay", "delay")
    assert parse_keyval(text, "-chardev", implied_key="backend", flags=flags) == values


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x,a=1,a=2", "'a' is given twice"),
        ("x,word", "'word' has no value"),
        ("x,notaflag", "'notaflag' has no value"),
        ("x,=1", "'=1' has no key"),
        ("x,,,=1", "'=1' has no key"),
        ("x,path=a\0b", "character"),
        ("x,path=\ud800", "character"),
    ],
)
def test_refused(text, named):
    with pytest.raises(ConfigError, match=r"^-chardev: ") as caught:
        parse_keyval(text, "-chardev", implied_key="backend", flags=("wait",))
    assert named in str(caught.value)


def test_bare_first_word_without_an_implied_key():
    with pytest.raises(ConfigError, match="-machine: 'pc' has no value"):
        parse_keyval("pc", "-machine")


WORD = st.text(st.characters(codec="utf-8", exclude_characters="\0=,"), min_size=1)
VALUE = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@given(st.dictionaries(WORD, VALUE, min_size=1))
def test_what_is_written_is_read(values):
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in values.items())
    assert parse_keyval(text, "-x") == values


@given(st.text())
def test_only_config_errors(text):
    try:
        values = parse_keyval(text, "-x", implied_key="first", flags=("wait",))
    except ConfigError as error:
        values = {"error": str(error)}
    assert all(isinstance(value, str) for value in values.values())
    assert len(values.get("error", "").splitlines()) <= 1


def test_keys_that_are_not_known_are_named_beside_those_that_are():
    with pytest.raises(
        ConfigError, match=r"'pth' is not known here; did you mean path\? The keys are path, append"
    ):
        check_keys({"path": "x", "pth": "x"}, ("path", "append"), "-chardev")


@pytest.mark.parametrize(("text", "value"), [("on", True), ("yes", True), ("off", False)])
def test_bool(text, value):
    assert parse_bool(text, "-x", "wait") is value


def test_bool_refused():
    with pytest.raises(ConfigError, match="wait='maybe' is neither on nor off"):
        parse_bool("maybe", "-x", "wait")


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("0x10", 16), ("65535", 65535)])
def test_int(text, value):
    assert parse_int(text, "-x", "port", 0, 65535) == value


@pytest.mark.parametrize(
    "text", ["", "65536", "-1", "+1", " 1", "1_0", "0x", "\u0661", "9" * 5000, "1e3", "0x-1"]
)
def test_int_refused(text):
    with pytest.raises(ConfigError, match=r"port=.* give a number from 0 to 65535"):
        parse_int(text, "-x", "port", 0, 65535)
