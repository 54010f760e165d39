"""Tags of earlier versions keep their meaning, and a description that somebody has edited is theirs."""

from moebench.tracking.bookkeeping import CELL, NOTE, NOTE_DIGEST, add_hidden_names, describe


def test_tags_of_an_earlier_version_have_their_names_of_today() -> None:
    assert add_hidden_names({"moebench.cell": "a", "arm": "b"}) == {"moebench.cell": "a", CELL: "a", "arm": "b"}
    assert add_hidden_names({"moebench.cell": "a", CELL: "b"})[CELL] == "b"


def test_a_description_is_written_once_and_follows_its_text() -> None:
    first = describe({}, "one")
    assert first[NOTE] == "one"
    assert describe(first, "one") == {}
    assert describe(first, "two")[NOTE] == "two"


def test_an_edited_description_stays() -> None:
    edited = describe({}, "one") | {NOTE: "my own text"}
    assert describe(edited, "two") == {}
    assert describe({NOTE: "my own text"}, "two") == {}


def test_the_description_of_an_earlier_version_is_replaced() -> None:
    assert describe({NOTE: "the question"}, "new", earlier="the question")[NOTE] == "new"
    assert NOTE_DIGEST in describe({NOTE: "same"}, "same", earlier="same")
