"""Cross-encoders against transformers and NumPy, and the store whose passages one puts in order."""

import dataclasses
import json
import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import safetensors.numpy
from cross_encoders import WORDS, counting, cross_encoder, pair_tokenizer, write

from fedrag_jax.data.examples import Passage, embedding_text
from fedrag_jax.errors import CheckpointError, ConfigError, DataError
from fedrag_jax.models import cross_encoder as module
from fedrag_jax.models.cross_encoder import CrossEncoder
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.hybrid import HybridStore
from fedrag_jax.retrieval.stores.qdrant import QdrantStore
from fedrag_jax.retrieval.stores.registry import open_store
from fedrag_jax.retrieval.stores.reranked import RerankedStore

FAMILIES = ("bert", "roberta", "xlm-roberta")
D = 16


def some_words(count, seed=0):
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


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
    np.testing.assert_allclose(together, alone, atol=1e-5)
    monkeypatch.setattr(module, "_BATCH_TOKENS", {"cpu": 70})  # batches of two or three, and of one
    np.testing.assert_allclose(random.scores(QUESTIONS, TEXTS), together, atol=1e-5)
    turned = random.scores(QUESTIONS[::-1], TEXTS[::-1])
    np.testing.assert_allclose(turned[::-1], together, atol=1e-5)
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


def edited(folder, path="config.json", **changes):
    content = json.loads((folder / path).read_text()) | changes
    (folder / path).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, "config.json: 2 labels; a cross-encoder has one"),
        ({"id2label": None}, "config.json: 2 labels"),  # what config.json leaves out is 2
        ({"id2label": 7}, "config.json: .* is missing or malformed"),
        ({"architectures": ["BertModel"]}, r"architectures \['BertModel'\].*are no cross-encoder"),
        ({"architectures": None}, r"architectures None of model_type 'bert'.*supported: \['Bert"),
        ({"model_type": "deberta-v2"}, "of model_type 'deberta-v2' are no cross-encoder"),
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


# --- the store ------------------------------------------------------------------------------------


def unit(count, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


PASSAGES = [Passage(f"p{i:02}", f"w{i}", some_words(5, 1000 + i)) for i in range(60)]
VECTORS = unit(60)
ASKED, NEAR = [some_words(4, i) for i in range(6)], unit(6, 9)


@pytest.fixture
def plain():
    store = FaissStore(D)
    store.add(PASSAGES, VECTORS)
    return store


def ids(found):
    return [[f.passage.id for f in some] for some in found]


def test_the_order_is_the_cross_encoders(plain, random):
    store = RerankedStore(plain, random, depth=20)
    found = store.search(ASKED, NEAR, k=20)
    for question, some, near in zip(ASKED, found, plain.search(ASKED, NEAR, 20), strict=True):
        passages = [f.passage for f in near]
        scores = random.scores([question] * 20, [embedding_text(p) for p in passages])
        best = np.argsort(-scores)
        assert [f.passage for f in some] == [passages[i] for i in best] != passages
        np.testing.assert_allclose([f.score for f in some], scores[best], atol=1e-5)
    negated = jax.tree.map(lambda x: x, random.params)
    negated["out"] = jax.tree.map(lambda x: -x, negated["out"])
    against = RerankedStore(plain, dataclasses.replace(random, params=negated), depth=20)
    assert ids(against.search(ASKED, NEAR, k=20)) == [some[::-1] for some in ids(found)]


def test_one_that_reads_finds_what_vectors_rank_low(plain):
    store = RerankedStore(plain, counting(WORDS), depth=60)
    asked = [f"where is w{i} ?" for i in range(60)]
    found = store.search(asked, -VECTORS, k=1)  # the vectors put the passage itself last
    for i, (some,) in enumerate(found):
        assert f"w{i}" in embedding_text(some.passage).split()
    assert ids(plain.search(asked, -VECTORS, k=1)) != ids(found)


def test_depth_says_how_many_are_read_and_k_may_be_more(plain, random):
    few = RerankedStore(plain, random, depth=3)
    assert ids(few.search(ASKED, NEAR, k=1)) == [
        some[:1] for some in ids(few.search(ASKED, NEAR, 3))
    ]
    for k in (1, 3):
        within = [{*some} for some in ids(plain.search(ASKED, NEAR, 3))]
        assert all(
            {*some} <= w for some, w in zip(ids(few.search(ASKED, NEAR, k)), within, strict=True)
        )
    deep = RerankedStore(plain, random, depth=10).search(ASKED, NEAR, k=10)
    assert ids(few.search(ASKED, NEAR, k=10)) == ids(deep)
    assert [len(some) for some in few.search(ASKED, NEAR, k=1000)] == [60] * 6
    with pytest.raises(ConfigError, match="depth >= 1, got 0"):
        RerankedStore(plain, random, depth=0)
    with pytest.raises(ConfigError, match="orders what a KnowledgeStore finds, got 'words'"):
        RerankedStore("words", random)
    for k in (0, -5):
        with pytest.raises(ConfigError, match=f"k must be at least 1, got {k}"):
            few.search(ASKED, NEAR, k=k)


def test_equal_scores_are_ordered_by_id_and_no_more_are_read_for_them(random):
    store = RerankedStore(FaissStore(D), random, depth=8)
    same = [Passage(f"e{i:02}", "", "w1 w2 w3") for i in range(40)]
    vectors = unit(1) * (1 - np.arange(40)[:, None] / 100)
    order = np.random.default_rng(1).permutation(40)
    store.add([same[i] for i in order], vectors.astype(np.float32))
    nearest = sorted(same[i].id for i in order[:8])
    for k in (1, 5, 7, 8):
        assert ids(store.search(["w1"], unit(1), k=k)) == [nearest[:k]]


def test_changes_go_through_both_ways(plain, random):
    store = RerankedStore(plain, random, depth=100)
    assert len(store) == 60 and [*store.passages()] == [*plain.passages()]
    assert (store.dimension, store.cosines, store.read_only) == (D, False, False)
    new = Passage("new", "", "w1")
    store.add([new], unit(1, 3))
    assert plain.get(["new"]) == store.get(["new"]) == [new] and len(plain) == 61
    with pytest.raises(DataError, match="passage id 'new' is in the store already"):
        store.add([new], unit(1))
    news = dataclasses.replace(new, text="w2")
    store.replace([news], unit(1, 4))
    assert plain.get(["new"]) == [news]
    assert ids(plain.search([""], unit(1, 4), k=1)) == [["new"]]
    plain.delete(["p00"])
    assert "p00" not in ids(store.search(["w1"], unit(1), k=61))[0]
    store.delete(["new"])
    with pytest.raises(DataError, match="passage id 'new' is not in the store"):
        plain.get(["new"])
    store.refresh(lambda passages: -VECTORS[[int(p.id[1:]) for p in passages]])
    assert ids(plain.search([""], -VECTORS[5:6], k=1)) == [["p05"]]
    with pytest.raises(ConfigError, match=r"need vectors \[1, 16\], got \[1, 7\]"):
        store.search(["w1"], np.zeros((1, 7)))


def test_a_change_does_not_wait_for_the_cross_encoder(plain, random, monkeypatch):
    store = RerankedStore(plain, random, depth=10)
    scoring, changed = threading.Event(), threading.Event()
    scores = CrossEncoder.scores

    def slow(model, *pairs):
        scoring.set()
        assert changed.wait(timeout=60)
        return scores(model, *pairs)

    monkeypatch.setattr(CrossEncoder, "scores", slow)
    with ThreadPoolExecutor(2) as pool:
        search = pool.submit(store.search, ASKED, NEAR)
        assert scoring.wait(timeout=60)
        pool.submit(store.delete, ["p00"]).result(timeout=60)
        changed.set()
        assert [len(some) for some in search.result()] == [5] * 6


def test_a_change_waits_for_who_looks_into_the_other_store(plain, random):
    store = RerankedStore(plain, random)
    with ThreadPoolExecutor(1) as pool:
        with plain._lock:  # as a search of it holds it
            change = pool.submit(store.delete, ["p00"])
            with pytest.raises(TimeoutError):
                change.result(timeout=0.3)
            assert len(plain) == 60
        change.result(timeout=60)
    assert len(plain) == 59


def test_it_may_be_part_of_a_hybrid(plain, random):
    other = FaissStore(D)
    other.add(PASSAGES, VECTORS)
    hybrid = HybridStore([RerankedStore(plain, random), other])
    new = Passage("new", "", "w1")
    hybrid.add([new], unit(1, 3))
    assert len(plain) == 61
    assert [len(some) for some in hybrid.search(ASKED, NEAR)] == [5] * 6
    hybrid.refresh(lambda passages: unit(len(passages), 11))
    hybrid.delete(["new"])
    assert len(plain) == 60


def test_another_process_opens_a_saved_store_and_finds_the_same(plain, random, tmp_path):
    store = RerankedStore(plain, random, depth=20)
    store.delete(["p03"])
    store.save(tmp_path / "s")
    code = (
        "import json, sys, numpy\n"
        "from fedrag_jax.retrieval.stores.registry import open_store\n"
        f"store = open_store({str(tmp_path / 's')!r}, memory_map=True)\n"
        "vectors = numpy.array(json.load(sys.stdin), numpy.float32)\n"
        "found = store.search(sys.argv[1:], vectors, 7)\n"
        "print(json.dumps([store.read_only, [[[f.passage.id, f.score] for f in x] for x in found]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *ASKED],
        input=json.dumps(NEAR.tolist()),
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    expected = [[[f.passage.id, f.score] for f in some] for some in store.search(ASKED, NEAR, 7)]
    assert json.loads(done.stdout.splitlines()[-1]) == [True, expected]
    with pytest.raises(ConfigError, match="memory-mapped and cannot be changed"):
        open_store(tmp_path / "s", memory_map=True).delete(["p01"])
    again = open_store(tmp_path / "s")
    assert again.depth == 20
    again.delete(["p01"])
    again.save(tmp_path / "s")
    assert len(open_store(tmp_path / "s")) == 58


@pytest.mark.parametrize("depth", [0, -1, "9", 2.5, True, None])
def test_a_folder_with_another_depth_is_refused(plain, random, tmp_path, depth):
    RerankedStore(plain, random).save(tmp_path)
    edited(tmp_path, "store.json", settings={"depth": depth, "elsewhere": ""})
    with pytest.raises(CheckpointError, match=f"a reranked store of depth {depth!r}"):
        open_store(tmp_path)


def test_a_folder_without_its_parts_is_refused(plain, random, tmp_path):
    RerankedStore(plain, random).save(tmp_path)
    data = tmp_path / "store-data-1"
    edited(data / "cross_encoder", architectures=["AutoModel"])
    with pytest.raises(CheckpointError, match=r"\['AutoModel'\].*are no cross-encoder"):
        open_store(tmp_path)
    edited(data / "store", "store.json", data="../../elsewhere")
    with pytest.raises(CheckpointError, match=r"store holds no store"):
        open_store(tmp_path)
    edited(tmp_path, "store.json", settings={})
    with pytest.raises(CheckpointError, match=r"holds no store"):
        open_store(tmp_path)


def test_what_lies_elsewhere_is_followed_only_if_one_says_so(random, tmp_path):
    inner = QdrantStore("passages", D, str(tmp_path / "q"))
    inner.add(PASSAGES, VECTORS)
    store = RerankedStore(inner, random)
    expected = ids(store.search(ASKED, NEAR))
    store.save(tmp_path / "s")
    inner.close()
    with pytest.raises(CheckpointError, match=rf"lie elsewhere.*{tmp_path / 'q'}"):
        open_store(tmp_path / "s")
    again = open_store(tmp_path / "s", elsewhere=True)
    assert ids(again.search(ASKED, NEAR)) == expected
    again.store.close()
    # A folder that says its passages lie in it does not lead elsewhere all the same.
    edited(tmp_path / "s", "store.json", settings={"depth": 50, "elsewhere": ""})
    with pytest.raises(CheckpointError, match="lie elsewhere"):
        open_store(tmp_path / "s")


# --- a system over it -----------------------------------------------------------------------------


def test_a_system_answers_from_it_and_weighs_by_cosines(tmp_path):
    system = RAGSystem.build(PASSAGES[:30], top_k=3)
    store = FaissStore(system.retriever.vectors.shape[1])
    store.add(PASSAGES[:30], system.embed(PASSAGES[:30]))
    over = system.over(RerankedStore(store, counting(WORDS), depth=30))
    asked = ["Where is w7?", "Where is w11?"]
    found = over.batch_query(asked)
    for i, response in zip((7, 11), found, strict=True):
        assert f"w{i}" in embedding_text(response.sources[0]).split()
        assert list(response.scores) == sorted(response.scores, reverse=True)
    read = [list(response.sources) for response in found]
    cosines = system.retriever.similarities(asked, read)
    logits = [response.scores for response in found]
    by_logits, by_cosines = (
        over.answer(asked, read, by, mode="rag_sequence_fast") for by in (logits, cosines)
    )
    assert (
        [r.answer for r in over.batch_query(asked, mode="rag_sequence_fast")]
        == by_cosines
        != by_logits
    )
    over.save(tmp_path)
    assert RAGSystem.load(tmp_path).batch_query(asked) == found
