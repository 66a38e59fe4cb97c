"""Cross-encoders small enough to run in no time: random ones, and one that counts shared words."""

import json
import pathlib

import jax
import numpy as np
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fedrag_jax.models.cross_encoder import CrossEncoder, PairScorer
from fedrag_jax.models.families import FAMILIES
from fedrag_jax.models.network import Network

WORDS = [f"w{i}" for i in range(60)]


def some_words(count, seed=0):
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def pair_tokenizer(words, family="bert", longest=32):
    """Words to tokens, two texts as the family puts them together."""
    bert = family == "bert"
    if bert:
        order = pad, unknown, first, last = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
    else:
        order = first, pad, last, unknown = "<s>", "<pad>", "</s>", "<unk>"
    places = {word: i for i, word in enumerate([*order, *words])}
    backend = Tokenizer(models.WordLevel(places, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1"
        if bert
        else f"{first} $A {last} {last} $B:0 {last}",
        special_tokens=[(first, places[first]), (last, places[last])],
    )
    names = ["input_ids", *["token_type_ids"] * bert, "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        unk_token=unknown,
        cls_token=first,
        sep_token=last,
        model_max_length=longest,
        model_input_names=names,
    )


def cross_encoder(tokenizer, family="bert", layers=1, heads=4, **options) -> CrossEncoder:
    """Of a config of transformers, with random weights, biases and norms of visible size."""
    kind = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}[family]
    hf = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        type_vocab_size=2 if family == "bert" else 1,
        pad_token_id=tokenizer.pad_token_id,
        **{"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 40} | options,
    )
    config = FAMILIES[family].read(hf.to_dict(), max_length=tokenizer.model_max_length)
    network = Network.of(PairScorer, config)
    rng = np.random.default_rng(0)

    def shaken(path, shape):
        noise = rng.normal(size=shape.shape).astype(np.float32)
        name = path[-1].key
        return 0.5 * noise if name in ("kernel", "embedding") else 0.3 * noise + (name == "scale")

    params = jax.tree_util.tree_map_with_path(shaken, network.shapes())
    return CrossEncoder(network, params, tokenizer, "random")


def counting(words, longest=32) -> CrossEncoder:
    """Its score grows with the share of a text's words that are among `words` and in the question.

    Layer 1 lets each word look at itself where it stands in the question, layer 2 lets the first token
    look at the text, and both write down what they see.
    """
    words = [*words]
    tokenizer = pair_tokenizer(words, longest=longest)
    count = len(words)
    other, question, text, match = range(count, count + 4)  # what else a vector tells of its token
    model = cross_encoder(tokenizer, layers=2, heads=1, hidden_size=count + 4, intermediate_size=4)
    d = count + 4
    params = jax.tree.map(lambda x: np.zeros_like(x), model.params)
    params["embed"]["embedding"][:4, other] = 1
    params["embed"]["embedding"][4:, :count] = np.eye(count)
    params["type_embed"]["embedding"][[0, 1], [question, text]] = 1
    hot = (d / 2 - 1) ** -0.5  # of a normalised vector with two ones
    params["embed_norm"]["scale"][:] = hot
    layers = params["layers"]
    for norm in ("attention_norm", "mlp_norm"):
        layers[norm]["scale"][:] = hot
    attention = {name: part["kernel"] for name, part in layers["attention"].items()}
    bias = layers["attention"]["q_proj"]["bias"]
    # Scores are 40 for the same word, and 10 for what is in the question (an unknown word: -10).
    attention["q_proj"][0, :count, :count] = 40 * d**0.5 * np.eye(count)
    attention["k_proj"][0, :count, :count] = np.eye(count)
    bias[0, match], attention["q_proj"][0, other, match] = 10 * d**0.5, -20 * d**0.5
    attention["k_proj"][0, [question, text], match] = 1, -1
    attention["v_proj"][0, question, match] = attention["o_proj"][0, match, match] = 1
    # 20 for what is in the text.
    bias[1, match], attention["k_proj"][1, text, match] = 20 * d**0.5, 1
    attention["v_proj"][1, match, match], attention["o_proj"][1, match, match] = 1, 4
    params["dense"]["kernel"][match, 0], params["out"]["kernel"][0, 0] = 0.5, 10
    return CrossEncoder(model.network, params, tokenizer, "counting")


def write(model: CrossEncoder, folder: pathlib.Path) -> pathlib.Path:
    """The folder, with the model in it."""
    model.save(folder)
    return folder


def edited(folder, path="config.json", **changes):
    """Changes a JSON file of a folder; what is changed to None goes."""
    content = json.loads((folder / path).read_text()) | changes
    (folder / path).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
