"""JSON from elsewhere: read within bounds, or one reason."""

import json
import random

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


def test_signs_within_strings_are_no_values():
    for text in (
        "1,[{" * json_text.MOST_VALUES,
        '\\",\\\\' * json_text.MOST_VALUES,
        "ü\ud800,\n" * json_text.MOST_VALUES,
    ):
        for spelled in (json.dumps({"text": text}), json.dumps({"text": text}, ensure_ascii=False)):
            assert json_text.values(spelled) == 2
            assert json_text.loads(spelled) == {"text": text}
    long = '{"a": "' + "," * json_text.MOST_VALUES + '", "b": [' + "1," * json_text.MOST_VALUES + "1]}"
    for cut in (long, long[:-2], long + '"'):
        with pytest.raises(ValueError, match="has more than 600,000 values"):
            json_text.loads(cut)


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_the_count_is_that_of_a_reader_that_goes_sign_by_sign(piece, monkeypatch):
    monkeypatch.setattr(json_text, "PIECE", piece)
    draw = random.Random(1)
    ended = 0
    for _ in range(1000):
        text = "".join(draw.choices('"\\,[{}]:a ü', k=draw.randrange(40)))
        for spelled in (text, json.dumps([text, {text: text}])):
            count, inside, escaped, ends = 0, False, False, False
            for sign in spelled:
                if escaped:
                    escaped = False
                elif sign == "\\":
                    escaped = True
                    # No JSON has one there: what is read ends.
                    if ends := not inside:
                        break
                elif sign == '"':
                    inside = not inside
                elif not inside:
                    count += {"[": 1, ",": 1, "{": 2}.get(sign, 0)
            found = json_text.values(spelled)
            assert found == count or (ends and found > count)
            ended += ends
    assert 0 < ended < 2000


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
