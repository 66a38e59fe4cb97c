"""A RAG system on disk: one folder of ordinary checkpoints, passages and settings."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

from fedrag_jax import files
from fedrag_jax.data.examples import Passage
from fedrag_jax.data.prompts import PromptStyle
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.generation.rollouts import Searching
from fedrag_jax.models import hub, lora, peft, tensors
from fedrag_jax.models.network import Network
from fedrag_jax.retrieval.index.silos import SiloIndex
from fedrag_jax.retrieval.retriever import Retriever

HEAD, SETTINGS, STORE = "head.safetensors", "system.json", "store"


class Parts(NamedTuple):
    """The content of a saved system's folder.

    Attributes:
      decoder: the generator's network with its adapters.
      document: the document encoder.
      query: the parameters of the query encoder.
      settings: options of `RAGSystem.build` by name, and whether there is a store.
    """

    generator: hub.Pretrained
    decoder: Network
    adapters: Any
    document: hub.Pretrained
    query: Any
    head: Any
    passages: list[Passage]
    settings: dict[str, Any]

    @property
    def lora(self) -> lora.LoraConfig:
        """The LoRA configuration of the adapters."""
        return self.decoder.lora


def is_system(folder: pathlib.Path) -> bool:
    """Returns whether a folder holds a saved system; checks the content of its settings file."""
    try:
        _settings(folder)
    except (OSError, ValueError, TypeError):
        return False
    return True


def require_free(folder: pathlib.Path) -> None:
    """Refuses a folder where the settings file would overwrite a foreign file.

    Raises:
      CheckpointError: the folder has a foreign file of that name.
    """
    if (folder / SETTINGS).exists() and not is_system(folder):
        raise CheckpointError(
            f"{folder / SETTINGS} is not of a saved system and would be lost: choose another folder, "
            "or delete it"
        )


def require_new(folder: pathlib.Path) -> None:
    """Refuses a folder that holds a system or a foreign file where its settings would be.

    Raises:
      ConfigError: it holds a system.
      CheckpointError: as `require_free`.
    """
    require_free(folder)
    if is_system(folder):
        raise ConfigError(f"{folder} holds a system already: choose another folder")


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not settings.keys() >= {"top_k", "prompt_style"}:
        raise ValueError(f"{SETTINGS} is not of a system")
    settings["prompt_style"] = PromptStyle(**settings["prompt_style"])
    if "searching" in settings:  # not of older systems
        settings["searching"] = Searching.from_dict(settings["searching"])
    return settings


def write(folder: pathlib.Path, system: Any) -> None:
    """Writes a `RAGSystem`: generator, adapters (PEFT), both encoders, head, passages, store, settings.

    The settings are written last: if they exist, the folder is complete.

    Raises:
      CheckpointError: the generator is quantised, the retriever is over silos, or a foreign file has
        the name of the settings file; nothing is written.
      ConfigError: a file cannot be written.
    """
    if isinstance(system.retriever.index, SiloIndex):
        raise CheckpointError(
            "a system over silos has no index of its own to save: save it before over_silos"
        )
    hub.refuse_quantized(system.generator, folder)
    require_free(folder)
    with files.writing(folder):
        _write(folder, system, system.retriever)


def _write(folder: pathlib.Path, system: Any, retriever: Retriever) -> None:
    (folder / SETTINGS).unlink(missing_ok=True)
    hub.save(system.generator, folder / "generator")
    peft.save(system.adapters, system.decoder, folder / "adapters", base="../generator")
    for side in ("query", "document"):
        encoder = hub.Pretrained(
            retriever.encoder, getattr(retriever, side), retriever.tokenizer, side
        )
        hub.save(encoder, folder / f"{side}_encoder")
    if retriever.head is not None:
        tensors.save_arrays({"head": retriever.head}, folder / HEAD)
    else:
        (folder / HEAD).unlink(missing_ok=True)
    with open(folder / "passages.jsonl", "w", encoding="utf-8") as file:
        for passage in retriever.passages:
            file.write(json.dumps(dataclasses.asdict(passage), ensure_ascii=False) + "\n")
    if system.store is not None:
        system.store.save(folder / STORE)
    settings = {
        "top_k": system.top_k,
        "marginal_k": system.marginal_k,
        "score_scale": system.score_scale,
        "prompt_style": system.prompts.style._asdict(),
        "searching": system.searching.as_dict(),
        "max_passage_tokens": system.prompts.max_passage_tokens,
        "max_answer_tokens": system.prompts.max_answer_tokens,
        "store": system.store is not None,
    }
    files.write_json(folder / SETTINGS, settings, indent=2)


def read(folder: pathlib.Path) -> Parts:
    """Reads a folder that `write` wrote.

    Raises:
      CheckpointError: the folder holds no saved system.
    """
    try:
        settings = _settings(folder)
        lines = (folder / "passages.jsonl").read_text(encoding="utf-8").split("\n")
        passages = [Passage(**json.loads(line)) for line in lines if line]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no saved RAGSystem ({error}); save one there first"
        ) from error
    generator, document = (hub.load(folder / n) for n in ("generator", "document_encoder"))
    decoder, adapters = peft.load(generator.network, folder / "adapters")
    return Parts(
        generator,
        decoder,
        adapters,
        document,
        hub.load(folder / "query_encoder").params,
        tensors.load_arrays(folder / HEAD)["head"] if (folder / HEAD).exists() else None,
        passages,
        settings,
    )
