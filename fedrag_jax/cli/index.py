"""Index a folder of documents as a new system, or update a system after they changed.

Reads txt, md, html, pdf and jsonl (objects with "text" and optional "id" and "title"). Other types of
files are listed, with exit code 3. Passage ids are FILE#0, FILE#1, ...; a JSON line with an "id" keeps
it, followed by #0, #1, ... if it is split.

Run the same command again to resume after a kill, or to update the system: only new and changed files
are read, and passages of deleted files are removed.
"""

import argparse
import pathlib
import sys
import time

from fedrag_jax.cli.common import add_elsewhere, add_json, harmless, print_json, require_least
from fedrag_jax.retrieval.stores.registry import KINDS
from fedrag_jax.retrieval.stores.registry import NEW as NEW_STORES

NAMED = 20  # things left out for one reason that are told by name without --json
SIMILARITIES = ("cosine", "dot", "euclidean")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fedrag index`."""
    parser.add_argument("documents", type=pathlib.Path, help="a folder or a file")
    parser.add_argument(
        "--to", type=pathlib.Path, required=True, help="folder of the system, new or to be updated"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        help="longest passage in tokens (default: as before, or 200, or the retriever's limit)",
    )
    parser.add_argument(
        "--overlap",
        type=int,
        help="tokens shared by neighbouring passages (default: as before, or a fifth)",
    )
    parser.add_argument(
        "--moved", action="store_true", help="the documents have moved to this folder"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_json(parser)
    add_elsewhere(parser)
    new = parser.add_argument_group("options of a new system")
    new.add_argument(
        "--like", type=pathlib.Path, help="take models, adapters and prompts from this saved system"
    )
    new.add_argument(
        "--retriever",
        help="builtin:encoder (default), minilm, a folder or a hub id",
    )
    new.add_argument(
        "--generator",
        help="builtin:decoder (default), smollm2, a folder, a GGUF file or a hub id",
    )
    new.add_argument(
        "--prompt-style",
        help="compact, instruct, cited, chat, chat_cited, ... (default: chat if the generator has a "
        "chat template, else instruct; compact for the built-in generator)",
    )
    new.add_argument(
        "--query-prompt", help="prefix of questions for the retriever (default: the model's own)"
    )
    new.add_argument(
        "--document-prompt",
        help="prefix of passages for the retriever (default: the model's own)",
    )
    new.add_argument(
        "--similarity",
        choices=SIMILARITIES,
        help="similarity of vectors (default: the model's own, else cosine)",
    )
    new.add_argument("--system-prompt", help="text at the start of every prompt")
    new.add_argument("--top-k", type=int, help="passages to read for an answer (default: 5)")
    new.add_argument(
        "--store",
        choices=NEW_STORES,
        help="; ".join(f"{name}: {KINDS[name].about}" for name in NEW_STORES),
    )
    new.add_argument("--at", help="qdrant: folder or address; postgres: connection string")
    new.add_argument("--collection", help="qdrant: collection; postgres: table (default: fedrag)")
    new.add_argument("--language", help="bm25, hybrid: language for stemming, such as english")
    new.add_argument(
        "--rerank", help="cross-encoder that reranks the search results: folder or hub id"
    )


NEW = ("like", "retriever", "generator", "prompt_style", "query_prompt", "document_prompt",
       "similarity", "system_prompt", "top_k", "store", "at", "collection", "language",
       "rerank")  # fmt: skip
# What --like brings along.
MODELS = {"--retriever", "--generator", "--prompt-style", "--query-prompt", "--document-prompt",
          "--similarity"}  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs `fedrag index`; returns 3 if something in the folder could not be read."""
    from fedrag_jax.errors import ConfigError
    from fedrag_jax.rag_folder import is_system
    from fedrag_jax.systems.indexing import index

    require_least(args, top_k=1)
    given = [f"--{name.replace('_', '-')}" for name in NEW if getattr(args, name) is not None]
    new = not is_system(args.to)
    if given and not new:
        raise ConfigError(
            f"{args.to} holds a system already, and {', '.join(given)} apply to new systems only: "
            "leave them out, or choose another folder with --to"
        )
    if args.like and set(given) & MODELS:
        raise ConfigError(
            "--like takes models and prompts from a saved system: leave the other options out"
        )
    start = time.perf_counter()
    found = index(
        args.documents,
        args.to,
        lambda: new_system(args),
        tokens=args.tokens,
        overlap=args.overlap,
        moved=args.moved,
        elsewhere=args.elsewhere,
        progress=not args.quiet,
    )
    seconds = time.perf_counter() - start
    if new and not args.quiet and not (args.like or args.generator):
        print(
            "the built-in generator can read only the built-in world: for answers from other documents "
            "index them into another folder with --generator",
            file=sys.stderr,
        )
    _tell_unread(found.unreadable)
    if args.json:
        print_json(found._asdict() | {"system": str(args.to), "seconds": round(seconds, 3)})
    else:
        changes = (
            f"{found.added:,} new, {found.changed:,} changed, {found.removed:,} removed"
            if found.added or found.changed or found.removed
            else "nothing new"
        )
        print(
            f"{args.to}: {found.passages:,} passages of {found.files:,} documents ({changes}) "
            f"in {seconds:.1f} s"
        )
    return 3 if found.unreadable else 0


def _tell_unread(unreadable: dict[str, str]) -> None:
    """Prints one line per reason, with the first few file names for each."""
    names: dict[str, list[str]] = {}
    for name, reason in unreadable.items():
        names.setdefault(reason, []).append(name)
    for reason, some in names.items():
        more = f" and {len(some) - NAMED:,} more" if len(some) > NAMED else ""
        told = reason if f"{some[0]}:" in reason else f"{', '.join(some[:NAMED])}{more}: {reason}"
        print(f"left out: {harmless(told)}", file=sys.stderr)


def new_system(args: argparse.Namespace):
    """Builds a system over an empty store from the options."""
    from fedrag_jax.models import hub, sentence_folders
    from fedrag_jax.rag import RAGSystem
    from fedrag_jax.systems.system_like import system_like

    if args.like:
        like = RAGSystem.load(args.like, elsewhere=args.elsewhere)
        store = new_store(args, like.retriever.vectors.shape[1])
        system = system_like(like, store=store, top_k=args.top_k)
        return system if args.system_prompt is None else system.under(args.system_prompt)
    retriever = hub.load(args.retriever or "builtin:encoder")
    use = args.query_prompt, args.document_prompt, args.similarity
    retriever = sentence_folders.used_as(retriever, *use)
    generator = hub.load(args.generator or "builtin:decoder")
    style = args.prompt_style
    if style is None and (args.generator or "builtin:decoder").startswith("builtin:"):
        style = "compact"
    elif style is None:
        style = "chat" if generator.tokenizer.chat_template else "instruct"
    return RAGSystem.build(
        store=new_store(args, retriever.network.config.dimension),
        generator=generator,
        retriever=retriever,
        prompt_style=style,
        system_prompt=args.system_prompt or "",
        top_k=5 if args.top_k is None else args.top_k,
    )


def new_store(args: argparse.Namespace, dimension: int):
    """Builds an empty store from the options."""
    from fedrag_jax.retrieval.stores import registry

    given = {name: getattr(args, name) for name in ("at", "collection", "language")}
    given = {name: value for name, value in given.items() if value is not None}
    store = registry.new_store(args.store or "flat", dimension, **given)
    if args.rerank:
        from fedrag_jax.models.cross_encoder import CrossEncoder
        from fedrag_jax.retrieval.stores.reranked import RerankedStore

        return RerankedStore(store, CrossEncoder.load(args.rerank))
    return store
