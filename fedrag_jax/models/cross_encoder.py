"""Cross-encoders: read question and passage together and return one score.

Nogueira and Cho 2019 (1901.04085). They are slower but more precise than comparing vectors: use them to
rerank the few passages of a search (`retrieval.stores.reranked`).
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fedrag_jax.data.padding import clipped
from fedrag_jax.data.prompts import plain
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.models import fetching, hub, tensors
from fedrag_jax.models.encoder import Encoder
from fedrag_jax.models.families import FAMILIES, Family
from fedrag_jax.models.fingerprint import fingerprint
from fedrag_jax.models.layers import Linear
from fedrag_jax.models.network import Network

# Tokens a batch, padding included: on a CPU what its cache holds, as for `retrieval.embedding`.
_BATCH_TOKENS = {"cpu": 1024}
_BATCH_TOKENS_ACCELERATOR = 65536
_NARROWEST = 16  # tokens


class _Head(NamedTuple):
    """The architecture name of a model_type, and the two tensors of its head on the first token."""

    architecture: str
    dense: str
    out: str


_HEADS = {
    "bert": _Head("BertForSequenceClassification", "bert.pooler.dense", "classifier"),
    "roberta": _Head("RobertaForSequenceClassification", "classifier.dense", "classifier.out_proj"),
    "xlm-roberta": _Head(
        "XLMRobertaForSequenceClassification", "classifier.dense", "classifier.out_proj"
    ),
}
# RoBERTa's pooler, in old checkpoints, does not reach its head.
_IGNORED = r"roberta\.pooler\..*|.*position_ids"


class PairScorer(Encoder):
    """An encoder with a two-layer head on its first token; scores a pair of texts."""

    def __init__(self, config, lora=None, *, rngs):
        super().__init__(config, lora, rngs=rngs)
        d = config.hidden_size
        self.dense = Linear("dense", d, d, {}, bias=True, rngs=rngs)
        self.out = Linear("out", d, 1, {}, bias=True, rngs=rngs)

    def score(self, tokens: jax.Array, types: jax.Array, lengths: jax.Array) -> jax.Array:
        """Logits float32 [B].

        Args:
          tokens, types: int [B, T], padded on the right.
          lengths: int [B], the number of tokens without padding.
        """
        mask = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        first = self.hidden(tokens, mask, types)[:, 0]
        return self.out(jnp.tanh(self.dense(first)))[:, 0].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class CrossEncoder:
    """A `PairScorer`, its parameters, and the tokenizer (Hugging Face) they were trained with."""

    network: Network
    params: Any
    tokenizer: Any
    name: str

    @classmethod
    def load(cls, name_or_path: str | pathlib.Path) -> "CrossEncoder":
        """Loads a Hugging Face model for sequence classification with one label.

        Args:
          name_or_path: a folder, or a model on the Hugging Face hub, such as
            "cross-encoder/ms-marco-MiniLM-L6-v2" or "BAAI/bge-reranker-base", downloaded once.

        Raises:
          CheckpointError: an unknown model, another architecture, several labels, an unsupported
            option, only pickled weights, or tensors that are missing, unexpected or of another shape
            (all reported at once).
        """
        folder = fetching.place_of(str(name_or_path))
        hf = hub.read_config(folder)
        with hub.told_by(folder / "config.json"):
            family = _family_of(hf)
            tokenizer = _tokenizer(folder, hf["vocab_size"])
            config = family.read(hf, max_length=tokenizer.model_max_length)
        model = cls(
            network := Network.of(family.module, config),
            tensors.read_params(folder, tensors.opened(folder), family, network, jnp.float32),
            tokenizer,
            str(name_or_path),
        )
        # Cut to this length once and for all: a tokenizer cannot be told to while others use it.
        model._tokenize([""], [""])
        return model

    def fingerprint(self) -> str:
        """A hash of everything that scores depend on."""
        return fingerprint(self.params, self.tokenizer, self.network.config).hexdigest()[:16]

    def save(self, path: str | pathlib.Path) -> None:
        """Writes a folder that `load` and transformers open."""
        folder, config = pathlib.Path(path), self.network.config
        folder.mkdir(parents=True, exist_ok=True)
        family = _family(config.family)
        named = tensors.to_tensors(family, self.params, np.float32)
        safetensors.numpy.save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
        self.tokenizer.save_pretrained(folder)
        special = {
            f"{n}_token_id": getattr(self.tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")
        }
        hf = special | family.write(config) | {"dtype": "float32"}
        hub.write_json(folder / "config.json", hf)

    def scores(self, questions: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Returns the logit of each pair of question and text, float32 [N].

        If a pair has too many tokens for the model, the text is truncated. If the question fills more
        than half of the tokens, the longer of the two is truncated until both fit. Pairs of the same
        tokens have the same score; other batch sizes may change it in the last digits.

        Raises:
          ConfigError: more questions than texts, or fewer.
          CheckpointError: scores that are not finite.
        """
        if len(questions) != len(texts):
            raise ConfigError(
                f"scores needs a question for each text, got {len(questions)} questions and "
                f"{len(texts)} texts"
            )
        if not len(questions):
            return np.empty(0, np.float32)
        pairs = self._tokenize(questions, texts)
        # Each once: equal ones must not differ by the batch they are in.
        places = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        different = [*places]
        order = sorted(range(len(different)), key=lambda i: -len(different[i][0]))
        # None is waited for before all are on their way.
        running = [
            (rows, _forward(self.network, self.params, *batch))
            for rows, batch in _batches(different, order, self.network.config.max_length)
        ]
        found = np.empty(len(different), np.float32)
        for rows, scores in running:
            found[rows] = np.asarray(scores)[: len(rows)]
        if not np.isfinite(found).all():
            raise CheckpointError(
                f"{self.name} gives scores that are not finite: its weights are damaged, or its "
                "tokenizer has tokens or types that it has no vectors for"
            )
        return found[[places[pair] for pair in pairs]]

    def _tokenize(self, questions, texts) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Tokens and their types of each pair."""
        longest = self.network.config.max_length
        cut = [
            [plain(self.tokenizer, clipped(t, longest)) for t in side]
            for side in (questions, texts)
        ]
        # Cuts the longer of two, which is the text until it is as short as the question.
        rows = self.tokenizer(
            *cut, truncation="longest_first", max_length=longest, return_attention_mask=False
        )
        tokens = rows["input_ids"]
        types = rows.get("token_type_ids") or [[0] * len(row) for row in tokens]
        return [*zip(map(tuple, tokens), map(tuple, types), strict=True)]


@partial(jax.jit, static_argnums=0)
def _forward(network, params, tokens, types, lengths):
    return network(params, tokens, types, lengths, method="score")


def _batches(pairs, order: Sequence[int], longest: int) -> Iterator[tuple[list[int], tuple]]:
    """Yields batches (positions, (tokens [B, T], types [B, T], lengths [B])), the longest pairs first.

    T is a power of two or 1.5 times one; B is a power of two or the maximum batch, so that programs are
    compiled for few shapes. Rows beyond the positions are empty.
    """
    budget = _BATCH_TOKENS.get(jax.default_backend(), _BATCH_TOKENS_ACCELERATOR)
    done = 0
    while done < len(order):
        width = _width(len(pairs[order[done]][0]), longest)
        most = max(1, budget // width)
        places = list(order[done : done + most])
        done += len(places)
        shape = min(most, 1 << (len(places) - 1).bit_length()), width
        tokens, types = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        lengths = np.ones(shape[0], np.int32)
        for row, place in enumerate(places):
            lengths[row] = length = len(pairs[place][0])
            tokens[row, :length], types[row, :length] = pairs[place]
        yield places, (tokens, types, lengths)


def _width(length: int, longest: int) -> int:
    """Rounds up to 16, 24, 32, 48, 64, 96, ... tokens; at most `longest`."""
    width = _NARROWEST
    while width < length:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return min(width, longest)


def _tokenizer(folder: pathlib.Path, vocab_size: int):
    tokenizer = hub.read_tokenizer(folder, vocab_size)
    if tokenizer.model_max_length < tokenizer.num_special_tokens_to_add(pair=True) + 2:
        raise CheckpointError(
            f"tokenizer_config.json: model_max_length {tokenizer.model_max_length} leaves no room for "
            "a question and a passage"
        )
    return tokenizer


def _family_of(hf: dict) -> Family:
    """The family of a `config.json`.

    Raises:
      CheckpointError: another architecture, or several labels.
    """
    supported = {model_type: head.architecture for model_type, head in _HEADS.items()}
    model_type, architectures = hf.get("model_type"), hf.get("architectures")
    if model_type not in supported or architectures != [supported[model_type]]:
        raise CheckpointError(
            f"config.json: architectures {architectures} of model_type {model_type!r} are not a "
            f"cross-encoder; supported: {sorted(supported.values())} with one label, such as "
            "cross-encoder/ms-marco-MiniLM-L6-v2"
        )
    labels = len(hf["id2label"]) if "id2label" in hf else hf.get("num_labels", 2)
    if labels != 1:
        raise CheckpointError(
            f"config.json: {labels} labels; a cross-encoder has one, the score of a pair"
        )
    if hf.get("quantization_config"):
        raise CheckpointError(
            "config.json: quantization_config is not supported; load unquantized weights"
        )
    return _family(model_type)


def _family(model_type: str) -> Family:
    """The family of encoders with the head on top, its names as transformers writes them."""
    trunk, head = FAMILIES[model_type], _HEADS[model_type]
    names = {path: trunk.prefix + name for path, name in trunk.names.items()}
    for path, name in (("dense", head.dense), ("out", head.out)):
        names |= {f"{path}.kernel": f"{name}.weight", f"{path}.bias": f"{name}.bias"}
    own = {
        "architectures": [head.architecture],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    return dataclasses.replace(
        trunk,
        module=PairScorer,
        write=lambda config: trunk.write(config) | own,
        names=names,
        prefix="",
        ignored=_IGNORED,
    )
