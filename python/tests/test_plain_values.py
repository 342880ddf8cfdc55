"""Plain values come back exactly, or are refused by their key path."""

from __future__ import annotations

import collections
import enum
import io
import math
import pickle
import struct
import sys

import ml_dtypes
import numpy
import pytest
import torch
from helpers import assert_same, round_trip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import strandline

floats = st.floats(width=64) | st.integers(0, 2**64 - 1).map(
    lambda bits: struct.unpack("d", struct.pack("Q", bits))[0]
)
text = st.text(st.characters(codec=None), max_size=8)  # Lone surrogates and NUL included.
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | floats
    | text
    | st.binary(max_size=20)
    | st.builds(bytearray, st.binary(max_size=8))
    | st.builds(complex, floats, floats)
    | st.builds(io.BytesIO, st.binary(max_size=8))
)
keys = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=6)
    | st.binary(max_size=6)
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(collections.OrderedDict)
        | st.dictionaries(keys, st.integers(), max_size=3).map(collections.Counter)
    ),
    max_leaves=12,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(trees)
def test_any_tree_of_plain_values_comes_back_exactly(tmp_path, value):
    assert_same(value, round_trip(value, tmp_path))


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        -math.nan,
        -0.0,
        math.inf,
        -math.inf,
        5e-324,
        2**63 - 1,
        2**63,
        -(2**63),
        -(2**63) - 1,
        2**127,
        10**4000,
        -(10**4000) + 1,
        10**8000 + 7,
        7**20000,
        True,
        1,
        1.0,
        "",
        "a\0b",
        "\ud800",
        b"",
        b"\0\xff",
        (),
        [],
        {},
        ((),),
        [()],
        {"": {}},
        {1: "int", "1": "str", b"1": "bytes", None: "none", 2.5: "float"},
        {True: "bool"},
        {"a.b": 1, "a": {"b": 2}},
        collections.OrderedDict(b=1, a=2),
        collections.Counter("strandline"),
        numpy.float64(1.5),
        numpy.float32("nan"),
        numpy.float16(-0.0),
        numpy.int8(-3),
        numpy.uint64(2**64 - 1),
        numpy.bool_(True),
        numpy.complex64(1 - 2j),
        numpy.complex128(1 - 2j),
        numpy.str_("word\0"),
        numpy.bytes_(b"bytes\0"),
        numpy.datetime64("2024-02-29T12:00", "s"),
        numpy.timedelta64(5, "D"),
        ml_dtypes.bfloat16(1.5),
        torch.Size([2, 3]),
        torch.Size([]),
        torch.float32,
        torch.bfloat16,
        torch.device("cpu"),
        torch.device("cuda", 3),
        torch.device("meta"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_comes_back_exactly(tmp_path, value):
    assert_same(value, round_trip(value, tmp_path))


def test_a_stream_keeps_its_position(tmp_path):
    stream = io.BytesIO(b"0123456789")
    stream.seek(4)
    back = round_trip(stream, tmp_path)
    assert back.read() == b"456789"
    assert stream.tell() == 4


def test_an_ordered_dict_keeps_its_order_after_a_move(tmp_path):
    ordered = collections.OrderedDict(a=1, b=2, c=3)
    ordered.move_to_end("a")
    assert list(round_trip(ordered, tmp_path)) == ["b", "c", "a"]


def test_an_ordered_dict_keeps_its_metadata(tmp_path):
    ordered = torch.nn.Linear(2, 2).state_dict()
    back = round_trip(ordered, tmp_path)
    assert back._metadata == {"": {"version": 1}}
    assert_same(ordered, back)


def test_integers_do_not_depend_on_the_limit_of_python(tmp_path):
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(5000)
    try:
        assert round_trip(3**30000, tmp_path) == 3**30000
    finally:
        sys.set_int_max_str_digits(limit)


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Name(str, enum.Enum):
    ADAM = "adam"


class MyDict(dict):
    pass


class MyList(list):
    pass


class MyFloat(float):
    pass


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (Color.RED, ".value"),
        (Level.LOW, ".value"),
        (Name.ADAM, ".value"),
        (Point(1, 2), "tuple(value)"),
        (collections.defaultdict(int), "dict(value)"),
        (MyDict(), "dict(value)"),
        (MyList(), "list(value)"),
        (MyFloat(1), "float(value)"),
        ({1, 2}, "sorted(value)"),
        (numpy.longdouble(1), "allow_pickle"),
        (object(), "allow_pickle"),
        (len, "allow_pickle"),
        (torch.nn.Linear, "allow_pickle"),
        (torch.Generator(), "allow_pickle"),
        (numpy.random.default_rng(), "allow_pickle"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_come_back_as_something_else_is_refused(tmp_path, value, remedy):
    with pytest.raises(strandline.UnsupportedError) as caught:
        strandline.save(tmp_path / "one", {"config": {"inner": [0, value]}})
    assert isinstance(caught.value, TypeError)
    assert caught.value.key_path == "config.inner.1"
    assert "config.inner.1" in str(caught.value)
    assert remedy in str(caught.value)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("key", [(1, 2), Level.LOW, frozenset(), numpy.int64(3), "\udc80"])
def test_a_key_of_another_type_is_refused(tmp_path, key):
    with pytest.raises(strandline.UnsupportedError, match="key of type") as caught:
        strandline.save(tmp_path / "one", {"outer": {key: 1}})
    assert caught.value.key_path.startswith("outer.")


def test_a_cycle_is_refused_with_its_key_path(tmp_path):
    inner: dict[str, object] = {"n": 1}
    inner["again"] = [inner]
    with pytest.raises(strandline.InvalidArgumentError, match="contains itself") as caught:
        strandline.save(tmp_path / "one", {"a": inner})
    assert caught.value.key_path == "a.again.0"


def test_the_same_container_twice_is_no_cycle(tmp_path):
    shared = [1, 2]
    assert round_trip({"a": shared, "b": shared}, tmp_path) == {"a": [1, 2], "b": [1, 2]}


def test_nesting_below_64_levels_is_saved_and_above_refused(tmp_path):
    def nested(levels):
        value: object = 1
        for _ in range(levels):
            value = [value]
        return value

    assert round_trip(nested(63), tmp_path) == nested(63)
    with pytest.raises(strandline.InvalidArgumentError, match="64") as caught:
        strandline.save(tmp_path / "two", {"value": nested(64)})
    assert caught.value.key_path.startswith("value.0.0")
    with pytest.raises(strandline.InvalidArgumentError, match="64"):
        strandline.save(tmp_path / "two", {"value": nested(100_000)})


def test_a_pickle_needs_permission_on_both_sides(tmp_path):
    state = {"color": Color.RED, "point": Point(1, 2)}
    strandline.save(tmp_path / "one", state, allow_pickle=True)
    with pytest.raises(strandline.UnsupportedError, match="allow_pickle=True") as caught:
        strandline.load(tmp_path / "one")
    assert caught.value.key_path == "color"
    assert strandline.load(tmp_path / "one", allow_pickle=True) == state


def test_a_state_must_be_a_dict(tmp_path):
    for state in ([1], None, 3, "x"):
        with pytest.raises(strandline.InvalidArgumentError, match="must be a dict"):
            strandline.save(tmp_path / "one", state)


def test_metadata_and_metrics_must_be_plain(tmp_path):
    with pytest.raises(strandline.InvalidArgumentError) as caught:
        strandline.save(tmp_path / "one", {"a": 1}, metadata={"w": {"t": torch.zeros(1)}})
    assert caught.value.key_path == "w.t"
    with pytest.raises(strandline.InvalidArgumentError, match="metrics"):
        strandline.save(tmp_path / "one", {"a": 1}, metrics=[1])
    strandline.save(
        tmp_path / "one",
        {"a": 1},
        metrics={"loss": torch.tensor(0.5), "accuracy": numpy.float32(0.25), "n": 3},
        metadata={"commit": "abc", "tags": ["x"]},
    )


@pytest.mark.parametrize("value", [None, "0.5", [1.0], torch.ones(2), 10**400])
@pytest.mark.parametrize("name", ["loss", "\ud800"])
def test_a_metric_that_is_no_number_is_named(tmp_path, name, value):
    with pytest.raises(strandline.InvalidArgumentError) as caught:
        strandline.save(tmp_path / "one", {"a": 1}, metrics={"good": 1.0, name: value})
    assert f"the metric {name!a}" in str(caught.value)
    assert isinstance(caught.value.__cause__, Exception)
    assert not (tmp_path / "one").exists()


class FailingStateDict:
    def state_dict(self):
        raise KeyError("lost")


class FailingLookup:
    def __getattr__(self, name):
        raise KeyError("lost")


def closed_stream():
    stream = io.BytesIO(b"x")
    stream.close()
    return stream


@pytest.mark.parametrize(
    ("make", "cause", "what", "remedy"),
    [
        (FailingStateDict, KeyError, "its state_dict()", "correct it, or take the object out"),
        (FailingLookup, KeyError, "looking for state_dict", "correct the lookup, or take"),
        (closed_stream, ValueError, "reading a _io.BytesIO", "save what it holds while it can"),
        (
            lambda: lambda: 1,
            (pickle.PicklingError, AttributeError),
            "pickling a function",
            "save what it consists of, or take it out",
        ),
    ],
)
def test_what_fails_on_its_own_is_named_with_a_remedy_and_chained(
    tmp_path, make, cause, what, remedy
):
    value = make()
    with pytest.raises(strandline.UnsupportedError) as caught:
        strandline.save(tmp_path / "one", {"a": {"b": value}}, allow_pickle=True)
    assert caught.value.key_path == "a.b"
    assert f"cannot save 'a.b': {what} failed" in str(caught.value)
    assert remedy in str(caught.value)
    assert isinstance(caught.value.__cause__, cause)


def test_an_object_that_gives_another_object_is_refused(tmp_path):
    class Endless:
        def state_dict(self):
            return Endless()

    with pytest.raises(strandline.UnsupportedError, match="instead of a dict"):
        strandline.save(tmp_path / "one", {"a": Endless()})


def test_interrupting_the_walk_raises_the_interrupt_itself(tmp_path):
    class Interrupting:
        def state_dict(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        strandline.save(tmp_path / "one", {"a": Interrupting()})


def test_a_container_that_changes_while_it_is_walked_is_safe(tmp_path):
    class Meddling:
        def __init__(self, container):
            self.container = container

        def state_dict(self):
            self.container.clear()
            return {}

    items: list[object] = []
    items.extend([Meddling(items), 1, 2])
    mapping: dict[str, object] = {}
    mapping.update(a=Meddling(mapping), b=1)
    assert round_trip([items, mapping], tmp_path) == [[{}], {"a": {}, "b": 1}]
