"""Tables of the Hugging Face hub, of copies of its repositories and of local files, as the package
`datasets` reads them: memory-mapped, a row becomes Python when it is read.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedrag_jax.errors import DataError

Row = Mapping[str, Any]
T = TypeVar("T")

# What reads a local file, by its ending.
FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".json": "json",
           ".jsonl": "json"}  # fmt: skip
ONLY_SPLIT = "train"  # as `datasets` calls the rows of a file
_DEFAULT = "default"  # as it calls the configuration of a folder without the hub's README


def is_table(path: str | os.PathLike) -> bool:
    """Whether a local file is one that `table` reads, by its ending."""
    return Path(path).is_file() and _format(Path(path)) is not None


def table(source: str, config: str | None, split: str, revision: str = "") -> Iterable[Row]:
    """The rows of a split.

    Args:
      source: a repository of the hub, a folder that is a copy of one, or a file of `FORMATS` (also
        gzipped), whose only split is "train".
      config: of the repository, as the hub calls it; None for its own. A folder without the hub's
        README has none.
      revision: a commit of the repository, a branch or a tag; "" for what it has now.

    Raises:
      DataError: it cannot be read, with the reason.
    """
    return _asking(source, f"split {split!r}", lambda d: _load(d, source, config, split, revision))


def splits(source: str, config: str | None = None, revision: str = "") -> list[str]:
    """The splits that a source of `table` has, by their names.

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
    """The commit of a repository of the hub that a revision names, by default the newest.

    Returns:
      40 hex digits; "" for a folder or a file, and where the hub cannot be asked (`datasets` then reads
      what it has kept).

    Raises:
      DataError: the repository has no such revision.
    """
    if os.path.exists(source):
        return ""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return HfApi().dataset_info(source, revision=revision or None).sha or ""
    except RevisionNotFoundError as error:
        raise DataError(f"{source} has no revision {revision!r}: give a commit of it") from error
    except Exception:  # whatever the library of its connections raises; `table` says what is wrong
        return ""


def origin(source: str, config: str | None, revision: str) -> str:
    """What was read, for people and manifests."""
    of = f", {config}" if config else ""
    return source + of + (f" @ {revision}" if revision else "")


def converted(
    rows: Iterable[Row], convert: Callable[[Row, str], T], source: str, split: str, what: str
) -> Iterator[T]:
    """Each row as `convert(row, "SPLIT-NUMBER")` makes it.

    Args:
      what: whose rows they should be, for messages.

    Raises:
      DataError: a row that is another's, with the columns there are.
    """
    for i, row in enumerate(rows):
        try:
            yield convert(row, f"{split}-{i}")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{source}, split {split!r}, row {i}: not as {what} has them "
                f"({type(error).__name__}: {error}); its columns are {', '.join(row)}"
            ) from error


def _load(datasets, source: str, config: str | None, split: str, revision: str):
    if not is_table(source):
        own = _config(datasets, source, config)
        return datasets.load_dataset(source, own, split=split, revision=revision or None)
    path = Path(source)
    how = {"sep": "\t"} if ".tsv" in path.suffixes else {}
    return datasets.load_dataset(_format(path), data_files=[str(path)], split=split, **how)


def _config(datasets, source: str, config: str | None) -> str | None:
    bare = os.path.isdir(source) and datasets.get_dataset_config_names(source) == [_DEFAULT]
    return None if bare else config


def _format(path: Path) -> str | None:
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return FORMATS.get(name.suffix)


def _asking(source: str, what: str, read: Callable[[Any], T]) -> T:
    import datasets  # here, because it takes a second

    try:
        return read(datasets)
    except Exception as error:  # and of those of its readers
        raise DataError(
            f"{what} of {source} cannot be read ({type(error).__name__}: {str(error).strip()}). "
            "Without a network give a folder with a copy as source, or set FEDRAG_DATA to one with "
            "local files"
        ) from error
