"""A folder of documents becomes a saved system that answers from them, and follows their changes."""

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
    """What came of it.

    Attributes:
      files, passages: that the system has now.
      added, changed, removed: passages, against what it had before.
      unreadable: what could not be read, each with the reason: files (what the system had of them
        stays), files but for some of their pages, files of other kinds, links to folders.
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
    """Makes the system in a folder answer from the documents of another, as they are now.

    What was read and embedded is kept in the folder as it is done: after a kill the same call goes on.
    Later calls read the files that changed and embed their new passages alone; what is gone from the
    source is taken out of the store.

    Args:
      source: a folder of documents, or one file, see `documents`.
      folder: of a saved system; made by the first call.
      begin: gives the system of the first call, over an empty store.
      tokens: of a passage, by the document encoder's tokenizer; by default as many as before, at first
        200, or what the encoder reads if that is less.
      overlap: tokens that a passage shares with the one before; by default as before, at first a fifth.
      moved: the documents are those of another folder than before.
      elsewhere: as in `open_store`.

    Raises:
      DataError: no documents, none that can be read, an id that two of them have.
      ConfigError: a saved system without a store, or of other documents; passages longer than the
        encoder reads; another process at work.
      CheckpointError: what lies in the folder is damaged.
    """
    there = is_system(folder)
    if not there:
        require_free(folder)
    paths, unreadable = _documents(source, folder)
    system = RAGSystem.load(folder, elsewhere=elsewhere) if there else begin()
    if system.store is None:
        raise ConfigError(
            f"{folder} answers from passages of its own: index into another folder, like this system"
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
        journal.origin = Origin(root, tokens, overlap)
        read = _read(paths, source, journal, system, tokens, overlap, progress)
        counts = _bring_up_to_date(system, read.passages, journal, progress)
        if not there:
            system.save(folder)
        elif any(counts):
            system.store.save(folder / STORE)
        journal.finish([*journal.names() - {_name(path, source) for path in paths}])
    unreadable |= read.unreadable
    return Indexed(len(paths) - read.failed, len(system.store), *counts, unreadable)


def _documents(
    source: pathlib.Path, folder: pathlib.Path
) -> tuple[list[pathlib.Path], dict[str, str]]:
    """The files to be read, and what is left out by name, with the reason.

    Files of a saved system or store, which may lie among the documents, are neither.
    """

    @functools.cache
    def of_a_system(inside: pathlib.Path) -> bool:
        if not inside.is_relative_to(source):
            return False
        if inside.resolve() == folder.resolve() or is_system(inside) or is_store(inside):
            return True
        return of_a_system(inside.parent)

    found = documents.find(source)
    files = [path for path in found.files if not of_a_system(path.parent)]
    if not files:
        raise DataError(
            f"all documents in {source} belong to saved systems, perhaps to the one in {folder}: "
            "choose a folder of its own for the system"
        )
    left_out = {p: why for p, why in found.left_out.items() if not of_a_system(p.parent)}
    return files, {_shown(_name(path, source)): why for path, why in left_out.items()}


def _require_own(store, journal: Journal) -> None:
    """Refuses a store that others have filled: what is not of these documents would be taken out."""
    own = {p.id for name in journal.names() for p in journal.passages(name) or ()}
    if strange := [p.id for p in store.passages() if p.id not in own]:
        raise ConfigError(
            f"the store of the new system holds {len(strange):,} passages of others, such as "
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
    return tokens, tokens // 5 if overlap is None else overlap


def _name(path: pathlib.Path, source: pathlib.Path) -> str:
    return path.relative_to(source).as_posix() if path != source else path.name


def _shown(name: str) -> str:
    """A name for people, whatever its bytes are."""
    return name.encode("utf-8", "backslashreplace").decode()


class _Read(NamedTuple):
    """The passages of all files, what of them could not be read and why, and how many failed whole."""

    passages: list[Passage]
    unreadable: dict[str, str]
    failed: int


def _read(paths, source, journal: Journal, system: RAGSystem, tokens, overlap, progress) -> _Read:
    tokenizer, unreadable, failed = system.retriever.tokenizer, {}, 0
    how = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    of_file: dict[str, list[Passage]] = {}
    for path in tqdm(paths, "read", unit=" files", disable=not progress, mininterval=1):
        name = _name(path, source)
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
    """Refuses files that hold passages of one id."""
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
    """Has the store hold these passages and no others; passages added, changed and removed."""
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
    """What gives the vector of each passage, from the journal; None for a store without vectors."""
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
