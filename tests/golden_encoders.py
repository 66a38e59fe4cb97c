"""A golden encoder that says how it wants to be used, and its vectors where it says nothing."""

import json
import pathlib
import shutil

import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.models import hub, sentence_folders
from fedrag_jax.retrieval.embedding import embed_texts

GOLDEN = pathlib.Path(__file__).parent / "golden"
RNG = np.random.default_rng(0)
WORDS = [f"w{i}" for i in range(1, 60)]
PASSAGES = [Passage(f"p{i}", "", " ".join(RNG.choice(WORDS, 1 + i % 7))) for i in range(60)]
QUESTIONS = [" ".join(RNG.choice(WORDS, 4)) for _ in range(12)]


def folder(tmp_path, name="bert_cls", **use) -> pathlib.Path:
    """A random encoder, not normalised, that says how it wants to be used."""
    copy = shutil.copytree(GOLDEN / name, tmp_path / "encoder")
    (copy / sentence_folders.USE).write_text(json.dumps(use))
    return copy


def plain(texts, name="bert_cls"):
    """float64 vectors of texts by the encoder that says nothing."""
    model = hub.load(GOLDEN / name)
    length = model.network.config.max_length
    return embed_texts(model.network, model.params, model.tokenizer, texts, max_length=length)
