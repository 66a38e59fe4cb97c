"""A RAG system on disk: one folder of ordinary checkpoints, passages and settings."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fedrag_jax import files
from fedrag_jax.data.examples import Passage
from fedrag_jax.data.prompts import PromptStyle
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.generation.rollouts import Searching
from fedrag_jax.models import hub, peft, tensors
from fedrag_jax.retrieval.index.by_name import lies_elsewhere, saved_options
from fedrag_jax.retrieval.index.silos import SiloIndex
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.retrieval.stores.registry import open_store

HEAD, SETTINGS, STORE = "head.safetensors", "system.json", "store"
MODELS = "generator", "document_encoder", "query_encoder"
# All that `_write` creates. A store, which is saved beside it, keeps the files of others itself.
PARTS = *MODELS, "adapters", HEAD, "passages.jsonl", SETTINGS
# While a folder is saved: what is being written, and complete parts on their way to their place.
FRESH, SAVED = ".saving", ".saved"


def is_system(folder: pathlib.Path) -> bool:
    """Returns whether a folder holds a saved system; checks the content of its settings file."""
    try:
        _settings(folder)
    except (OSError, ValueError, TypeError):
        return False
    return True


def require_free(folder: pathlib.Path) -> None:
    """Refuses a folder where parts of a system would replace foreign files or folders.

    A save that fails or is killed leaves none of `PARTS` in a folder without a system.

    Raises:
      CheckpointError: the folder holds no system, but something with the name of a part.
    """
    if is_system(folder):
        return
    for part in PARTS:
        if os.path.lexists(folder / part):
            raise CheckpointError(
                f"{folder / part} is not of a saved system and would be lost: choose another folder, "
                "or move it away"
            )


def require_new(folder: pathlib.Path) -> None:
    """Refuses a folder that holds a system, or foreign files where its parts would be.

    Raises:
      ConfigError: it holds a system.
      CheckpointError: as `require_free`.
    """
    require_free(folder)
    if is_system(folder):
        raise ConfigError(f"{folder} holds a system already: choose another folder")


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    settings = json.loads(_place(folder, SETTINGS).read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not settings.keys() >= {"top_k", "prompt_style"}:
        raise ValueError(f"{SETTINGS} is not of a system")
    settings["prompt_style"] = PromptStyle(**settings["prompt_style"])
    if "searching" in settings:  # not of older systems
        settings["searching"] = Searching.from_dict(settings["searching"])
    return settings


def write(folder: pathlib.Path, system: Any) -> None:
    """Writes a `RAGSystem`: generator, adapters (PEFT), both encoders, head, passages, store, settings.

    It replaces an old system when all of its own parts are written. If that fails, the disk is full or
    the process is killed, the old system stays. Other files in the folder are kept. Only one process at
    a time may save to a folder.

    Raises:
      CheckpointError: the generator is quantised, the retriever is over silos, a parameter is not
        finite, or a foreign file has the name of a part; nothing is written.
      ConfigError: a file cannot be written.
    """
    if isinstance(system.retriever.index, SiloIndex):
        raise CheckpointError(
            "a system over silos has no index of its own to save: save it before over_silos"
        )
    hub.refuse_quantized(system.generator, folder)
    require_free(folder)
    with files.writing(folder):
        with _replacing(folder) as fresh:
            _write(fresh, system, system.retriever)
            # Not among the parts that are moved: it may be a store that lives there, and it is replaced
            # in one step, too.
            if system.store is not None:
                system.store.save(folder / STORE)
        if system.retriever.head is None:
            (folder / HEAD).unlink(missing_ok=True)


@contextlib.contextmanager
def _replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a folder for new parts, which replace the old ones if the block ends without an error."""
    _moved(folder)
    fresh = folder / FRESH
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        fresh.rename(folder / SAVED)  # from now on these are the parts of the system, see `_place`
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, CheckpointError):  # names the folder that people know
            raise CheckpointError(str(error).replace(str(fresh), str(folder))) from error
        raise
    _moved(folder)


def _moved(folder: pathlib.Path) -> None:
    """Moves complete parts to their place, also those of a save that was killed meanwhile."""
    saved = folder / SAVED
    for part in [*saved.iterdir()] if saved.is_dir() else []:
        if part.name.startswith("former "):
            continue
        if (folder / part.name).exists():
            (folder / part.name).rename(saved / f"former {part.name}")
        part.rename(folder / part.name)
    shutil.rmtree(saved, ignore_errors=True)


def _place(folder: pathlib.Path, part: str) -> pathlib.Path:
    """Returns the path of a part: not yet in its place if a save was killed while it moved them."""
    saved = folder / SAVED / part
    return saved if saved.exists() else folder / part


def _write(folder: pathlib.Path, system: Any, retriever: Retriever) -> None:
    encoder = functools.partial(hub.Pretrained, retriever.encoder, tokenizer=retriever.tokenizer)
    encoders = (encoder(x, name="encoder") for x in (retriever.document, retriever.query))
    models = dict(zip(MODELS, (system.generator, *encoders), strict=True))
    for name, model in models.items():
        hub.save(model, folder / name)
    peft.save(system.adapters, system.decoder, folder / "adapters", base="../generator")
    if retriever.head is not None:
        tensors.save_arrays({"head": retriever.head}, folder / HEAD)
    with open(folder / "passages.jsonl", "w", encoding="utf-8") as file:
        for passage in retriever.passages:
            file.write(json.dumps(dataclasses.asdict(passage), ensure_ascii=False) + "\n")
    settings = {
        "top_k": system.top_k,
        "marginal_k": system.marginal_k,
        "score_scale": system.score_scale,
        "prompt_style": system.prompts.bare._asdict(),
        "system_prompt": system.prompts.system,
        "searching": system.searching.as_dict(),
        "max_passage_tokens": system.prompts.max_passage_tokens,
        "max_answer_tokens": system.prompts.max_answer_tokens,
        "store": system.store is not None,
        "head": retriever.head is not None,
        "index": system.index,
        "index_options": saved_options(system.index, system.index_options),
        "vectors": retriever.dtype,
        # The files are float32, which holds all types of parameters exactly.
        "dtypes": {
            name: str(jnp.result_type(*jax.tree.leaves(model.params)))
            for name, model in models.items()
        },
    }
    files.write_json(folder / SETTINGS, settings, indent=2)


def read(
    folder: pathlib.Path, memory_map: bool = False, elsewhere: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a folder that `write` wrote: options of `RAGSystem.build`, and parts for its `replace`.

    Args:
      memory_map, elsewhere: as in `RAGSystem.load`.

    Raises:
      CheckpointError: the folder holds no saved system, or its index or store lies elsewhere.
    """
    try:
        settings = _settings(folder)
        lines = _place(folder, "passages.jsonl").read_text(encoding="utf-8").split("\n")
        passages = [Passage(**json.loads(line)) for line in lines if line]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no saved RAGSystem ({error}); save one there first"
        ) from error
    index, where = settings.get("index", "flat"), settings.get("index_options", {})
    if lies_elsewhere(index, where) and not elsewhere:
        raise CheckpointError(
            f"{folder}: the index is a service's, {index} at {where.get('at')}: if you trust that "
            "place with your passages and questions, load the system with elsewhere=True"
        )
    dtypes = dict.fromkeys(MODELS, "float32") | settings.pop("dtypes", {})
    generator, document, query = (hub.load(_place(folder, n), dtypes[n]) for n in MODELS)
    decoder, adapters = peft.load(generator.network, _place(folder, "adapters"))
    head = _place(folder, HEAD)
    store, has_head = settings.pop("store", False), settings.pop("head", head.exists())
    options = settings | {
        "passages": passages,
        "store": open_store(folder / STORE, memory_map, elsewhere) if store else None,
        "generator": generator,
        "retriever": document,
        "adapters": decoder.lora,
        "head": tensors.load_arrays(head)["head"] if has_head else None,
    }
    return options, {"adapters": adapters, "query": query.params}
