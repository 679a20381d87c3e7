"""Which words differ, and that nothing of either text is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some

from studio.catalogue.word_diff import MAX_PARTS, word_diff

texts = some.text(alphabet="ab \n.é", max_size=40)


def marked(before: str, after: str) -> str:
    signs = {"same": "{}", "added": "[+{}]", "removed": "[-{}]"}
    pieces = word_diff(before, after)
    assert pieces is not None
    return "".join(signs[piece.kind].format(piece.text) for piece in pieces)


def test_only_the_words_that_differ_are_marked() -> None:
    assert marked("up to 5 GB each", "up to 2 GB each") == "up to [-5][+2] GB each"


def test_changed_words_beside_each_other_are_one_change() -> None:
    assert marked("the red old car stops here", "the blue new car stops here") == (
        "the [-red old][+blue new] car stops here"
    )


def test_texts_that_share_nothing_are_two_texts() -> None:
    assert marked("Open Settings and press Reset.", "I do not know, sorry!") == (
        "[-Open Settings and press Reset.][+I do not know, sorry!]"
    )


def test_a_text_that_is_too_long_is_not_compared() -> None:
    assert word_diff("word " * MAX_PARTS, "word") is None


@given(texts, texts)
def test_the_pieces_put_together_are_both_texts(before: str, after: str) -> None:
    pieces = word_diff(before, after)
    assert pieces is not None
    assert "".join(piece.text for piece in pieces if piece.kind != "removed") == after
    assert "".join(piece.text for piece in pieces if piece.kind != "added") == before
    assert all(piece.text for piece in pieces)
