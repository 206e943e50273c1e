"""JSON from elsewhere: read within bounds, or one reason."""

import pytest

from moekit import json_text


def test_what_is_read():
    assert json_text.loads('{"a": [1, 2.5, null, "\\u00e9"], "b": {}}') == {"a": [1, 2.5, None, "é"], "b": {}}
    assert json_text.loads(b"[]") == []
    assert json_text.loads("[1, 2]", most=2) == [1, 2]


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
