"""Sets of questions and passages by name: built-in, of the hub, of a shared folder or a user's own."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence

from fedrag_jax.data import json_sets, outside_corpora, synthetic
from fedrag_jax.data.columns import Columns
from fedrag_jax.data.examples import SPLITS, Dataset, Example, Passage, check
from fedrag_jax.data.golds import golds
from fedrag_jax.data.named_sets import NAMED_SETS, Asked
from fedrag_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Passages in place of those that come with the questions; as of `outside_corpora.read`.

    Attributes:
      source: "" for those that come with them.
      tokens: longer passages are cut, also those that come with the questions; 0 for no cut.
    """

    source: str = ""
    config: str = ""
    revision: str = ""
    columns: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: dict(outside_corpora.COLUMNS)
    )
    tokens: int = 0


OWN = Corpus()


def load(
    name: str | os.PathLike,
    needed: Sequence[str] = SPLITS,
    *,
    source: str = "",
    config: str = "",
    revision: str = "",
    columns: Columns | None = None,
    corpus: Corpus = OWN,
    tokenizer=None,
) -> Dataset:
    """Reads a set, and checks it.

    `"world"` and `"chatty_world"` are made (`data.synthetic.WORLDS`). Other names, without `columns`,
    are files of JSON lines (`data.json_sets`): a folder, a path prefix (`folder/NAME` for
    folder/NAME.questions.jsonl), or a set in the folder of the environment variable FEDRAG_DATA
    (default ../shared/data). A name of `data.named_sets` that is not there is read from the hub.

    Questions in JSON lines go where their `split` says. Without that field they go by the sha256 of
    their id, 70% train, 10% validation, 20% test, so that questions added later move none of the old
    ones. If no question is for validation, a tenth of train is, by the same hash. In FEDRAG_DATA,

      squad: test = dev. Train and validation are `train_44articles` and `train_sample`
        together: whole articles, in the order of the sha256 of their titles, go to validation until
        it holds a tenth of them (7 articles, 1,565 questions), so no article is in both. Questions
        of `train_sample` have no title and stay in train, with topic "".
      hotpotqa: in the order of the sha256 of the question id, 1,300 train, 200 validation, and the
        rest test. The topic is "": cluster the questions to tell clients apart.
      xquad: by the sha256 of the question id without its language, 70% train, 10% validation, 20%
        test, so that no question is in one and its translation in another. The topic is the language.

    Args:
      needed: the splits that must have questions.
      source: "hub"; "local" for JSON lines alone; a folder with copies of the hub's repositories
        (FOLDER/OWNER/NAME); "" for JSON lines where there are such and else the hub.
      config, revision: of a repository of the hub: its configuration, for `columns`, and a commit.
      columns: `name` is a repository of the hub, a copy of one or a file, with these columns.
      corpus: other passages, or how long passages are cut. Gold passages in it are found by the titles
        of pages and the answers (`outside_corpora.find_golds`); their share is told as a warning.
      tokenizer: of the encoder, for what is cut.

    Raises:
      DataError: files not found (names those looked for), a line that is not what the schema asks
        for (file and line), what the hub says, a set without passages, or anything `examples.check`
        refuses.
      ConfigError: passages are to be cut and there is no tokenizer.
    """
    text = os.fspath(name)
    if text in synthetic.WORLDS:
        made = synthetic.generate(synthetic.WORLDS[text])
        return dataclasses.replace(made, name=text)
    dataset, titles = _questions(text, source, config, revision, columns, bool(corpus.source))
    if corpus.source:
        passages = outside_corpora.read(
            corpus.source,
            config=corpus.config,
            revision=corpus.revision,
            columns=corpus.columns,
            tokenizer=tokenizer,
            tokens=corpus.tokens,
        )
        where = getattr(passages, "where", corpus.source)
        dataset = _over(dataset, titles, passages, where)
    elif corpus.tokens:
        dataset = _cut(dataset, corpus.tokens, tokenizer)
    return check(dataset, needed)


def _questions(
    name: str,
    source: str,
    config: str,
    revision: str,
    columns: Columns | None,
    over_others: bool,
) -> tuple[Dataset, Mapping[str, Sequence[str]]]:
    """A set with its own passages, and titles of pages by the id of a question."""
    if columns is not None:
        return _dataset(name, columns.read(name, config, revision), over_others)
    found = json_sets.find(name) if source in ("", "local") else None
    if found:
        dataset = json_sets.read(name, found)
        title = {p.id: p.title for p in dataset.passages}
        everybody = [*dataset.train, *dataset.validation, *dataset.test]
        return dataset, {
            e.id: [title[i] for i in e.positive_ids if title.get(i)] for e in everybody
        }
    if name in NAMED_SETS and source != "local":
        folder = "" if source in ("", "hub") else source
        return _dataset(name, NAMED_SETS[name].read(folder, revision), over_others)
    looked_for = (
        f"{stem}questions.jsonl[.gz] with {stem}passages.jsonl[.gz]"
        for stem in json_sets.places(name)
    )
    raise DataError(
        f"no set {name!r}: looked for {'; '.join(looked_for)}. Give a folder that has both files, set "
        f"FEDRAG_DATA (now {json_sets.shared_folder()}) to the folder of the named sets, take one of "
        f"{', '.join(NAMED_SETS)} from the hub, or name the columns of another set "
        "(config.data.columns)"
    )


def _dataset(
    name: str, asked: Asked, over_others: bool
) -> tuple[Dataset, Mapping[str, Sequence[str]]]:
    if not asked.passages and not over_others:
        raise DataError(
            f"{asked.origin} has no passages of its own: give a corpus (config.data.corpus)"
        )
    dataset = Dataset(name, asked.passages, **asked.split, origin=asked.origin)
    return dataset, asked.titles


def load_over(
    name: str, passages: Sequence[Passage], where: str, needed: Sequence[str] = SPLITS
) -> Dataset:
    """The questions of a set, as `load` finds it by its name, over passages that are given.

    Args:
      where: names the passages, for people.

    Raises:
      DataError: as `load`.
    """
    dataset, titles = _questions(name, "", "", "", None, over_others=True)
    return check(_over(dataset, titles, passages, where), needed)


def _over(dataset: Dataset, titles, passages: Sequence[Passage], where: str) -> Dataset:
    everybody = [e for split in SPLITS for e in getattr(dataset, split)]
    found = outside_corpora.find_golds(everybody, titles, passages)
    warnings.warn(f"{dataset.name} over {where}: {found.told()}", stacklevel=3)
    return _with(dataset, passages, found.golds, f"{dataset.origin} over {where}")


def _cut(dataset: Dataset, tokens: int, tokenizer) -> Dataset:
    """The same passages in pieces, those with an answer gold."""
    passages = outside_corpora.cut(dataset.passages, tokenizer, tokens)
    everybody = [e for split in SPLITS for e in getattr(dataset, split)]
    found = golds(((e.positive_ids, e.answers) for e in everybody), passages)
    return _with(dataset, passages, found.found, dataset.origin)


def _with(
    dataset: Dataset, passages: Sequence[Passage], found: Sequence[tuple[str, ...]], origin: str
) -> Dataset:
    """Other passages, and the gold ones of each question of all splits in turn."""
    whose, splits = iter(found), {}
    for split in SPLITS:
        examples: list[Example] = getattr(dataset, split)
        splits[split] = [dataclasses.replace(e, positive_ids=next(whose)) for e in examples]
    return Dataset(dataset.name, passages, **splits, origin=origin)


def of_config(data, tokenizer=None, needed: Sequence[str] = SPLITS) -> Dataset:
    """The set that the settings `config.data` of an experiment name.

    Raises:
      ConfigError, DataError: as `load`; settings of a repository for a set that is none.
    """
    given = {name: column for name, column in data.get("columns", {}).items() if column}
    columns = Columns(**given) if given else None
    if data.get("hub_config", "") and columns is None:
        raise ConfigError("config.data.hub_config is of sets with config.data.columns: name those")
    corpus = data.get("corpus_options", {})
    return load(
        data.name,
        needed,
        source=data.get("source", ""),
        config=data.get("hub_config", ""),
        revision=data.get("revision", ""),
        columns=columns,
        corpus=Corpus(
            data.get("corpus", ""),
            corpus.get("hub_config", ""),
            corpus.get("revision", ""),
            dict(corpus.get("columns", outside_corpora.COLUMNS)),
            data.get("passage_tokens", 0),
        ),
        tokenizer=tokenizer,
    )
