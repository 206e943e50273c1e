"""JSON from elsewhere: read within bounds, or one reason."""

import pytest

from moekit import json_text


def test_what_is_read():
    assert json_text.loads('{"a": [1, 2.5, null, "\\u00e9"], "b": {}}') == {"a": [1, 2.5, None, "é"], "b": {}}
    assert json_text.loads(b"[]") == []
    assert json_text.loads("[1, 2]", most=2) == [1, 2]


def test_the_reason_says_where():
    with pytest.raises(
        ValueError, match=r"^is no JSON \(Expecting ',' delimiter: line 1 column 9 \(char 8\)\)$"
    ):
        json_text.loads('{"a": 1 "b"}')


def test_what_a_text_has_is_counted_at_its_bound():
    """Also where the text is not longer than the bound, as two values take one character."""
    for text, held in (("[1, [], {}]", 6), ("[[],[],[]]", 6), ("[" * 9 + "]" * 9, 9)):
        assert json_text.values(text) == held
        json_text.loads(text, held)
        with pytest.raises(ValueError, match=f"has more than {held - 1} values"):
            json_text.loads(text, held - 1)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[1, 2]", "has more than 1 values"),
        ("[" + "[]," * json_text.MOST_VALUES + "[]]", "has more than"),
        ("{" * json_text.MOST_VALUES, "has more than"),
        ('{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice in one object"),
        ('[{"\ud800": 1, "\ud800": 3}]', "has the key '\\ud800' twice in one object"),
        ("[" * 100_000, "is no JSON"),
        ("1" * 5000, "is no JSON"),
        (b"\xff\xfe[\0]\0", "is no JSON"),
        ("", "is no JSON"),
    ],
)
def test_what_is_refused(text, said):
    with pytest.raises(ValueError) as caught:
        json_text.loads(text, 1 if said.endswith("1 values") else json_text.MOST_VALUES)
    assert str(caught.value).startswith(said)
