"""Builds a saved system from a folder of documents, and updates it when they change."""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fedrag_jax import files
from fedrag_jax.data import documents
from fedrag_jax.data.examples import Passage, embedding_text, half_character
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.models.fingerprint import fingerprint
from fedrag_jax.rag import RAGSystem
from fedrag_jax.rag_folder import STORE, is_system, require_free
from fedrag_jax.retrieval.stores.passage_source import is_store
from fedrag_jax.systems.journal import Journal, Origin

JOURNAL = "documents.sqlite"
AT_ONCE = 512  # passages embedded between two writes: what a kill may cost
SLICE = 65_536  # passages put into a store at once
READING = 3  # grows whenever files are read in another way: those of before are read again


class Indexed(NamedTuple):
    """The result of indexing.

    Attributes:
      files, passages: the current numbers of files and passages in the system.
      added, changed, removed: numbers of passages that differ from before.
      unreadable: items that could not be read, each with the reason: files (their old passages stay),
        pages of files, files of other types, links to folders.
    """

    files: int
    passages: int
    added: int
    changed: int
    removed: int
    unreadable: dict[str, str]


def index(
    source: pathlib.Path,
    folder: pathlib.Path,
    begin: Callable[[], RAGSystem],
    *,
    tokens: int | None = None,
    overlap: int | None = None,
    moved: bool = False,
    elsewhere: bool = False,
    progress: bool = False,
) -> Indexed:
    """Builds or updates the saved system in `folder` from the current documents in `source`.

    Progress is saved in the folder: after a kill, the same call resumes. Later calls read only changed
    files and embed only their new passages. Passages of deleted documents are removed from the store.

    Args:
      source: a folder of documents, or one file, see `documents`.
      folder: folder of the saved system; created by the first call.
      begin: function that returns the system for the first call, over an empty store.
      tokens: maximum tokens of a passage, by the document encoder's tokenizer; default: as before, and
        at first 200, or the encoder's limit if that is less.
      overlap: tokens that a passage shares with the previous one; default: a fifth, or as
        before if another number was chosen that is below tokens / 2.
      moved: whether the documents have moved to another folder.
      elsewhere: as in `open_store`.

    Raises:
      DataError: no documents, no readable documents, or an id that occurs twice.
      ConfigError: a saved system without a store, or of other documents; passages longer than the
        encoder's limit; another process that is indexing.
      CheckpointError: the content of the folder is damaged.
    """
    there = is_system(folder)
    if not there:
        require_free(folder)
    paths, unreadable = _documents(source, folder)
    system = RAGSystem.load(folder, elsewhere=elsewhere) if there else begin()
    if system.store is None:
        raise ConfigError(
            f"{folder} answers from its own corpus: index into another folder, like this system"
        )
    with files.hold(folder), Journal(folder / JOURNAL) as journal:
        before, root = journal.origin, str(source.resolve())
        if before and before.root != root and not moved:
            raise ConfigError(
                f"{folder} holds the documents of {before.root}, not of {root}: index into another "
                "folder, or say that they moved; what is gone is taken out"
            )
        if not there:
            _require_own(system.store, journal)
        tokens, overlap = _lengths(system, tokens, overlap, before)
        read = _read(paths, source, journal, system, tokens, overlap, progress)
        journal.origin = Origin(root, tokens, overlap)  # not of a call that was refused
        counts = _bring_up_to_date(system, read.passages, journal, progress)
        if not there:
            system.save(folder)
        elif any(counts):
            system.store.save(folder / STORE)
        journal.finish([*journal.names() - {documents.name_of(path, source) for path in paths}])
    unreadable |= read.unreadable
    return Indexed(len(paths) - read.failed, len(system.store), *counts, unreadable)


def _documents(
    source: pathlib.Path, folder: pathlib.Path
) -> tuple[list[pathlib.Path], dict[str, str]]:
    """Returns the files to read, and the left-out files with the reasons.

    Files of a saved system or store among the documents are in neither.
    """

    @functools.cache
    def of_a_system(inside: pathlib.Path) -> bool:
        if not inside.is_relative_to(source):
            return False
        if inside.resolve() == folder.resolve() or is_system(inside) or is_store(inside):
            return True
        return inside != source and of_a_system(inside.parent)  # the parent of "." is "."

    found = documents.find(source)
    files = [path for path in found.files if not of_a_system(path.parent)]
    if not files:
        raise DataError(
            f"all documents in {source} belong to saved systems, perhaps to the one in {folder}: "
            "choose a folder of its own for the system"
        )
    left_out = {p: why for p, why in found.left_out.items() if not of_a_system(p.parent)}
    return files, {_shown(documents.name_of(path, source)): why for path, why in left_out.items()}


def _require_own(store, journal: Journal) -> None:
    """Refuses a store with foreign passages, because indexing would remove them."""
    own = {p.id for name in journal.names() for p in journal.passages(name) or ()}
    if strange := [p.id for p in store.passages() if p.id not in own]:
        raise ConfigError(
            f"the store of the new system holds {len(strange):,} foreign passages, such as "
            f"{strange[0]!r}: choose another collection"
        )


def _lengths(
    system: RAGSystem, tokens: int | None, overlap: int | None, before: Origin | None
) -> tuple[int, int]:
    if before and tokens in (None, before.tokens):
        return before.tokens, before.overlap if overlap is None else overlap
    room = system.retriever.passage_room
    tokens = min(200, room) if tokens is None else tokens
    if tokens > room:
        raise ConfigError(
            f"the document encoder reads {room} tokens of a passage: passages of {tokens} would be "
            "searched by their beginnings alone; choose fewer"
        )
    if overlap is None:
        overlap = tokens // 5
        # One that was chosen stays; the usual one follows the size.
        if before and before.overlap != before.tokens // 5 and before.overlap < tokens / 2:
            overlap = before.overlap
    return tokens, overlap


def _shown(name: str) -> str:
    """Returns a printable file name, whatever its bytes are."""
    return name.encode("utf-8", "backslashreplace").decode()


class _Read(NamedTuple):
    """The passages of all files, the unreadable parts with reasons, and the number of failed files."""

    passages: list[Passage]
    unreadable: dict[str, str]
    failed: int


def _read(paths, source, journal: Journal, system: RAGSystem, tokens, overlap, progress) -> _Read:
    tokenizer, unreadable, failed = system.retriever.tokenizer, {}, 0
    how = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    of_file: dict[str, list[Passage]] = {}
    for path in tqdm(paths, "read", unit=" files", disable=not progress, mininterval=1):
        name = documents.name_of(path, source)
        if half_character(name):
            unreadable[_shown(name)], failed = "its name is not UTF-8", failed + 1
            continue
        try:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest = f"{content} {how} {tokens} {overlap} {READING}"
            some = journal.passages(name, digest)
            if some is None:
                read = documents.read(path, source)
                some = [p for d in read for p in documents.split(d, tokenizer, tokens, overlap)]
                journal.keep_passages(
                    name, digest, some, "; ".join(d.unread for d in read if d.unread)
                )
            if unread := journal.unread(name):
                unreadable[name] = unread
        except (DataError, OSError) as error:
            unreadable[name], failed = str(error), failed + 1
            some = journal.passages(name) or []
        of_file[name] = some
    _require_unique(of_file)
    passages = [passage for some in of_file.values() for passage in some]
    if not passages:
        why = "".join(f"; {reason}" for reason in [*unreadable.values()][:3])
        raise DataError(f"no words in the {len(paths)} documents of {source}{why}")
    return _Read(passages, unreadable, failed)


def _require_unique(of_file: Mapping[str, Sequence[Passage]]) -> None:
    """Refuses two files with the same passage id."""
    seen: dict[str, str] = {}
    for name, passages in of_file.items():
        for passage in passages:
            if passage.id in seen:
                raise DataError(
                    f"{seen[passage.id]} and {name} both hold a passage of the id {passage.id!r}: give "
                    "one another, or leave the ids of lines out, which then go by file and place"
                )
            seen[passage.id] = name


def _bring_up_to_date(
    system: RAGSystem, passages: Sequence[Passage], journal: Journal, progress: bool
) -> tuple[int, int, int]:
    """Makes the store hold exactly these passages; returns the numbers added, changed and removed."""
    store, wanted = system.store, {p.id: p for p in passages}
    held = {p.id: p for p in store.passages()}
    gone = [i for i in held if i not in wanted]
    new = [p for p in passages if p.id not in held]
    changed = [p for p in passages if p.id in held and held[p.id] != p]
    embedded = _embedded(system, [*new, *changed], journal, progress)
    store.delete(gone)
    for put, some in ((store.replace, changed), (store.add, new)):
        for start in range(0, len(some), SLICE):
            part = some[start : start + SLICE]
            put(part, None if embedded is None else np.stack([embedded(p) for p in part]))
    return len(new), len(changed), len(gone)


def _embedded(
    system: RAGSystem, passages: Sequence[Passage], journal: Journal, progress: bool
) -> Callable[[Passage], np.ndarray] | None:
    """Returns a function from passages to vectors, using the journal; None for a store without
    vectors."""
    if system.store.dimension is None:
        return None
    retriever = system.retriever
    encoder = fingerprint(retriever.document, retriever.tokenizer, retriever.encoder.config)
    if retriever.head is not None:
        encoder.update(np.ascontiguousarray(retriever.head).view(np.uint8))

    def key(passage: Passage) -> str:
        own = encoder.copy()
        own.update(embedding_text(passage).encode())
        return own.hexdigest()

    missing = {k: p for p in passages if journal.vector(k := key(p)) is None}
    with tqdm(
        desc="embed", total=len(missing), unit=" passages", disable=not progress, mininterval=1
    ) as bar:
        for some in _slices([*missing], AT_ONCE):
            journal.keep_vectors(some, system.embed([missing[k] for k in some]))
            bar.update(len(some))
    return lambda passage: journal.vector(key(passage))


def _slices(items: list, most: int) -> Iterator[list]:
    for start in range(0, len(items), most):
        yield items[start : start + most]
