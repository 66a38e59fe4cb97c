"""Answers that cite the passages they come from."""

import pytest
from toy_rag import EXAMPLES, PASSAGES, TOKENIZER

from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.prompts import COMPACT, COMPACT_CITED
from fedrag_jax.errors import ConfigError


def test_passages_are_numbered_from_one_and_cited_before_the_answer():
    prompts = Prompts(TOKENIZER, COMPACT_CITED, PASSAGES, EXAMPLES, max_answer_tokens=40)
    example, rows = EXAMPLES[0], [2, -1, 0]
    written = [*prompts.prompt(example.question, rows), *prompts.answer_tokens("Rome", "2")]
    assert "".join(TOKENIZER.convert_ids_to_tokens(written)) == (
        "<s>1: Cy was born in Lima.\n2: Ann was born in Rome.\nQuestion: Where was Ann born?\nCite:"
        " 2\nAnswer: Rome</s>"
    )
    # An answer over lines ends with EOS alone.
    assert prompts.stop_tokens == (TOKENIZER.eos_token_id,)
    # Whose token is whose: the numbers are part of their passages.
    (places,) = prompts.passage_places([example], [[2, 0]])
    first = len("1: Cy was born in Lima.\n")
    assert places[1 : 1 + first].tolist() == [0] * first and places[1 + first] == 1


def test_numbers_have_room_in_training():
    plain, cited = (
        Prompts(TOKENIZER, style, PASSAGES, EXAMPLES, max_answer_tokens=40).training_width(3)
        for style in (COMPACT, COMPACT_CITED)
    )
    assert cited - plain == 3 * len("1: ") + len("Question: \nCite:")


def test_a_number_after_the_text_is_refused():
    style = COMPACT_CITED._replace(passage="{text} [{number}]\n")
    with pytest.raises(ConfigError, match=r"needs its \{number\} before its \{text\}"):
        Prompts(TOKENIZER, style, PASSAGES, [])
