from __future__ import annotations

from pathlib import Path

import pytest

from moeruntime.errors import InputError
from moeruntime.strict_json import MAX_JSON_BYTES, Fields, canonical_json, parse_json, read_json


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} {"b": 2}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"a": {"b": 1, "b": 1}}', "duplicate key 'b'"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_not_one_clean_document(data: bytes, complaint: str) -> None:
    with pytest.raises(InputError, match=r"^here: ") as problem:
        parse_json(data, "here", InputError)
    assert complaint in str(problem.value)


@pytest.mark.parametrize("value", [None, 3, "text", [], True])
def test_root_must_be_an_object(value: object) -> None:
    with pytest.raises(InputError, match="must be a JSON object"):
        Fields(value, "here", InputError)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [], -1, 11, 10**30])
def test_integer_refuses_other_types_and_values_out_of_range(value: object) -> None:
    with pytest.raises(InputError, match="here: field 'a'"):
        Fields({"a": value}, "here", InputError).integer("a", 0, 10)


@pytest.mark.parametrize("value", [True, "1", float("nan"), float("inf"), -0.1, 1.1])
def test_number_refuses_other_types_and_values_out_of_range(value: object) -> None:
    with pytest.raises(InputError, match="here: field 'a'"):
        Fields({"a": value}, "here", InputError).number("a", 0.0, 1.0)


def test_missing_fields_take_the_default_or_fail() -> None:
    fields = Fields({"null": None}, "here", InputError)
    assert fields.integer("a", 0, 10, 3) == 3
    assert fields.integer("null", 0, 10, 3) == 3
    assert fields.text("b", "x") == "x"
    assert fields.boolean("c", True) is True
    with pytest.raises(InputError, match="field 'd' is missing"):
        fields.number("d", 0, 1)


def test_an_alias_is_the_older_key() -> None:
    assert Fields({"old": 4}, "here", InputError).integer("new", 0, 9, alias="old") == 4
    assert Fields({"old": 4, "new": 5}, "here", InputError).integer("new", 0, 9, alias="old") == 5


def test_done_rejects_what_nobody_asked_for() -> None:
    fields = Fields({"a": 1, "b": 2}, "here", InputError)
    fields.integer("a", 0, 9)
    with pytest.raises(InputError, match="unknown field 'b'"):
        fields.done()
    fields.raw("b")
    fields.done()


def test_nested_places_are_named() -> None:
    fields = Fields({"list": [{"a": 1}, {"a": "x"}]}, "here", InputError)
    with pytest.raises(InputError, match=r"here: list\[1\]: field 'a'"):
        [child.integer("a", 0, 9) for child in fields.children("list")]


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InputError, match="lone surrogate"):
        Fields(parse_json(b'{"a": "\\ud800"}', "here", InputError), "here", InputError).text("a")


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": "ä"}) == canonical_json({"a": "ä", "b": 1})
    assert canonical_json({"a": "ä"}) == b'{\n "a": "\\u00e4"\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_read_json_wants_a_regular_file_of_moderate_size(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none.json", InputError)
    with pytest.raises(InputError, match="not a regular file"):
        read_json(tmp_path, InputError)
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(InputError, match="more than the"):
        read_json(large, InputError)
