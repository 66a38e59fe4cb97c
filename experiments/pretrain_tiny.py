"""Makes the two built-in checkpoints: a decoder that can read, a bi-encoder that can search.

    python -m experiments.pretrain_tiny            # writes fedrag_jax/models/builtin/

Neither knows the test world: both are trained on pretraining worlds, whose names are drawn from the
other half of all there can be. What makes the decoder read within minutes: it starts as a machine that
recalls (see `recalling`); it is asked about single sentences before it is asked about passages, two of
them at first and more when nine of ten questions are answered or enough steps have passed; each context
is asked several questions, whose words, the names above all, are to be predicted too; a few rows of
each batch recall a sentence from its beginning or copy random sequences; AdamW with b2 = 0.98.

In its last quarter the decoder is also taught to rate a text, to ask about it, and to cite. The encoder
is small and hears random pieces before a question, so that an unknown word costs it some ranks and not
all. What makes a test world harder than these: a topic's own jargon and chatter and, for the retriever,
more names sharing a word.
"""

import collections
import functools
import itertools
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

from experiments.pretraining import WORLDS, decoder_loss, trainer
from experiments.pretraining_rows import QUESTIONS, VOCABULARY, Reader, pack
from fedrag_jax.data import prompts, synthetic
from fedrag_jax.data.examples import embedding_text
from fedrag_jax.data.padding import encoder_table
from fedrag_jax.models import fetching, hub
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.encoder import Encoder, EncoderConfig
from fedrag_jax.models.network import Network
from fedrag_jax.models.rotary import rope_frequencies

_OUT = flags.DEFINE_string("out", str(fetching.BUILTIN), "folder of the two checkpoints")
_PARTS = flags.DEFINE_list("parts", ["decoder", "encoder"], "checkpoints to make")
_DECODER_STEPS = flags.DEFINE_integer("decoder_steps", 5000, "number of batches of 12 to 24 rows")
_ENCODER_STEPS = flags.DEFINE_integer("encoder_steps", 200, "number of batches of 128 pairs")

DECODER = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    tie_embeddings=True,
)
ENCODER = EncoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    max_positions=256,
    pooling="mean",
    normalize=True,
    max_length=96,
)
SPECIAL = ["<pad>", "<s>", "</s>", "[CLS]", "[SEP]"]  # the first pieces of the vocabulary
# Stages of the decoder's curriculum: what it reads, how many of them in a context, rows in a batch,
# largest number of steps.
LEVELS = [
    ("sentences", 2, 24, 300),
    ("sentences", 3, 24, 300),
    ("sentences", 4, 20, 300),
    ("passages", 2, 20, 800),
    ("passages", 3, 16, 600),
    ("passages", 5, 12, None),
]
EARLIER = 0.25  # of the batches come from a level already left behind
NOISE = 3  # most random pieces before a question
SPELLINGS = (r"\u0120?[A-Z][a-z]+", r"\u0120[a-z]+", r"[a-z]+", r"\u0120?\d+")  # \u0120: a space

# --- tokenizer ----------------------------------------------------------------------------------


def train_tokenizer(worlds):
    """Byte-level BPE over everything that is said in the pretraining worlds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    cite = prompts.COMPACT_CITED
    formats = [
        part
        for style in (prompts.COMPACT, prompts.RATE, prompts.ASK, cite)
        for part in (style.opening, style.passage, style.question)
    ]
    formats += [style.answer for style in (prompts.COMPACT, prompts.RATE, prompts.ASK)]
    formats += [cite.answer.format(answer="{number}") + cite.final + "{answer}"]
    texts = [embedding_text(p) + "\n" for w in worlds for p in w.passages]
    texts += [" ".join([e.question, e.answers[0]]) for w in worlds for e in w.train]
    texts += [text for text in formats for _ in range(2000)]
    texts += [f" {year}" for year in range(1500, 1900) for _ in range(20)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def decoder_tokenizer(tokenizer):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def encoder_tokenizer(tokenizer):
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", cls_token="[CLS]", sep_token="[SEP]"
    )


# --- training -------------------------------------------------------------------------------------


def train_decoder(worlds, tokenizer, steps, rng):
    network = Network.of(Decoder, DECODER)
    params = network.init(jax.random.key(0))
    params = recalling(params, DECODER, tokenizer, np.random.default_rng(2))
    init, step = trainer(functools.partial(decoder_loss, network), 3e-3, steps, b2=0.98)
    state = init(params)
    readers = [Reader(world, tokenizer, rng) for world in worlds]
    level, since, recent, began = 0, 0, collections.deque(maxlen=10), time.perf_counter()
    for i in range(steps):
        last = level == len(LEVELS) - 1
        able = len(recent) == recent.maxlen and np.mean(recent) > 0.9 ** min(
            QUESTIONS, LEVELS[level][1]
        )
        if not last and (able or i - since >= LEVELS[level][3]):
            level, since = level + 1, i
            recent.clear()
            print(f"decoder step {i:5d}  now {LEVELS[level][1]} {LEVELS[level][0]}", flush=True)
        at = int(rng.integers(level + 1)) if rng.random() < EARLIER else level
        kind, n, count, _ = LEVELS[at]
        if last and i > steps * 3 // 4 and rng.random() < 0.25:
            kind, at = str(rng.choice(["cite", "ask and rate"], p=[0.6, 0.4])), None
        others, rows = _rows(readers, kind, n, count, rng)
        batch = pack(others + rows, tokenizer.pad_token_id)
        params, state, value, right = step(params, state, batch)
        if at == level:
            recent.append(float(right[len(others) :].mean()))
        if i % 50 == 0 or i == steps - 1:
            print(
                f"decoder step {i:5d}  {n} {kind}  loss {float(value):.3f}  rows read right "
                f"{100 * np.mean(recent or [0]):.0f}%  {time.perf_counter() - began:.0f}s",
                flush=True,
            )
    return hub.Pretrained(network, params, tokenizer, "builtin:decoder")


def recalling(params, config, tokenizer, rng):
    """A start from which copying is learned within a hundred steps, not a thousand.

    The heads of the first layer look one to four tokens back and leave a sketch of what they saw. Heads
    of the second look for a place that follows the last two tokens, or the two before them, or that
    was preceded by such; later ones look for the present token itself; and all pass on what they see:
    the induction heads of Olsson et al. 2022 (2209.11895), in a start that mimics trained attention
    (Trockman and Kolter 2023, 2305.09828). Looking back by a fixed distance needs a constant: the first
    dimension of all embeddings. Pieces spelled alike (capitalised, digits, ...) share a vector, so that
    names can be told from other words. The last norm is small, and so are the first logits.
    """
    d, e = config.hidden_size, config.head_dim
    half, constant = e // 2, 4.0
    margin = 6.0  # of the score of the token looked back at over its neighbours'
    params = jax.tree.map(np.array, params)

    def orthonormal(columns):
        """[D, columns], nothing in the constant's row."""
        basis = np.linalg.qr(rng.standard_normal((d - 1, columns)))[0]
        return np.concatenate([np.zeros((1, columns)), basis])

    embedding = rng.standard_normal((config.vocab_size, d))
    embedding[:, 0] = constant
    spellings = 6.0 * orthonormal(len(SPELLINGS) + 1).T
    for piece, i in tokenizer.get_vocab().items():
        fits = (n for n, pattern in enumerate(SPELLINGS) if re.fullmatch(pattern, piece))
        embedding[i] += spellings[next(fits, -1)]
    params["embed"]["embedding"] = embedding.astype(np.float32)
    params["norm"]["scale"] *= 0.2
    q, k, v, o = (
        params["layers"]["attention"][f"{name}_proj"]["kernel"] for name in ("q", "k", "v", "o")
    )

    turns = rope_frequencies(config)
    fast, slow = np.arange(half // 2), np.arange(half * 3 // 8, half)
    slow = np.concatenate([slow, slow + half])  # these turn too little to disturb a match of tokens
    neighbour = (1 - np.cos(turns[fast])).sum()
    normalised = constant / np.sqrt((d - 1 + constant**2) / d)
    size = np.sqrt(margin * np.sqrt(e) / neighbour) / normalised
    sketches = [orthonormal(e)]  # of the present token, and of those 1, 2, ... before it
    for head in range(config.num_heads):
        columns, back = slice(head * e, (head + 1) * e), head + 1
        q[0][:, columns] = k[0][:, columns] = 0
        q[0][0, head * e + fast] = size
        k[0][0, head * e + fast] = size * np.cos(back * turns[fast])
        k[0][0, head * e + half + fast] = size * np.sin(back * turns[fast])
        sketches.append(orthonormal(e))
        v[0][:, columns], o[0][columns] = sketches[0], 1.2 * sketches[-1].T

    def look(layer, head, pairs):
        """Aims a head at places whose sketch `past` is like the sketch `present` here."""
        columns, share = slice(head * e, (head + 1) * e), len(slow) // len(pairs)
        q[layer][:, columns] = k[layer][:, columns] = 0
        for n, (present, past) in enumerate(pairs):
            at = head * e + slow[n * share : (n + 1) * share]
            q[layer][:, at] = 2.5 * present[:, :share]
            k[layer][:, at] = 2.5 * past[:, :share]

    for layer in range(1, config.num_layers):
        seen = np.linalg.qr(rng.standard_normal((d, d)))[0]
        v[layer], o[layer] = seen, seen.T
    after = list(itertools.pairwise(sketches))  # here and there: what follows the like of this
    look(1, 0, [after[0], after[1]])
    look(1, 1, [after[2], after[3]])
    look(1, 2, [after[0], after[3]])
    for layer in range(2, config.num_layers):
        look(layer, 0, [after[0]])
        look(layer, 1, [after[1]])
        for head in range(2, config.num_heads):
            same = orthonormal(e)
            look(layer, head, [(same, same)])
    return jax.tree.map(jnp.asarray, params)


def _rows(readers, kind, n, count, rng):
    """A batch of one kind as (rows that copy, recall or read sentences, rows of the kind itself)."""
    some = [readers[rng.integers(len(readers))] for _ in range(count)]
    if kind == "cite":
        return [], [reader.cite(int(rng.choice([2, 3, 5]))) for reader in some]
    if kind == "ask and rate":
        return [], [r.ask() if i % 2 else r.rate() for i, r in enumerate(some)]
    if kind == "sentences":
        return [r.copy(64) for r in some[:2]], [r.sentences(n) for r in some[2:]]
    others = [some[0].copy(64)]
    others += [reader.cloze(n) for reader in some[1:4]]
    others += [reader.sentences(n + 1) for reader in some[4:7]]
    return others, [reader.read(n) for reader in some[7:]]


def train_encoder(worlds, tokenizer, steps, rng):
    network = Network.of(Encoder, ENCODER)
    params = network.init(jax.random.key(2))
    pairs = []
    for world in worlds:
        texts = {p.id: embedding_text(p) for p in world.passages}
        pairs += [(e.question, texts[e.positive_ids[0]]) for e in world.train]

    def loss(params, batch):
        q = network(params, batch["q"]["tokens"], batch["q"]["mask"])
        d = network(params, batch["d"]["tokens"], batch["d"]["mask"])
        scores, target = 20.0 * q @ d.T, jnp.arange(len(q))
        both = (scores, scores.T)
        nll = sum(optax.softmax_cross_entropy_with_integer_labels(s, target).mean() for s in both)
        return nll / 2, (scores.argmax(1) == target).mean()

    init, step = trainer(loss, 1e-3, steps, b2=0.98)
    state, began = init(params), time.perf_counter()
    q_all = encoder_table(tokenizer, [q for q, _ in pairs], ENCODER.max_length)
    d_all = encoder_table(tokenizer, [d for _, d in pairs], ENCODER.max_length)
    for i in range(steps):
        chosen = rng.choice(len(pairs), size=128, replace=False)
        batch = {"q": _interrupted({k: v[chosen] for k, v in q_all.items()}, rng),
                 "d": {k: v[chosen] for k, v in d_all.items()}}  # fmt: skip
        params, state, value, right = step(params, state, batch)
        if i % 50 == 0 or i == steps - 1:
            print(
                f"encoder step {i:5d}  loss {float(value):.3f}  first {100 * float(right):.0f}%  "
                f"{time.perf_counter() - began:.0f}s",
                flush=True,
            )
    return hub.Pretrained(network, params, tokenizer, "builtin:encoder")


def _interrupted(questions, rng):
    """Questions after up to NOISE random pieces, so that a word never heard does not drown the rest."""
    rows, width = questions["tokens"].shape
    count = rng.integers(NOISE + 1, size=(rows, 1))
    place = np.arange(width + NOISE)[None] - count  # of what now stands where, in the question
    source = np.clip(place, 0, width - 1)
    tokens = np.take_along_axis(questions["tokens"], source, axis=1)
    tokens = np.where(place > 0, tokens, rng.integers(len(SPECIAL), VOCABULARY, size=tokens.shape))
    tokens[:, 0] = questions["tokens"][:, 0]
    mask = np.take_along_axis(questions["mask"], source, axis=1) & (place < width)
    return {"tokens": tokens, "mask": mask}


def main(_):
    began = time.perf_counter()
    worlds = [synthetic.generate(config) for config in WORLDS]
    crowded = [synthetic.generate(config._replace(crowding=4.0)) for config in WORLDS]
    tokenizer = train_tokenizer(worlds)
    makers = {
        "decoder": lambda: train_decoder(
            crowded, decoder_tokenizer(tokenizer), _DECODER_STEPS.value, np.random.default_rng(0)
        ),
        "encoder": lambda: train_encoder(
            worlds, encoder_tokenizer(tokenizer), _ENCODER_STEPS.value, np.random.default_rng(1)
        ),
    }
    for part in _PARTS.value:
        hub.save(makers[part](), pathlib.Path(_OUT.value) / part, dtype="float16")
    print(f"done in {(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # libraries tell a lot about themselves
    app.run(main)
