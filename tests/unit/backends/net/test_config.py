"""``-netdev``: what is taken, and what the operator reads if it is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.backends.net.config import KINDS, check_netdevs, parse_netdev
from pyvmm.errors import ConfigError


def test_values():
    tap = parse_netdev("tap,id=n0,ifname=tap0,script=no,downscript=no,vhost=off")
    assert (tap.kind, tap.id, tap.text("ifname"), tap.flag("vnet_hdr", True)) == (
        "tap",
        "n0",
        "tap0",
        True,
    )
    assert parse_netdev("tap,id=n0,fd=7").number("fd", -1) == 7
    stream = parse_netdev("stream,id=n-1,addr.type=unix,addr.path=/a,,b,reconnect-ms=1500")
    assert stream.text("addr.path") == "/a,b"
    assert stream.reconnect_s == 1.5
    assert parse_netdev("stream,id=x,addr.port=0,server").flag("server")
    assert parse_netdev("stream,id=x,addr.path=p,reconnect=2").reconnect_s == 2


def test_passt_arguments():
    config = parse_netdev(
        "passt,id=n,mtu=9000,address=10.0.0.5,tcp-ports=2222:22,icmp=off,dhcp=on,ipv6=off,"
        "mac=52:55:0a:00:02:02"
    )
    assert config.passt_arguments() == [
        "--address=10.0.0.5",
        "--tcp-ports=2222:22",
        "--mtu=9000",
        "--mac-addr=52:55:0a:00:02:02",
        "--no-icmp",
        "--ipv4-only",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("taps,id=n", "-netdev: 'taps' is no network back end; did you mean tap?"),
        ("pass,id=n", "did you mean passt?"),
        ("user,id=n", "networking without privileges is -netdev passt here"),
        ("socket,id=n", "give stream"),
        ("bogus,id=n", "give one of tap, stream, passt"),
        ("tap", "-netdev tap: id= is missing"),
        ("tap,id=1n", "id='1n' is no name"),
        ("tap,id=n,ifnam=t", "-netdev tap: 'ifnam' is not known here; did you mean ifname?"),
        ("tap,id=n,ifname=", "ifname= is empty"),
        ("tap,id=n,ifname=sixteen-letters-", "has more than 15 bytes"),
        ("tap,id=n,ifname=a/b", "ifname='a/b' is no name of an interface"),
        ("tap,id=n,ifname=a\nb", "ifname='a\\nb' is no name"),
        ("tap,id=n,ifname=..", "is no name"),
        ("tap,id=n,ifname=a,fd=3", "ifname= and fd= exclude each other"),
        ("tap,id=n,fd=2", "give a number from 3"),
        ("tap,id=n,script=/etc/up", "script= is run by nobody here; give script=no"),
        ("tap,id=n,vhost=on", "vhost=on is not supported"),
        ("stream,id=n", "an address is missing"),
        ("stream,id=n,addr.type=inet,addr.host=h", "an address is missing"),
        ("stream,id=n,addr.type=fd", "addr.type='fd': give unix or inet"),
        ("stream,id=n,addr.path=p,addr.port=1", "exclude each other"),
        ("stream,id=n,addr.port=0", "addr.port=0 is for servers"),
        ("stream,id=n,addr.path=p,server=on,reconnect=1", "is for clients"),
        ("stream,id=n,addr.path=p,server=maybe", "neither on nor off"),
        ("passt,id=n,mtu=1", "give a number from 68"),
        ("passt,id=n,ipv4=off,ipv6=off", "leaves nothing"),
    ],
)
def test_errors(text, problem):
    with pytest.raises(ConfigError) as error:
        parse_netdev(text)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


@given(
    st.sampled_from([*KINDS, "x", ""]),
    st.lists(
        st.tuples(
            st.sampled_from(["id", *(key for keys in KINDS.values() for key in keys)])
            | st.text(max_size=8),
            st.sampled_from(["on", "off", "1", "unix", "inet"]) | st.text(max_size=12),
        ),
        max_size=6,
    ),
)
def test_only_config_errors(kind, pairs):
    text = ",".join([kind, *(f"{key}={value}" for key, value in pairs)])
    try:
        config = parse_netdev(text)
    except ConfigError:
        return
    assert config.kind == "passt" or not config.passt_arguments()
    assert config.reconnect_s >= 0


@pytest.mark.parametrize(
    ("users", "problem"),
    [
        (["n2"], "-device: netdev='n2': there is no such back end; add -netdev KIND,id=n2"),
        (["n0", "n0"], "netdev=n0 is in use by another device"),
    ],
)
def test_what_does_not_belong_together(users, problem):
    netdevs = [parse_netdev(f"tap,id={id}") for id in ("n0", "n1")]
    check_netdevs(netdevs, ["n1", "n0"])
    with pytest.raises(ConfigError) as error:
        check_netdevs(netdevs, users)
    assert problem in str(error.value)


def test_one_descriptor_for_two():
    first, second = parse_netdev("tap,id=a,fd=5"), parse_netdev("tap,id=b,fd=0x5")
    other = parse_netdev("stream,id=c,addr.path=p")
    with pytest.raises(ConfigError, match="-netdev tap: fd=5 is given twice; open one for each"):
        check_netdevs([first, second, other], [])
    check_netdevs([first, other], [])


def test_one_name_for_two():
    with pytest.raises(ConfigError, match="the id n0 is given twice"):
        check_netdevs([parse_netdev("tap,id=n0"), parse_netdev("passt,id=n0")], [])
