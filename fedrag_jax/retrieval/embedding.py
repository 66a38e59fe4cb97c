"""Fast embedding of many texts, and of a corpus with a disk cache."""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from fedrag_jax.clock import Clock, Spent
from fedrag_jax.data.cache import cache_folder
from fedrag_jax.data.padding import clipped
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.models.fingerprint import fingerprint
from fedrag_jax.models.network import Network
from fedrag_jax.models.shapes import shapes_alone
from fedrag_jax.retrieval.vector_file import VectorFile

DTYPES = ("float32", "float16")
# Texts embedded between two writes: what a kill may cost. A core embeds some to some dozens a second.
SHARD = {"cpu": 1024}
SHARD_ACCELERATOR = 16_384
# Widths are multiples of this: finer means less padding and more compilations.
_STEP = 16
# Tokens per batch. On a CPU activations must stay in its cache: a 6-layer encoder of width 384 on
# two cores ran 14,000 tokens/s with 1,024 tokens per batch, 4,500 to 7,500 with 16,384.
_BATCH_TOKENS = {"cpu": 1024}
_BATCH_TOKENS_ACCELERATOR = 65536
_IN_FLIGHT = 4  # batches side by side: one alone keeps two cores half busy
_TOKENIZE_AT_ONCE = 4096  # texts


def embed_texts(
    encoder: Network,
    params,
    tokenizer,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_tokens: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
    bar: tqdm | None = None,
) -> np.ndarray:
    """Embeds texts; returns float32 [N, D] in the given order.

    Texts are sorted by length and run in batches of equal width. This keeps padding low, and the
    encoder compiles once per width (a multiple of 16 tokens), not once per batch.

    Args:
      encoder: `encoder(params, tokens [B, T], mask [B, T]) -> [B, D]`.
      tokenizer: a Hugging Face tokenizer; its special tokens count.
      max_length: longer texts are truncated to this many tokens.
      batch_tokens: tokens per batch, including padding; the default depends on the kind of device.
      devices: devices for the batches; default: all accelerators of this process, or a CPU.
      progress: shows texts per second and time left on stderr.
      bar: a progress bar to advance instead, if these texts are a part of a larger set.

    Returns:
      The vectors; zeros if `params` are only shapes of a model that was not loaded.

    Raises:
      DataError: no texts.
      ConfigError: max_length or batch_tokens below 1.
    """
    if not len(texts):
        raise DataError("no texts to embed: give at least one")
    if shapes_alone(params):
        return np.zeros((len(texts), encoder.config.size), np.float32)
    if batch_tokens is None:
        batch_tokens = _BATCH_TOKENS.get(jax.default_backend(), _BATCH_TOKENS_ACCELERATOR)
    if max_length < 1 or batch_tokens < 1:
        raise ConfigError(
            f"max_length and batch_tokens must be at least 1, got {max_length} and {batch_tokens}"
        )
    tokens, starts = _tokenize(tokenizer, texts, max_length)
    parts: list[np.ndarray] = []
    in_flight: deque[Future] = deque()
    order = np.argsort(-np.diff(starts), kind="stable")
    whole = bar is None
    bar = _bar(len(texts), progress) if bar is None else bar

    if devices is None:
        devices = jax.local_devices() if jax.default_backend() != "cpu" else ()
    held = [jax.device_put(params, device) for device in devices] or [params]

    def embed(number, count, batch, mask):
        own = held[number % len(held)]
        return np.asarray(_forward(encoder, own, batch, mask), np.float32)[:count]

    def read_oldest():
        parts.append(in_flight.popleft().result())
        bar.update(len(parts[-1]))

    most = _IN_FLIGHT * len(held)
    with bar if whole else nullcontext(), ThreadPoolExecutor(most) as pool:
        batches = _batches(tokens, starts, order, max_length, batch_tokens)
        for number, batch in enumerate(batches):
            in_flight.append(pool.submit(embed, number, *batch))
            if len(in_flight) > most:
                read_oldest()
        while in_flight:
            read_oldest()
    vectors = np.empty((len(texts), parts[0].shape[1]), np.float32)
    vectors[order] = np.concatenate(parts)
    return vectors


def embed_corpus(
    encoder: Network,
    params,
    tokenizer,
    texts: Sequence[str],
    *,
    max_length: int,
    dtype: str = "float32",
    cache_dir: str | os.PathLike | None = None,
    keep: bool = True,
    progress: bool = False,
    spent: Spent | None = None,
) -> np.ndarray:
    """Embeds texts as `embed_texts`, with a disk cache; returns float32 or float16 [N, D].

    Vectors are stored in a memory-mapped `VectorFile`, in a folder named by the sha256 of encoder,
    parameters, tokenizer, texts, max_length and dtype. Shards are written as they are embedded; after
    a kill, only missing shards are embedded. If several processes (`jax.distributed`) share the
    folder, each embeds every n-th shard.

    Args:
      texts: the texts; texts with a `fingerprint` are not read if their vectors are cached.
      dtype: type of the stored vectors.
      cache_dir: as in `cache_folder`.
      keep: False for parameters in training: nothing is read from or written to disk.
      spent: receives the seconds; for cached vectors, their original seconds.

    Raises:
      DataError: no texts.
      ConfigError: the folder cannot be created; an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"vectors are kept as one of {DTYPES}, got {dtype!r}")
    if not len(texts):
        raise DataError("no texts to embed: give at least one")
    spent = Spent() if spent is None else spent

    def embed(some: slice, **how) -> np.ndarray:
        part, clock = texts[some], Clock()
        how["max_length"] = max_length
        vectors = embed_texts(encoder, params, tokenizer, part, **how).astype(dtype, copy=False)
        spent.embedding += clock.lap().others
        return vectors

    if keep and not shapes_alone(params):
        shard = SHARD.get(jax.default_backend(), SHARD_ACCELERATOR)
        settings = (max_length, shard) if dtype == "float32" else (max_length, shard, dtype)
        name = _key(encoder, params, tokenizer, texts, *settings)
        file = VectorFile(cache_folder(cache_dir) / name, len(texts), shard)
        try:
            return _kept(file, embed, spent, progress)
        except (OSError, ConfigError) as error:  # of the vectors, of what is noted about them
            warnings.warn(
                f"vectors are not cached: {file.folder} cannot be written ({error})",
                stacklevel=3,
            )
    return embed(slice(None), progress=progress)


def _kept(
    file: VectorFile, embed: Callable[..., np.ndarray], spent: Spent, progress: bool
) -> np.ndarray:
    """Returns the vectors of the file after all shards have been written."""
    missing, before = file.missing(), spent.embedding
    if jax.process_count() > 1:  # or the first would write while others look what is missing
        multihost_utils.sync_global_devices(f"{file.folder.name} is known")
    mine = missing[jax.process_index() :: jax.process_count()]
    parts = {number: file.rows_of(number) for number in mine}
    total = sum(part.stop - part.start for part in parts.values())
    with _bar(total, progress and bool(mine)) as bar:
        for number, part in parts.items():
            started = spent.embedding
            vectors = embed(part, bar=bar)
            file.write(number, vectors, spent.embedding - started)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(file.folder.name)
        for number in file.missing():  # where the folder is not shared
            file.write(number, embed(file.rows_of(number)), 0.0)
    spent.embedding = before + file.seconds()
    return file.read()


def _bar(texts: int, shown: bool) -> tqdm:
    return tqdm(total=texts, unit=" texts", desc="embed", disable=not shown, mininterval=1)


@partial(jax.jit, static_argnums=0)
def _forward(encoder, params, tokens, mask):
    return encoder(params, tokens, mask)


def traced(encoder: Network, params, width: int, place: Callable) -> jax.stages.Traced:
    """Returns the traced program that embeds a batch of texts of a width on an accelerator, from
    shapes.

    Args:
      place: `place(tree)`: adds the placement to shapes.
    """
    shape = max(1, _BATCH_TOKENS_ACCELERATOR // width), width
    batch = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, bool))
    return _forward.trace(encoder, *place((params, *batch)))


def _tokenize(tokenizer, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns all tokens in one int32 array, and the start of each text in it, [N + 1]."""
    flat, lengths = [], []
    for start in range(0, len(texts), _TOKENIZE_AT_ONCE):
        ids = tokenizer(
            [clipped(text, max_length) for text in texts[start : start + _TOKENIZE_AT_ONCE]],
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )["input_ids"]
        lengths += map(len, ids)
        flat.append(np.fromiter((token for text in ids for token in text), np.int32))
    return np.concatenate(flat), np.concatenate([[0], np.cumsum(lengths)])


def _batches(
    tokens: np.ndarray, starts: np.ndarray, order: np.ndarray, max_length: int, batch_tokens: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields batches (count, tokens [B, T], mask bool [B, T]), the longest texts first.

    Only the first `count` rows are texts; the other rows repeat the last text.
    """
    most = 1 << (len(order) - 1).bit_length()  # a handful of queries need no full batch
    done = 0
    while done < len(order):
        longest = starts[order[done] + 1] - starts[order[done]]
        width = max(1, min(-(-longest // _STEP) * _STEP, max_length))
        rows = min(max(1, batch_tokens // width), most)
        chosen = order[done : done + rows]
        done += len(chosen)
        batch, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
        for i in range(rows):
            text = chosen[min(i, len(chosen) - 1)]
            length = starts[text + 1] - starts[text]
            batch[i, :length] = tokens[starts[text] : starts[text + 1]]
            mask[i, :length] = True
        yield len(chosen), batch, mask


def _key(encoder: Network, params, tokenizer, texts: Sequence[str], *settings) -> str:
    digest = fingerprint(params, tokenizer, encoder.config, *settings)
    if known := getattr(texts, "fingerprint", None):
        digest.update(known.encode())
        return digest.hexdigest()
    for text in texts:
        # The length in front keeps ["ab", "c"] apart from ["a", "bc"].
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
