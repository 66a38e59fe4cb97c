"""A judge of answers: what it is asked, how often, and what its words count for."""

import numpy as np
import pytest
from scripted import TEXTS, Scripted

from fedrag_jax.data.examples import Example
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.judge import judged


def test_a_judge_is_asked_about_each_answer_as_often_as_is_wanted(tmp_path):
    examples = [Example(f"e{i}", f"Q{i}?", (f"A{i}", "other"), (f"t{i}",)) for i in range(3)]
    count = iter(range(100))

    def reply(request):
        i = next(count)
        return ["TRUE", "FALSE", "Well", "TRUE.", "TRUE", "FALSE"][i]

    author = Scripted(reply)
    texts = [p.text for p in TEXTS[:3]]
    found = judged(author, examples, texts, ["a", "b", "c"], tmp_path, repeats=2)
    np.testing.assert_array_equal(found, [[1, 0, np.nan], [1, 1, 0]])
    assert author.asked[1].user == (
        "### Text\nPerson 1 was born in Town1.\n\n### Question\nQ1?\n\n### Reference answer\nA1\n\n"
        "### Answer\nb"
    )
    again = judged(author, examples, texts, ["a", "b", "c"], tmp_path, repeats=2)
    np.testing.assert_array_equal(again, found)
    with pytest.raises(ConfigError, match="repeats must be at least 1"):
        judged(author, examples, texts, ["a", "b", "c"], tmp_path, repeats=0)
