import pytest

from moekit.headlines import first_line, folded, headline


@pytest.mark.parametrize(
    ("error", "first", "whole"),
    [
        (ValueError("one: two"), "one: two", "ValueError: one: two"),
        (ValueError("\n  one \t two\nthree"), "one two", "ValueError: one two"),
        (KeyError("x"), "'x'", "KeyError: 'x'"),
        (KeyboardInterrupt(), "KeyboardInterrupt", "KeyboardInterrupt"),
        # An error without a text, or with blanks alone, has no first line.
        (ValueError(), "ValueError", "ValueError"),
        (OSError(" \n"), "OSError", "OSError"),
    ],
)
def test_an_error_is_one_line(error, first, whole):
    assert (first_line(error), headline(error)) == (first, whole)


def test_what_others_wrote_is_cut_short():
    assert (
        first_line(ValueError("x" * 50), 10) == "xxxxxxx..."
        and first_line(ValueError("x" * 10), 10) == "x" * 10
    )
    assert folded(ValueError("a\n b\r\n\tc")) == "a b c" and folded("abcdef", 5) == "ab..."
