"""Public data sets of the Hugging Face hub by name, split for training.

| name | repository | test questions | clients differ in | passages |
|---|---|---|---|---|
| squad | rajpurkar/squad | its validation | article | paragraphs |
| hotpotqa | hotpotqa/hotpot_qa, distractor | its validation | | the ten of each question |
| musique | dgslibisey/MuSiQue | its validation | | the twenty of each question |
| 2wiki | framolfese/2WikiMultihopQA | its validation | | the ten of each question |
| boolq | google/boolq | its validation | | one of each question |
| pubmedqa | qiaojin/PubMedQA, pqa_labeled | the 500 official ones | | abstracts |
| xquad | google/xquad, all languages | a fifth | language | paragraphs |
| triviaqa | mandarjoshi/trivia_qa, rc.wikipedia | its validation | | whole pages: cut them |
| popqa | akariasai/PopQA | a fifth | relation | none: give a corpus |
| nq | google-research-datasets/nq_open | its validation | | none: give a corpus |

Validation questions are a tenth of the training questions (for SQuAD, whole articles), by the sha256 of
titles or ids. If the hub has only one split, it is divided by id into 70, 10 and 20 percent; for XQuAD,
by the id without the language.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fedrag_jax.data import hub_rows, hub_tables, pubmedqa_ids, splits
from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.data.hub_rows import Question, Read


class Asked(NamedTuple):
    """The questions of a data set and their passages, without duplicates.

    Attributes:
      titles: titles of the pages with the answer, by the question's id, if known.
    """

    split: splits.Split
    passages: list[Passage]
    titles: dict[str, tuple[str, ...]]
    origin: str


def asked(rows: Iterable[tuple[Read, str]], origin: str, by_topic: bool = False) -> Asked:
    """Collects questions, each with its passages and its split."""
    split: splits.Split = {"train": [], "validation": [], "test": []}
    passages, titles = {}, {}
    for (question, some), side in rows:
        passages |= {p.id: p for p in some}
        split[side].append(example_of(question))
        titles[question.id] = question.titles
    return Asked(splits.with_validation(split, by_topic), [*passages.values()], titles, origin)


def example_of(question: Question) -> Example:
    """Returns the training example of a question; for multiple choice, with the correct choice."""
    q = question
    answers = q.answers if q.label is None else (q.choices[q.label],)
    return Example(q.id, q.question, answers, q.golds, q.topic, q.hops)


@dataclasses.dataclass(frozen=True)
class NamedSet:
    """A data set of the hub.

    Attributes:
      convert: function from a row and a default id to a question and its passages.
      configs: configurations of the repository. If there are several, each is a topic, and the ids of
        its questions begin with it.
      sides: the hub's splits and their names here; "" if each question's id decides.
      side: the split of a question, if `sides` does not decide.
      by_topic: whether validation takes whole topics of train.
    """

    repo: str
    convert: Callable[[Mapping[str, Any], str], Read]
    configs: tuple[str | None, ...] = (None,)
    sides: tuple[tuple[str, str], ...] = (("train", "train"), ("validation", "test"))
    side: Callable[[str], str] = splits.side
    by_topic: bool = False

    def read(self, folder: str = "", revision: str = "") -> Asked:
        """Reads the whole data set.

        Args:
          folder: folder with copies of hub repositories, FOLDER/OWNER/NAME; "" for the hub.
          revision: as in `hub_tables.table`.

        Raises:
          DataError: the data set cannot be read, or a row has another format.
        """
        source = f"{folder}/{self.repo}" if folder else self.repo
        at = hub_tables.commit(source, revision)
        config = self.configs[0] if len(self.configs) == 1 else "all configurations"
        origin = hub_tables.origin(source, config, at)
        return asked(self._rows(source, at), origin, self.by_topic)

    def _rows(self, source: str, revision: str) -> Iterator[tuple[Read, str]]:
        for config in self.configs:
            topic = (config or "").rpartition(".")[2]
            for split, side in self.sides:
                rows = hub_tables.table(source, config, split, revision)
                read = hub_tables.converted(rows, self.convert, source, split, self.repo)
                for question, passages in read:
                    whose = side or self.side(question.id)
                    if len(self.configs) > 1:
                        own = {"id": f"{topic}-{question.id}", "topic": topic}
                        question = dataclasses.replace(question, **own)
                    yield (question, passages), whose


LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
NAMED_SETS = {
    "squad": NamedSet("rajpurkar/squad", hub_rows.squad, by_topic=True),
    "hotpotqa": NamedSet("hotpotqa/hotpot_qa", hub_rows.hotpotqa, ("distractor",)),
    "musique": NamedSet("dgslibisey/MuSiQue", hub_rows.musique),
    "2wiki": NamedSet("framolfese/2WikiMultihopQA", hub_rows.hotpotqa),
    "boolq": NamedSet("google/boolq", hub_rows.boolq),
    "pubmedqa": NamedSet(
        "qiaojin/PubMedQA", hub_rows.pubmedqa, ("pqa_labeled",), (("train", ""),),
        pubmedqa_ids.side,
    ),
    "xquad": NamedSet(
        "google/xquad", hub_rows.xquad, tuple(f"xquad.{name}" for name in LANGUAGES),
        (("validation", ""),),
    ),
    "triviaqa": NamedSet("mandarjoshi/trivia_qa", hub_rows.triviaqa, ("rc.wikipedia",)),
    "popqa": NamedSet("akariasai/PopQA", hub_rows.popqa, sides=(("test", ""),)),
    "nq": NamedSet("google-research-datasets/nq_open", hub_rows.nq, ("nq_open",)),
}  # fmt: skip
