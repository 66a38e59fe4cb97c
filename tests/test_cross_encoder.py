"""Cross-encoders against transformers and NumPy, in batches and threads, saved and loaded."""

import dataclasses
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import safetensors.numpy
from cross_encoders import WORDS, cross_encoder, edited, pair_tokenizer, some_words, write

from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.models import cross_encoder as module
from fedrag_jax.models.cross_encoder import CrossEncoder

pytestmark = pytest.mark.usefixtures("strict_types")

FAMILIES = ("bert", "roberta", "xlm-roberta")
PAIRS = [
    ("w1 w2", "w2 w5 w1"),
    ("w3", some_words(100)),  # is cut
    (some_words(25, 1), some_words(25, 2)),  # both are
    (some_words(100, 3), "w7 w8"),  # the question alone
    ("unheard of", ""),
    *((some_words(3, i), some_words(i, 100 + i)) for i in range(1, 28)),
]
QUESTIONS, TEXTS = ([pair[side] for pair in PAIRS] for side in (0, 1))


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    model = cross_encoder(pair_tokenizer(WORDS, request.param), request.param, layers=2)
    return model, write(model, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def random():
    return cross_encoder(pair_tokenizer(WORDS))


# --- scores ---------------------------------------------------------------------------------------


def test_scores_agree_with_transformers(saved):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    import transformers

    ours, folder = saved
    theirs, told = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told[problem] for problem in ("missing_keys", "unexpected_keys"))
    assert theirs.config.num_labels == 1
    batch = transformers.AutoTokenizer.from_pretrained(folder)(
        QUESTIONS, TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    assert ("token_type_ids" in batch) == (ours.network.config.family == "bert")
    with torch.no_grad():
        expected = theirs.eval()(**batch).logits[:, 0].numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(ours.scores(QUESTIONS, TEXTS), expected, atol=1e-4, rtol=0)


def slowly(folder, tokens, types):
    """The logit of one pair, head by head and token by token, by the names of transformers."""
    x, hf = (
        safetensors.numpy.load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    bert = hf["model_type"] == "bert"
    x = {name.removeprefix("bert." if bert else "roberta."): value for name, value in x.items()}
    erf = np.vectorize(math.erf)

    def linear(name, h):
        return h @ x[f"{name}.weight"].T + x[f"{name}.bias"]

    def norm(name, h):
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(
            h.var(-1, keepdims=True) + hf["layer_norm_eps"]
        )
        return h * x[f"{name}.weight"] + x[f"{name}.bias"]

    first = 0 if bert else hf["pad_token_id"] + 1
    h = norm("embeddings.LayerNorm", np.stack([
        x["embeddings.word_embeddings.weight"][token]
        + x["embeddings.position_embeddings.weight"][first + place]
        + x["embeddings.token_type_embeddings.weight"][kind]
        for place, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]))  # fmt: skip
    for i in range(hf["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = (linear(f"{layer}.attention.self.{n}", h) for n in ("query", "key", "value"))
        size, mixed = hf["hidden_size"] // hf["num_attention_heads"], []
        for start in range(0, hf["hidden_size"], size):
            part = slice(start, start + size)
            weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            mixed.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
        out = linear(f"{layer}.attention.output.dense", np.concatenate(mixed, 1))
        h = norm(f"{layer}.attention.output.LayerNorm", h + out)
        wide = linear(f"{layer}.intermediate.dense", h)
        out = linear(f"{layer}.output.dense", wide * 0.5 * (1 + erf(wide / math.sqrt(2))))
        h = norm(f"{layer}.output.LayerNorm", h + out)
    dense, out = (
        ("pooler.dense", "classifier") if bert else ("classifier.dense", "classifier.out_proj")
    )
    return linear(out, np.tanh(linear(dense, h[0])))[0]


def test_scores_are_the_formula(saved):
    model, folder = saved
    expected = [slowly(folder, *pair) for pair in model._tokenize(QUESTIONS, TEXTS)]
    np.testing.assert_allclose(model.scores(QUESTIONS, TEXTS), expected, atol=1e-4, rtol=0)
    assert np.std(expected) > 0.5


def test_a_score_does_not_depend_on_its_batch(random, monkeypatch):
    together = random.scores(QUESTIONS, TEXTS)
    assert together.dtype == np.float32 and together.shape == (len(PAIRS),)
    alone = [random.scores([q], [t])[0] for q, t in PAIRS]
    np.testing.assert_allclose(together, alone, atol=3e-5)
    monkeypatch.setattr(module, "_BATCH_TOKENS", {"cpu": 70})  # batches of two or three, and of one
    np.testing.assert_allclose(random.scores(QUESTIONS, TEXTS), together, atol=3e-5)
    turned = random.scores(QUESTIONS[::-1], TEXTS[::-1])
    np.testing.assert_allclose(turned[::-1], together, atol=3e-5)
    assert random.scores([], []).shape == (0,)


def test_equal_pairs_have_equal_scores(random):
    scores = random.scores([*QUESTIONS, *QUESTIONS[::-1]], [*TEXTS, *TEXTS[::-1]])
    assert (scores[: len(PAIRS)] == scores[len(PAIRS) :][::-1]).all()


def test_the_text_is_cut_and_the_question_only_where_it_takes_more_than_half(random):
    rows = [[*map(sum, zip(*([t == 0, t == 1] for t in types), strict=True))]
            for _, types in random._tokenize(QUESTIONS[:4], TEXTS[:4])]  # fmt: skip
    # With [CLS] w3 [SEP] 3 tokens are of the question, and with its [SEP] the rest of the text.
    assert rows == [[4, 4], [3, 29], [16, 16], [29, 3]]
    assert len(random._tokenize([""], ["w1 " * 1_000_000])[0][0]) == 32


def test_few_programs_are_compiled(random):
    before = module._forward._cache_size()
    for count in range(1, 28):
        random.scores(["w1"] * count, [some_words(i, i) for i in range(count)])
    assert (
        module._forward._cache_size() - before <= 3 * 6
    )  # widths 16, 24 and 32; 1, 2, 4, ... rows


def test_what_is_written_like_a_special_token_is_words(random):
    (tokens, types), (plainly, _) = random._tokenize(
        ["w1 [SEP] w2"] * 2, ["w3 [CLS] [SEP] w4", "w3 w4"]
    )
    assert tokens.count(3) == plainly.count(3) == 2 and tokens.count(2) == 1
    assert types.index(1) == tokens.index(3) + 1


def test_threads_may_score_at_once(saved):
    model = CrossEncoder.load(saved[1])
    expected = model.scores(QUESTIONS, TEXTS)
    start = threading.Barrier(6)

    def score():
        start.wait(timeout=60)
        return [model.scores(QUESTIONS, TEXTS) for _ in range(5)]

    with ThreadPoolExecutor(6) as pool:
        done = [pool.submit(score) for _ in range(6)]
        for each in done:
            np.testing.assert_array_equal(each.result(), [expected] * 5)


def test_what_cannot_be_scored_is_refused(random):
    with pytest.raises(ConfigError, match="got 2 questions and 1 texts"):
        random.scores(["a", "b"], ["c"])
    params = jax.tree.map(lambda x: x.copy(), random.params)
    params["layers"]["mlp"]["up_proj"]["bias"][0, 0] = np.nan
    for broken in (
        dataclasses.replace(random, params=params),
        dataclasses.replace(random, tokenizer=pair_tokenizer([*WORDS, "beyond"])),
    ):
        with pytest.raises(CheckpointError, match="random gives scores that are not finite"):
            broken.scores(["w1 beyond"], ["w2"])


# --- folders --------------------------------------------------------------------------------------


def test_saved_and_loaded_again_is_the_same(saved, tmp_path):
    model, folder = saved
    again = CrossEncoder.load(folder)
    assert again.network == model.network and again.name == str(folder)
    assert (again.scores(QUESTIONS, TEXTS) == model.scores(QUESTIONS, TEXTS)).all()
    write(again, tmp_path / "copy")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, "config.json: 2 labels; a cross-encoder has one"),
        ({"id2label": None}, "config.json: 2 labels"),  # what config.json leaves out is 2
        ({"id2label": 7}, "config.json: .* is missing or malformed"),
        (
            {"architectures": ["BertModel"]},
            r"architectures \['BertModel'\].*are not a cross-encoder",
        ),
        ({"architectures": None}, r"architectures None of model_type 'bert'.*supported: \['Bert"),
        ({"model_type": "deberta-v2"}, "of model_type 'deberta-v2' are not a cross-encoder"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"hidden_size": None}, "'hidden_size' is missing or malformed"),
        ({"num_hidden_layers": 2}, r"missing bert.encoder.layer.1.output.LayerNorm.bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
    ],
)
def test_a_folder_that_is_no_cross_encoder_is_refused(random, tmp_path, change, words):
    edited(write(random, tmp_path), **change)
    with pytest.raises(CheckpointError, match=words) as told:
        CrossEncoder.load(tmp_path)
    assert str(tmp_path) in str(told.value)


def test_weights_that_are_pickled_alone_are_not_opened(random, tmp_path):
    write(random, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model.safetensors, and pickled weights"):
        CrossEncoder.load(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a GGUF file"):
        CrossEncoder.load(tmp_path / "absent")


def test_a_head_of_several_labels_is_refused_whatever_the_config_says(random, tmp_path):
    path = write(random, tmp_path) / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["classifier.weight"] = np.zeros((3, 32), np.float32)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"classifier.weight has shape \(3, 32\).*\(1, 32\)"):
        CrossEncoder.load(tmp_path)


def test_a_tokenizer_without_room_for_a_pair_is_refused(random, tmp_path):
    edited(write(random, tmp_path), "tokenizer_config.json", model_max_length=4)
    with pytest.raises(CheckpointError, match="model_max_length 4 leaves no room for"):
        CrossEncoder.load(tmp_path)
    edited(tmp_path, "tokenizer_config.json", model_max_length=10**30)
    assert CrossEncoder.load(tmp_path).network.config.max_length == 40
