"""Data sets by name: built-in, from the hub, from a shared folder, or a user's own."""

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
    """A corpus that replaces the passages of a data set; fields as in `outside_corpora.read`.

    Attributes:
      source: the corpus; "" keeps the passages of the data set.
      tokens: passages longer than this are split, also those of the data set; 0 splits none.
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
    """Reads and checks a data set.

    `"world"` and `"chatty_world"` are generated (`data.synthetic.WORLDS`). Other names, without
    `columns`, are files of JSON lines (`data.json_sets`): a folder, a path prefix (`folder/NAME` for
    folder/NAME.questions.jsonl), or a data set in the folder $FEDRAG_DATA (default ../shared/data). A
    name of `data.named_sets` that is not found there is read from the hub.

    The field `split` of a question in JSON lines sets its split. Without this field the sha256 of the
    id decides (70% train, 10% validation, 20% test), so that adding questions moves no old ones. If
    there are no validation questions, a tenth of train is used, by the same hash. In FEDRAG_DATA,

      squad: test = dev. Train and validation are `train_44articles` and `train_sample`
        together: whole articles, in the order of the sha256 of their titles, go to validation until
        it holds a tenth of them (7 articles, 1,565 questions), so no article is in both. Questions
        of `train_sample` have no title and stay in train, with topic "".
      hotpotqa: in the order of the sha256 of the question id, 1,300 train, 200 validation, and the
        rest test. The topic is "": cluster the questions to split them over clients.
      xquad: by the sha256 of the question id without its language, 70% train, 10% validation, 20%
        test, so that a question and its translations are in the same split. The topic is the
        language.

    Args:
      needed: the splits that must have questions.
      source: "hub"; "local" for JSON lines only; a folder with copies of the hub's repositories
        (FOLDER/OWNER/NAME); "" for JSON lines if present, else the hub.
      config, revision: configuration (for `columns`) and commit of a hub repository.
      columns: the columns to read; `name` is then a hub repository, a copy of one, or a file.
      corpus: other passages, or a limit for splitting passages. Gold passages in it are found by page
        titles and answers (`outside_corpora.find_golds`); a warning reports their share.
      tokenizer: the encoder's tokenizer, for splitting passages.

    Raises:
      DataError: files not found (the error lists the candidates), a line that does not follow the
        schema (with file and line), an error of the hub, a data set without passages, or anything
        that `examples.check` refuses.
      ConfigError: passages are to be split and there is no tokenizer; an argument that such a data set
        or corpus does not use.
    """
    text = os.fspath(name)
    if not corpus.source:
        _refuse(
            "there is no other corpus", corpus_config=corpus.config, corpus_revision=corpus.revision
        )
    if text in synthetic.WORLDS:
        _refuse(
            f"{text!r} is generated",
            source=source,
            config=config,
            revision=revision,
            columns=columns,
            corpus=corpus.source,
            passage_tokens=corpus.tokens,
        )
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
        _refuse(f"the columns of {name!r} are given, which is where it is", source=source)
        return _dataset(name, columns.read(name, config, revision), over_others)
    found = json_sets.find(name) if source in ("", "local") else None
    if found:
        _refuse(
            f"{name!r} is read from {found[0]} (take source='hub' for the hub)",
            config=config,
            revision=revision,
        )
        dataset = json_sets.read(name, found)
        title = {p.id: p.title for p in dataset.passages}
        everybody = [*dataset.train, *dataset.validation, *dataset.test]
        return dataset, {
            e.id: [title[i] for i in e.positive_ids if title.get(i)] for e in everybody
        }
    if name in NAMED_SETS and source != "local":
        _refuse(f"{name!r} has its own configurations", config=config)
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


def _refuse(reason: str, **unused: object) -> None:
    """Refuses arguments that would change nothing."""
    if given := {name: value for name, value in unused.items() if value}:
        told = ", ".join(f"{name} ({value!r})" for name, value in given.items())
        raise ConfigError(f"data: {reason}, so leave out {told}")


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
    """Reads the questions of a data set, found by name as in `load`, over the given passages.

    Args:
      where: a name of the passages for messages.

    Raises:
      DataError: as `load`.
    """
    dataset, titles = _questions(name, "", "", "", None, over_others=True)
    return check(_over(dataset, titles, passages, where), needed)


def _over(dataset: Dataset, titles, passages: Sequence[Passage], where: str) -> Dataset:
    everybody = [e for split in SPLITS for e in getattr(dataset, split)]
    found = outside_corpora.find_golds(everybody, titles, passages)
    warnings.warn(f"{dataset.name} over {where}: {found.message()}", stacklevel=3)
    return _with(dataset, passages, found.golds, f"{dataset.origin} over {where}")


def _cut(dataset: Dataset, tokens: int, tokenizer) -> Dataset:
    """Returns the data set with its passages cut; pieces that contain an answer are gold."""
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
    """Reads the data set that the settings `config.data` of an experiment name.

    Raises:
      ConfigError, DataError: as `load`; also for repository settings of another kind of data set.
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
