"""What the operator types: what it means, and what is refused before anything is opened."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.chardev.config import check_chardevs, parse_chardev, parse_chardev_short
from pyvmm.errors import ConfigError

SERVER = {"server": "on", "wait": "off"}


@pytest.mark.parametrize(
    ("text", "kind", "options"),
    [
        ("null,id=c", "null", {}),
        ("stdio,id=c,signal=off,mux=on", "stdio", {"signal": "off", "mux": "on"}),
        ("file,id=c,path=a,,b,append=on", "file", {"path": "a,b", "append": "on"}),
        ("pty,id=c,path=link", "pty", {"path": "link"}),
        ("socket,id=c,path=s,server,nowait", "socket", {"path": "s", **SERVER}),
        ("socket,id=c,host=h,port=1", "socket", {"host": "h", "port": "1"}),
        ("ringbuf,id=c,size=4K", "ringbuf", {"size": "4K"}),
    ],
)
def test_long_form(text, kind, options):
    config = parse_chardev(text)
    assert (config.kind, config.id, config.options) == (kind, "c", options)


@pytest.mark.parametrize(
    ("text", "kind", "options"),
    [
        ("stdio", "stdio", {}),
        ("mon:stdio", "stdio", {"mux": "on", "signal": "off"}),
        ("null", "null", {}),
        ("pty", "pty", {}),
        ("pty:link", "pty", {"path": "link"}),
        ("ringbuf", "ringbuf", {}),
        ("file:a,b=c", "file", {"path": "a,b=c"}),
        ("unix:a,,b,server=on,wait=off", "socket", {"path": "a,b", **SERVER}),
        ("tcp:h:1,server,nowait", "socket", {"host": "h", "port": "1", **SERVER}),
        ("tcp::1", "socket", {"host": "", "port": "1"}),
        ("tcp:[::1]:1", "socket", {"host": "::1", "port": "1"}),
        ("mon:unix:s,server=on", "socket", {"mux": "on", "path": "s", "server": "on"}),
    ],
)
def test_short_form(text, kind, options):
    config = parse_chardev_short(text, "-serial", "serial0")
    assert (config.kind, config.id, config.options) == (kind, "serial0", options)


def test_none_and_references():
    assert parse_chardev_short("none", "-serial", "serial0") is None
    config = parse_chardev_short("chardev:c1", "-serial", "serial0")
    assert (config.kind, config.id) == ("chardev", "c1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is no chardev; give one of null, stdio"),
        ("udp,id=c", "'udp' is no chardev; give one of null, stdio"),
        ("null", "id= is missing"),
        ("null,id=1x", "id='1x' is no name"),
        ("null,id=-", "is no name"),
        ("null,id=c/d", "is no name"),
        ("null,id=" + "c" * 101, "is no name"),
        ("null,id=c,path=x", "'path' is not known here; the keys are mux"),
        ("file,id=c", "path= is missing"),
        ("file,id=c,path=", "path= is empty"),
        ("file,id=c,path=x,append=maybe", "append='maybe' is neither on nor off"),
        ("socket,id=c", "an address is missing"),
        ("socket,id=c,host=h", "an address is missing"),
        ("socket,id=c,path=p,port=1", "exclude each other"),
        ("socket,id=c,host=h,port=65536", "port='65536' is not possible"),
        ("socket,id=c,host=h,port=http", "port='http' is not possible"),
        ("socket,id=c,host=h,port=0", "port=0 is for servers"),
        ("socket,id=c,path=p,wait=on", "wait= is for servers"),
        ("socket,id=c,path=p,server=on,reconnect=1", "reconnect= is for clients"),
        ("socket,id=c,path=p,nodelay=on", "nodelay= is for TCP"),
        ("ringbuf,id=c,size=17M", "is too large"),
        ("ringbuf,id=c,size=0", "is too small"),
        ("stdio,id=c,id=d", "'id' is given twice"),
    ],
)
def test_long_form_refused(text, said):
    with pytest.raises(ConfigError, match=r"^-chardev") as caught:
        parse_chardev(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no chardev; give one of stdio, mon:stdio"),
        ("vc", "there is no display here"),
        ("vc:80Cx24C", "there is no display here"),
        ("stdio,mux=on", "is no chardev"),
        ("mon:none", "is no chardev"),
        ("mon:mon:stdio", "is no chardev"),
        ("mon:chardev:c", "is no chardev"),
        ("null:x", "is no chardev"),
        ("/dev/ttyS0", "is no chardev"),
        ("file:", "path= is empty"),
        ("unix:", "path= is empty"),
        ("unix:p,path=q", "path= is given before"),
        ("tcp:1234", "has no port"),
        ("tcp:h:", "port='' is not possible"),
        ("tcp:h:1,port=2", "port= is given before"),
        ("unix:p,server=on,telnet=on", "'telnet' is not known here; the keys are path"),
        ("chardev:", "id='' is no name"),
        ("file:a\0b", "character"),
    ],
)
def test_short_form_refused(text, said):
    with pytest.raises(ConfigError, match=r"^-serial") as caught:
        parse_chardev_short(text, "-serial", "serial0")
    assert said in str(caught.value)


KEYS = ["backend", "id", "path", "host", "port", "server", "wait", "mux", "size", "reconnect"]
PAIR = st.tuples(st.sampled_from(KEYS), st.text() | st.sampled_from(["on", "0", "c"]))
OPTION = st.tuples(
    st.sampled_from(["null", "stdio", "file", "pty", "socket", "ringbuf", "x"]),
    st.lists(PAIR.map("=".join) | st.text() | st.sampled_from(KEYS)),
).map(lambda parts: ",".join([parts[0], *parts[1]]))


def outcome(parse, *arguments):
    """The configuration, or the error, which is the only other thing that may come out."""
    try:
        return parse(*arguments)
    except ConfigError as error:
        return error


@given(st.text() | OPTION)
def test_long_form_only_config_errors(text):
    result = outcome(parse_chardev, text)
    if isinstance(result, ConfigError):
        assert str(result).startswith("-chardev")
        assert len(str(result).splitlines()) == 1
    else:
        check_chardevs([result])


SHORT = st.sampled_from(["mon:", "tcp:", "unix:", "file:", "chardev:", "pty:", "stdio", "none"])


@given(st.lists(SHORT | st.text() | OPTION).map("".join))
def test_short_form_only_config_errors(text):
    result = outcome(parse_chardev_short, text, "-monitor", "compat_monitor0")
    if isinstance(result, ConfigError):
        assert str(result).startswith("-monitor")
        assert len(str(result).splitlines()) == 1
    else:
        assert result is not None or text == "none"


def test_together():
    chardevs = [parse_chardev("stdio,id=m,mux=on"), parse_chardev("null,id=n")]
    reference = parse_chardev_short("chardev:m", "-serial", "serial0")
    monitor = parse_chardev_short("chardev:m", "-monitor", "compat_monitor0")
    check_chardevs([*chardevs, reference, monitor])


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["null,id=a", "pty,id=a"], "the name a is in use by -chardev"),
        (["stdio,id=a", "stdio,id=b"], "stdio is in use by -chardev a; share it"),
        (["null,id=a", "@b"], "there is no chardev b; add -chardev"),
        (["null,id=a", "@a", "@a"], "chardev a is in use by -serial"),
    ],
)
def test_refused_together(texts, said):
    configs = [
        parse_chardev_short(f"chardev:{text[1:]}", "-serial", "serial0")
        if text.startswith("@")
        else parse_chardev(text)
        for text in texts
    ]
    with pytest.raises(ConfigError) as caught:
        check_chardevs(configs)
    assert said in str(caught.value)
