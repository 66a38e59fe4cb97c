"""Learning from the generator's signal, against slow, obvious versions."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY
from toy_rag import EXAMPLES, KEY, PASSAGES, batch_of, slow_log_probs, toy_parts

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.fit import fit
from fedrag_jax.models.decoder import Decoder
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.distillation import METHODS, distillation, distilled, entropy, kl
from fedrag_jax.objectives.joint import marginal_likelihood
from fedrag_jax.objectives.supervision import Attention, CachedAnswers, LeaveOneOut, Likelihoods
from fedrag_jax.retrieval.refresh import NEVER

pytestmark = pytest.mark.usefixtures("strict_types")

K = 3


@pytest.fixture(scope="module")
def parts():
    return toy_parts()


def generator(parts):
    return parts.decoder, {"decoder": parts.params, "adapters": parts.adapters}, parts.prompts


def taught(parts, method, **settings):
    options = {"passages": K} | settings
    return distillation(method, *generator(parts), parts.retriever, EXAMPLES, **options)


def loss_of(task, weight=(1, 1, 1, 1)):
    return jax.jit(task.loss)(task.trainable, task.frozen, batch_of(task, weight), KEY)


@functools.partial(jax.jit, static_argnums=0)
def attention(network, params, *inputs, adapters=None):
    return network(params, *inputs, method="attention", adapters=adapters)


def softmax(x):
    return np.exp(x - np.max(x)) / np.exp(x - np.max(x)).sum()


def slow_signal(parts, signal, example, rows):
    """t_z of each passage."""
    values = []
    if signal == "attention":
        return seen_of(parts, example, rows)
    for row in rows:
        alone = slow_log_probs(parts, example.question, [row], example.answers[0])
        others = [r for r in rows if r != row]
        values.append(
            {
                "probability": lambda alone=alone: np.prod(np.exp(alone)),
                "log_probability": lambda alone=alone: alone.sum(),
                "mean_log_probability": lambda alone=alone: alone.mean(),
                "leave_one_out": lambda others=others: (
                    -slow_log_probs(parts, example.question, others, example.answers[0]).sum()
                ),
            }[signal]()
        )
    return np.array(values)


DEFAULTS = {
    "lsr": {"signal": "probability", "temperature": 0.01, "first": "retriever", "score_scale": 20},
    "replug": {"signal": "probability", "temperature": 0.1, "first": "target", "score_scale": 10},
    "pdist": {"signal": "log_probability", "temperature": 1, "first": "target", "score_scale": 20},
    "adist": {"signal": "attention", "temperature": 0.01, "first": "target", "score_scale": 20},
    "loop": {"signal": "leave_one_out", "temperature": 1, "first": "target", "score_scale": 20},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_settings_of_its_paper(parts, method):
    loss = taught(parts, method).loss
    assert {name: getattr(loss, name) for name in DEFAULTS[method]} == DEFAULTS[method]


@pytest.mark.parametrize(
    "method, settings",
    [
        # Random decoders find answers all but impossible: temperatures that make a difference.
        ("lsr", {"temperature": 1e-11}),
        ("lsr", {"signal": "log_probability", "temperature": 2.0, "first": "target"}),
        ("replug", {"signal": "mean_log_probability", "first": "retriever"}),
        ("pdist", {"score_scale": 3.0}),
        ("loop", {}),
        ("adist", {}),
        ("adist", {"temperature": 0.5}),
    ],
)
def test_losses_against_numpy(parts, method, settings):
    task, weight = taught(parts, method, **settings), (1, 1, 0, 1)
    loss = types.SimpleNamespace(**DEFAULTS[method] | settings)
    found, cosines = parts.retriever.search([e.question for e in EXAMPLES], K)
    slow, entropies = [], []
    for example, rows, cosine in zip(EXAMPLES, found, cosines, strict=True):
        q = softmax(slow_signal(parts, loss.signal, example, list(rows)) / loss.temperature)
        r = softmax(loss.score_scale * cosine)
        a, b = (q, r) if loss.first == "target" else (r, q)
        slow.append(sum(a[z] * (np.log(a[z]) - np.log(b[z])) for z in range(K)))
        entropies.append([-(p * np.log(p)).sum() for p in (r, q)])
    assert np.isfinite(slow).all() and np.ptp(slow) > 1e-3
    found, told = loss_of(task, weight)
    np.testing.assert_allclose(found, np.average(slow, weights=weight), rtol=2e-3)
    entropies = np.average(entropies, axis=0, weights=weight)
    told = [told["retrieval_entropy"], told["target_entropy"]]
    np.testing.assert_allclose(told, entropies, rtol=2e-3, atol=1e-5)


def test_divergence_and_entropy_by_hand():
    log_p = jax.nn.log_softmax(jnp.array([[-1.0, -3.0, -3.0]]))
    # The value that PDist's authors give for these log-probabilities.
    np.testing.assert_allclose(jnp.exp(log_p)[0], [0.787, 0.106, 0.106], atol=1e-3)
    uniform = jnp.full((1, 3), -np.log(3.0))
    p = np.array([0.786986, 0.106507, 0.106507])
    np.testing.assert_allclose(kl(log_p, uniform)[0], (p * np.log(3 * p)).sum(), rtol=1e-4)
    np.testing.assert_allclose(entropy(log_p)[0], -(p * np.log(p)).sum(), rtol=1e-4)
    assert kl(log_p, log_p)[0] == 0


def test_probabilities_of_long_answers_teach_nothing_and_it_shows(parts):
    """The trap of a probability in the exponent: the target is uniform and its entropy says so."""
    _, metrics = loss_of(taught(parts, "lsr"))
    np.testing.assert_allclose(metrics["target_entropy"], np.log(K), rtol=1e-5)
    _, metrics = loss_of(taught(parts, "lsr", signal="log_probability", temperature=1.0))
    assert metrics["target_entropy"] < 0.9 * np.log(K)


def test_emdr_is_rag_sequence_with_the_generator_frozen(parts):
    emdr = taught(parts, "emdr", score_scale=7.0)
    marginal = marginal_likelihood(
        *generator(parts), parts.retriever, EXAMPLES,
        train=("query",), marginal="sequence", passages=K, score_scale=7.0,
    )  # fmt: skip
    np.testing.assert_allclose(loss_of(emdr)[0], loss_of(marginal)[0], rtol=1e-6)


def test_a_retriever_that_agrees_with_its_teacher_has_nothing_to_learn(parts):
    def cosine(questions, texts):
        row = {p.text: i for i, p in enumerate(PASSAGES)}
        queries = parts.retriever.embed_questions(questions)
        passages = parts.retriever.vectors[[row[t] for t in texts]]
        return (queries * passages).sum(1)

    task = distilled(cosine, parts.retriever, EXAMPLES, passages=K, score_scale=4.0,
                     temperature=0.25)  # fmt: skip
    gradient, _ = jax.jit(jax.grad(task.loss, has_aux=True))(
        task.trainable, task.frozen, batch_of(task), KEY
    )
    np.testing.assert_allclose(loss_of(task)[0], 0, atol=1e-6)
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradient)) < 1e-4


@pytest.mark.slow
def test_training_brings_the_retriever_to_its_teacher(parts):
    def favourite(questions, texts):
        return [5.0 * ("Lima" in text) for text in texts]

    task = distilled(favourite, parts.retriever, EXAMPLES, passages=4)
    with jax.numpy_dtype_promotion("standard"):  # for optax
        tuned = fit(task, EXAMPLES, rounds=40, batch_size=4).trainable["query"]
    rows, _ = parts.retriever.with_query(tuned).search([e.question for e in EXAMPLES], 1)
    assert (rows == 2).all()


# --- what the generator is asked ---------------------------------------------------------------


def test_nothing_is_asked_twice():
    asked = []

    def ask(questions):
        asked.append(list(questions))
        return [q * q for q in questions]

    known = CachedAnswers(ask, 3)
    assert known([1, 2, 1, 3, 4]) == [1, 4, 1, 9, 16]
    assert known([4, 5, 2]) == [16, 25, 4]
    assert asked == [[1, 2, 3], [4, 4, 4], [5, 5, 5]]
    asked.clear()
    assert CachedAnswers(ask, 3, full=False)([1, 2, 3, 4]) == [1, 4, 9, 16]
    assert asked == [[1, 2, 3], [4]]


def test_all_sources_say_what_was_read(parts):
    rows = np.array([[0, 1, 2]] * 4)
    for source, prompts in ((Likelihoods, 3), (LeaveOneOut, 3), (Attention, 1)):
        table = source(*generator(parts))(EXAMPLES, rows)
        assert table["prompt_tokens"].shape == table["lengths"].shape == (4, prompts)
        answers = [len(parts.prompts.answer_tokens(e.answers[0])) for e in EXAMPLES]
        read = {Likelihoods: [[0], [1], [2]], LeaveOneOut: [[1, 2], [0, 2], [0, 1]]}
        slow = [
            [
                len(parts.prompts.prompt(e.question, some)) + answer
                for some in read.get(source, [[0, 1, 2]])
            ]
            for e, answer in zip(EXAMPLES, answers, strict=True)
        ]
        width = table["prompt_tokens"].max()
        np.testing.assert_array_equal(table["lengths"], np.minimum(slow, width))
        np.testing.assert_array_equal(table["answer_mask"].sum(1), answers)


def slow_attention(params, config, tokens, read, layers):
    """alpha_n |v_n| of every token at `read`, averaged over heads and layers: one loop each."""
    t, e = len(tokens), config.head_dim
    group = config.num_heads // config.num_kv_heads
    total = np.zeros(t)
    frequencies = config.rope_theta ** -(np.arange(0, e, 2) / e)

    def rotated(x, position):
        turned = (x[: e // 2] + 1j * x[e // 2 :]) * np.exp(1j * position * frequencies)
        return np.concatenate([turned.real, turned.imag])

    for x, layer in layers:
        w = {n: np.asarray(layer["attention"][n]["kernel"], np.float64) for n in
             ("q_proj", "k_proj", "v_proj")}  # fmt: skip
        q, k, v = (x @ w[n] for n in ("q_proj", "k_proj", "v_proj"))
        for head in range(config.num_heads):
            mine, shared = (
                slice(head * e, head * e + e),
                slice(head // group * e, head // group * e + e),
            )
            query = rotated(q[read, mine], read)
            scores = np.array([query @ rotated(k[n, shared], n) for n in range(read + 1)]) / e**0.5
            for n, alpha in enumerate(softmax(scores)):
                total[n] += alpha * np.linalg.norm(v[n, shared])
    return total / config.num_heads / len(layers)


def test_attention_against_numpy():
    config = dataclasses.replace(TINY, num_layers=1)
    network = Network.of(Decoder, config)
    params = network.init(jax.random.key(3))
    tokens = np.array([3, 9, 27, 5, 31, 8])
    mask = np.array([1, 1, 1, 1, 1, 0])
    found = attention(
        network, params, tokens[None], np.arange(6)[None], mask[None], np.array([[2, 4]])
    )
    layer = jax.tree.map(lambda x: x[0], params["layers"])
    x = np.asarray(params["embed"]["embedding"], np.float64)[tokens]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
    normed = normed * np.asarray(layer["attention_norm"]["scale"])
    for i, read in enumerate((2, 4)):
        slow = slow_attention(params, config, tokens, read, [(normed, layer)])
        np.testing.assert_allclose(found[0, i], slow, rtol=1e-4)


def test_attention_is_the_mean_over_layers_and_minds_windows():
    """A token out of the reach of a layer's window gets nothing from that layer."""
    near = dataclasses.replace(TINY, windows=(2, 2, 2))
    networks = [Network.of(Decoder, c) for c in (TINY, near)]
    params = networks[0].init(jax.random.key(3))
    tokens, index = np.arange(6)[None] + 3, np.arange(6)[None]
    read, mask = np.array([[5]]), np.ones((1, 6))
    far, close = (
        np.asarray(attention(n, params, tokens, index, mask, read))[0, 0] for n in networks
    )
    assert (far > 0).all()
    np.testing.assert_array_equal(close > 0, [0, 0, 0, 0, 1, 1])


def seen_of(parts, example, rows):
    """Of each passage's tokens in the prompt, averaged over the positions that predict the answer."""
    prompts = parts.prompts
    prompt = prompts.prompt(example.question, rows)
    answer = prompts.answer_tokens(example.answers[0])
    tokens = np.concatenate([prompt, answer])[None]
    index = np.arange(tokens.shape[1])[None]
    read = len(prompt) - 1 + np.arange(len(answer))[None]
    seen = attention(
        parts.decoder, parts.params, tokens, index, np.ones_like(tokens), read,
        adapters=parts.adapters,
    )[0].mean(0)  # fmt: skip
    # The opening is a BOS, a passage ends with its line.
    ends = 1 + np.cumsum([0, *(len(PASSAGES[row].text) + 1 for row in rows)])
    return np.array([seen[start:end].sum() for start, end in itertools.pairwise(ends)])


@pytest.mark.slow
def test_attention_is_summed_over_the_tokens_of_each_passage(parts):
    rows = [2, 0]
    found = Attention(*generator(parts))(EXAMPLES[1:2], np.array([rows]))["attention"][0]
    np.testing.assert_allclose(found, seen_of(parts, EXAMPLES[1], rows), rtol=1e-4)


@pytest.mark.parametrize(
    "method, settings, words",
    [
        ("rank", {}, "method is one of"),
        ("lsr", {"tau": 1.0}, r"unknown settings \['tau'\]"),
        ("lsr", {"signal": "loss"}, "signal is one of"),
        ("pdist", {"first": "student"}, "first 'target' or 'retriever'"),
        ("pdist", {"temperature": 0.0}, "must be > 0"),
        ("pdist", {"signal": "teacher"}, "use `distilled`"),
        ("emdr", {"temperature": 1.0}, r"unknown settings \['temperature'\]"),
        ("emdr", {"marginal": "sum"}, r"marginal is one of \['token', 'sequence'\]"),
        ("pdist", {"refresh": NEVER}, "train 'document'"),
    ],
)
def test_what_cannot_be_is_refused(parts, method, settings, words):
    with pytest.raises(ConfigError, match=words):
        taught(parts, method, **settings)


def test_other_settings_and_parts_are_refused(parts):
    with pytest.raises(ConfigError, match=r"unknown settings \['signal'\]"):
        distilled(len, parts.retriever, EXAMPLES, signal="probability")
    for train in ((), ("adaptors",)):
        with pytest.raises(ConfigError, match="train names some of"):
            marginal_likelihood(*generator(parts), parts.retriever, EXAMPLES, train=train)


def test_emdr_marginalises_token_by_token_if_asked(parts):
    how = {"train": ("query",), "marginal": "token", "passages": K}
    marginal = marginal_likelihood(*generator(parts), parts.retriever, EXAMPLES, **how)
    found = loss_of(taught(parts, "emdr", marginal="token"))[0]
    np.testing.assert_allclose(found, loss_of(marginal)[0], rtol=1e-6)
