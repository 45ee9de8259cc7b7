"""Words, switches, formats and expressions, also of people who mean no good."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.monitor.hmp.parser import ParseError, evaluate, first_word, parse_arguments

REGISTERS = {"rax": 0x1234, "rip": 0xFFFFFFFF80000000, "cs.base": 7}


def value(text):
    result, rest = evaluate(text, REGISTERS.get)
    assert not rest.strip()
    return result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1+2", 3),
        ("0x10", 16),
        ("010", 8),
        ("0", 0),
        ("2*3+4", 10),
        ("2+3*4", 14),
        ("2*3&1", 2),  # & binds closer than *, unlike in C
        ("1|2^3", 0),
        ("(1+2)*3", 9),
        ("-1", -1),
        ("~0", -1),
        ("0-1", -1),
        ("7/2", 3),
        ("7%4", 3),
        ("'A'", 65),
        ("$rax", 0x1234),
        ("$rip", 0xFFFFFFFF80000000 - (1 << 64)),
        ("$cs.base + 1", 8),
        (" 1 + 2 ", 3),
        ("0xffffffffffffffff", -1),
    ],
)
def test_values(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "unexpected end of expression"),
        ("1+", "unexpected end of expression"),
        ("(1", "')' expected"),
        ("1/0", "division by zero"),
        ("1%0", "division by zero"),
        ("$bogus", "unknown register"),
        ("xyz", "invalid char 'x' in expression"),
        ("0x", "invalid number"),
        ("09", "invalid number"),
        ("12ab", "invalid number"),
        ("0x10000000000000000", "number too large"),
        ("9" * 4000, "invalid number"),
        ("'", "character constant expected"),
        ("'AB", "missing terminating ' character"),
        ("(" * 4000, "expression is nested too deeply"),
        ("~" * 4000, "expression is nested too deeply"),
    ],
)
def test_errors(text, problem):
    with pytest.raises(ParseError) as caught:
        evaluate(text, REGISTERS.get)
    assert str(caught.value) == problem


def parse(description, text):
    return parse_arguments("cmd", description, text, REGISTERS.get)


def test_switches_words_and_the_rest():
    parsed = parse("detach:-d,resume:-r,uri:s", " -d file:a ")
    assert parsed == {"detach": True, "resume": False, "uri": "file:a"}
    assert parse("a:-a,b:-b,uri:s", "-ab x") == {"a": True, "b": True, "uri": "x"}
    assert parse("p:s,v:S", "  mode  a  b c ") == {"p": "mode", "v": "a  b c"}
    assert parse("uri:s", r'"a b\"c\n"') == {"uri": 'a b"c\n'}
    assert parse("vcpu:i?", "") == {"vcpu": None}
    assert parse("state:b", "on") == {"state": True}
    assert parse("val:l", "-1") == {"val": -1}


@pytest.mark.parametrize(
    ("description", "text", "problem"),
    [
        ("uri:s", "", "cmd: string expected"),
        ("uri:S", "  ", "cmd: string expected"),
        ("d:-d,uri:s", "-x a", "cmd: unsupported option -x"),
        ("uri:s", "a b", "cmd: extraneous characters at the end of line"),
        ("uri:s", '"a', "unterminated string"),
        ("uri:s", '"a\\', "unsupported escape code: '\\'"),
        ("state:b", "maybe", "cmd: expected 'on' or 'off'"),
        ("index:i", "0x100000000", "'cmd' has failed: integer is for 32-bit values"),
        ("fmt:/,addr:l", "/4q 0", "invalid char in format: 'q'"),
    ],
)
def test_argument_errors(description, text, problem):
    with pytest.raises(ParseError) as caught:
        parse(description, text)
    assert str(caught.value) == problem


def test_formats():
    fmt = parse("fmt:/,addr:l", "/4wx 0x1000")["fmt"]
    assert (fmt.count, fmt.kind, fmt.size) == (4, "x", 4)
    fmt = parse("fmt:/,addr:l", "0x1000")["fmt"]
    assert (fmt.count, fmt.kind, fmt.size) == (None, None, None)
    assert parse("fmt:/,addr:l", "/" + "9" * 4000 + " 0")["fmt"].count < 1 << 64


def test_a_format_may_follow_at_once():
    assert first_word("  p/x 1") == ("p", "/x 1")
    assert first_word("/") == ("/", "")
    assert first_word("") == ("", "")


DESCRIPTIONS = st.sampled_from(
    ["", "uri:s", "d:-d,r:-r,uri:s", "p:s,v:S", "fmt:/,addr:l", "fmt:/,a:i,i:i?", "state:b"]
)


@given(DESCRIPTIONS, st.text())
def test_any_text_is_parsed_or_refused(description, text):
    try:
        parsed = parse(description, text)
    except ParseError:
        return
    assert set(parsed) == {one.partition(":")[0] for one in description.split(",") if one}


@given(st.text(alphabet="0123456789abcdefx+-*/%&|^~()' $rip.", max_size=200))
def test_any_expression_has_a_64_bit_value_or_is_refused(text):
    try:
        result, rest = evaluate(text, REGISTERS.get)
    except ParseError:
        return
    assert -(1 << 63) <= result < 1 << 63
    assert text.endswith(rest)


@given(
    st.recursive(
        st.integers(0, (1 << 64) - 1).map(str),
        lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("+-*&|^"), inner),
        max_leaves=8,
    )
)
def test_arithmetic_is_that_of_python_modulo_2_64(text):
    exact = eval(text) & ((1 << 64) - 1)
    assert value(text) & ((1 << 64) - 1) == exact
