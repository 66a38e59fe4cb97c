"""Gold ids of questions, and the passages or pieces of them that a system has."""

import pytest

from fedrag_jax.data.examples import Passage
from fedrag_jax.data.golds import golds
from fedrag_jax.errors import DataError

PASSAGES = [
    Passage("whole", "", "Ada was born in London."),
    Passage("cut#0", "", "Bob was born in Oslo."),
    Passage("cut#1", "", "He lived in Rome and"),
    Passage("cut#2", "", "in Rome he died."),
    Passage("known#0", "", "It is known that"),
    Passage("known#1", "", "the “No” won."),
    Passage("a.txt#0", "", "One of a file."),
    Passage("both", "", "Whole, and not"),
    Passage("both#0", "", "its piece."),
]


def test_an_id_names_its_passage_or_the_pieces_that_answer():
    asked = [
        (["whole"], ["London"]),
        (["cut"], ["rome", "x"]),
        (["cut"], ["Paris"]),
        (["cut#0", "cut"], ["Oslo"]),
        (["known"], ["no"]),
        (["a.txt"], ["One"]),
        (["both"], ["piece"]),
        ([], ["x"]),
    ]
    found = golds(asked, PASSAGES)
    assert found.found == [
        ("whole",),
        ("cut#1", "cut#2"),
        ("cut#0", "cut#1", "cut#2"),
        ("cut#0",),
        ("known#1",),
        ("a.txt#0",),
        ("both",),
        (),
    ]
    assert found.message() == ""
    found.require_some("own")


def test_ids_that_name_nothing_are_told():
    found = golds([(["whole", "p9"], ["London"]), (["cut#7"], ["x"])], PASSAGES)
    assert found.found == [("whole",), ()] and found.missing == [("p9",), ("cut#7",)]
    assert found.message() == "2 of 3 positive_ids name none of the 9 passages, 'p9' first"
    found.require_some("own")
    golds([([], ["x"])], PASSAGES).require_some("own")
    with pytest.raises(DataError, match=r"own: 1 of 1 positive_ids name none .*, 'p9' first: give"):
        golds([(["p9"], ["x"])], PASSAGES).require_some("own")
