"""Memory-mapped tables of the Hugging Face hub, of copies of its repositories, and of local files, read
with the package `datasets`. A row becomes a Python object when it is read.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedrag_jax.errors import ConfigError, DataError

Row = Mapping[str, Any]
T = TypeVar("T")

# What reads a local file, by its ending.
FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".json": "json",
           ".jsonl": "json"}  # fmt: skip
ONLY_SPLIT = "train"  # as `datasets` calls the rows of a file
_DEFAULT = "default"  # as it calls the configuration of a folder without the hub's README


def is_table(path: str | os.PathLike) -> bool:
    """Returns whether `table` can read a local file, by its ending."""
    return Path(path).is_file() and _format(Path(path)) is not None


def is_csv(rows: Iterable[Row]) -> bool:
    """Returns whether the rows of `table` come from CSV files."""
    return getattr(getattr(rows, "info", None), "builder_name", None) == "csv"


def table(
    source: str, config: str | None, split: str, revision: str = "", texts: bool = False
) -> Iterable[Row]:
    """Returns the rows of a split.

    Args:
      source: a hub repository, a folder with a copy of one, or a file of `FORMATS` (also gzipped),
        whose only split is "train".
      config: the repository's configuration; None for its default. A folder without the hub's README
        has none.
      revision: a commit, branch or tag of the repository; "" for the newest.
      texts: whether all values of local CSV files are texts, instead of the types that they look like.

    Raises:
      DataError: the source cannot be read; the error gives the reason.
    """

    def load(datasets):
        return _load(datasets, source, config, split, revision, texts)

    return _asking(source, f"split {split!r}", load)


def splits(source: str, config: str | None = None, revision: str = "") -> list[str]:
    """Returns the names of the splits of a source of `table`.

    Raises:
      DataError: as `table`.
    """
    if is_table(source):
        return [ONLY_SPLIT]
    return _asking(
        source,
        "its list of splits",
        lambda d: d.get_dataset_split_names(
            source, _config(d, source, config), revision=revision or None
        ),
    )


def commit(source: str, revision: str = "") -> str:
    """Returns the commit that a revision of a hub repository names, by default the newest.

    Returns:
      40 hex digits; "" for a folder or a file. If the hub is not reachable, the revision itself
      (`datasets` then reads its cache).

    Raises:
      DataError: the repository has no such revision.
      ConfigError: a revision of a folder or a file.
    """
    if os.path.exists(source):
        if revision:
            raise ConfigError(
                f"{source} is local and has no revision {revision!r}: leave it out, or name the hub's "
                "repository"
            )
        return ""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return HfApi().dataset_info(source, revision=revision or None).sha or ""
    except RevisionNotFoundError as error:
        raise DataError(f"{source} has no revision {revision!r}: give a commit of it") from error
    except Exception:  # whatever the library of its connections raises; `table` says what is wrong
        return revision


def origin(source: str, config: str | None, revision: str) -> str:
    """Returns a description of the source, for messages and manifests."""
    of = f", {config}" if config else ""
    return source + of + (f" @ {revision}" if revision else "")


def converted(
    rows: Iterable[Row], convert: Callable[[Row, str], T], source: str, split: str, what: str
) -> Iterator[T]:
    """Yields `convert(row, "SPLIT-NUMBER")` for each row.

    Args:
      what: name of the expected data set, for messages.

    Raises:
      DataError: a row of another format; the error lists its columns.
    """
    for i, row in enumerate(rows):
        try:
            yield convert(row, f"{split}-{i}")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{source}, split {split!r}, row {i}: not in the format of {what} "
                f"({type(error).__name__}: {error}); its columns are {', '.join(row)}"
            ) from error


def _load(datasets, source: str, config: str | None, split: str, revision: str, texts: bool):
    if not is_table(source):
        own = _config(datasets, source, config)
        how = (
            _texts_of_folder(datasets, source, own, split)
            if texts and os.path.isdir(source)
            else {}
        )
        return datasets.load_dataset(source, own, split=split, revision=revision or None, **how)
    path = Path(source)
    how: dict[str, Any] = {"sep": "\t"} if ".tsv" in path.suffixes else {}
    if texts and _format(path) == "csv":
        how |= _texts(datasets, [source], how.get("sep", ","))
    return datasets.load_dataset(_format(path), data_files=[str(path)], split=split, **how)


def _texts_of_folder(datasets, source: str, config: str | None, split: str) -> dict[str, Any]:
    """`_texts` for a copy of a repository that consists of CSV files without given types."""
    builder = datasets.load_dataset_builder(source, config)
    if builder.name != "csv" or builder.info.features or builder.config.features:
        return {}
    return _texts(datasets, builder.config.data_files[split], builder.config.sep)


def _texts(datasets, files: Sequence[str], separator: str) -> dict[str, Any]:
    """Returns the settings by which the reader of CSV guesses no types: 007 and NA are texts.

    Nor does it take the first field of rows that have more fields than the header for their name, which
    would shift all others.
    """
    import pandas

    columns = pandas.read_csv(files[0], sep=separator, nrows=0).columns
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    how: dict[str, Any] = {"sep": separator, "keep_default_na": False}
    for file in files:
        _require_columns(pandas, file, dtype=str, **how)
    return how | {"features": features, "index_col": False}


def _require_columns(pandas, file: str, **how) -> None:
    """Refuses a CSV file with values in no column; empty fields after the last column are left out.

    A file whose first row has no more fields than the header is refused by its reader if others have.

    Raises:
      DataError: a row with such a value.
    """
    first = pandas.read_csv(file, nrows=1, **how)
    if first.empty or isinstance(first.index, pandas.RangeIndex):
        return
    columns, number = len(first.columns), 0
    for some in pandas.read_csv(file, chunksize=10_000, **how):
        fields = some.reset_index(allow_duplicates=True)  # the index is what shifted the others
        beyond = (fields.iloc[:, columns:].fillna("") != "").any(axis=1)
        if beyond.any():
            raise DataError(
                f"{file}, row {number + int(beyond.argmax())}: has more fields than the header, which "
                f"has {columns}: put texts with {how['sep']!r} in quotes, or name all columns"
            )
        number += len(some)


def _config(datasets, source: str, config: str | None) -> str | None:
    bare = os.path.isdir(source) and datasets.get_dataset_config_names(source) == [_DEFAULT]
    return None if bare else config


def _format(path: Path) -> str | None:
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return FORMATS.get(name.suffix)


def _asking(source: str, what: str, read: Callable[[Any], T]) -> T:
    import datasets  # here, because it takes a second

    try:
        with warnings.catch_warnings():
            # What is left out is empty, see `_require_columns`.
            warnings.filterwarnings("ignore", "Length of header or names does not match")
            return read(datasets)
    except DataError:
        raise
    except Exception as error:  # and of those of its readers
        cause: BaseException = error
        while cause.__cause__ is not None:  # `datasets` says only that there was an error
            cause = cause.__cause__
        why = f"{type(cause).__name__}: {str(cause).strip()}"
        remedy = (
            "Mend this in the local files: texts are UTF-8, and CSV has a header and rows"
            if os.path.exists(source)
            else "Without a network give a folder with a copy as source, or set FEDRAG_DATA to one "
            "with local files"
        )
        raise DataError(f"{what} of {source} cannot be read ({why}). {remedy}") from error
