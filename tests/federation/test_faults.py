"""What a server makes of answers that are wrong, late or missing, and of its own end."""

import io
import json

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from loopback import Loopback
from parties import SETTINGS, assert_agree, federate, nodes, plan_of, simulate
from toys import FOUR, assert_close, mlp_task

from fedrag_jax.data.partition import Partition
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.sampling import ClientSampling, fixed
from fedrag_jax.integrations.flower import roll
from fedrag_jax.integrations.flower.asking import RoundFailedError
from fedrag_jax.integrations.flower.server import run_rounds, server_app

BAD = 2  # the client that answers wrongly


def replaced(reply, part, record):
    content = RecordDict({**dict(reply.content.items()), part: record})
    reply.content = content
    return reply


def with_array(reply, name, array):
    record = reply.content["model"]
    if array is None:
        del record[name]
    else:
        record[name] = array
    return replaced(reply, "model", record)


def with_about(reply, **changes):
    return replaced(reply, "about", ConfigRecord({**reply.content["about"], **changes}))


def lying(shape, data):
    """An array that is said to have a shape and holds something else."""
    return Array("float32", shape, "numpy.ndarray", Array(data).data)


def header(count):
    """The beginning of a file in NumPy's format that promises so many numbers."""
    file = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


F32 = np.float32
# {fault: (what is done to the answer, a part of what the server says of it)}
FAULTS = {
    "NaN": (lambda r: with_array(r, "in", Array(np.full((3, 5), np.nan, F32))), "not finite"),
    "infinite": (lambda r: with_array(r, "out", Array(np.full(5, np.inf, F32))), "not finite"),
    "shape": (lambda r: with_array(r, "in", Array(np.zeros((5, 3), F32))), "in is float32 [5, 3]"),
    "type": (lambda r: with_array(r, "in", Array(np.zeros((3, 5)))), "is float64"),
    "missing": (lambda r: with_array(r, "out", None), "missing out"),
    "unexpected": (lambda r: with_array(r, "more", Array(np.zeros(1, F32))), "unexpected more"),
    "said otherwise": (
        lambda r: with_array(r, "in", lying((3, 5), np.zeros((7, 2), F32))),
        "holds float32 [7, 2]",
    ),
    "objects": (
        lambda r: with_array(r, "in", Array("float32", (3, 5), "numpy.ndarray", PICKLED)),
        "holds object ",
    ),
    "garbage": (
        lambda r: with_array(r, "in", Array("float32", (3, 5), "numpy.ndarray", b"?")),
        "in ",
    ),
    "zip": (
        lambda r: with_array(r, "in", Array("float32", (3, 5), "numpy.ndarray", b"PK\x03\x04junk")),
        "magic string is not correct",
    ),
    "more memory than there is": (
        lambda r: with_array(r, "in", Array("float32", (3, 5), "numpy.ndarray", header(10**15))),
        "holds float32 [1000000000000000]",
    ),
    "huge": (
        lambda r: with_array(r, "in", Array("float32", (3, 5), "numpy.ndarray", b"0" * 10_000)),
        "more than its shape needs",
    ),
    "other kind": (lambda r: with_array(r, "in", Array("float32", (3, 5), "x", b"")), "in "),
    "stale round": (lambda r: with_about(r, round=r.content["about"]["round"] - 1), "of round"),
    "of another client": (lambda r: with_about(r, client=0), "of client 0"),
    "of another plan": (lambda r: with_about(r, plan="0123"), "of plan 0123"),
    "report of NaN": (
        lambda r: replaced(r, "report", MetricRecord({"loss": float("nan"), "examples": 3.0})),
        "numbers that are not finite",
    ),
    "no loss": (lambda r: replaced(r, "report", MetricRecord({"examples": 3.0})), "loss"),
    "nothing": (lambda r: replaced(r, "about", ConfigRecord()), "round"),
}


def pickled() -> bytes:
    """What `numpy.save` writes of objects, and nothing here may ever load."""
    import io

    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    return file.getvalue()


PICKLED = pickled()


def without_one(rounds):
    """The simulator without the client that is refused."""
    plan = plan_of(fed_avg(local_steps=3, sampling=fixed(0, 1, 3)), rounds=rounds)
    return simulate(plan)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_is_refused_and_the_round_goes_on_without_it(fault, tmp_path):
    spoil, why = FAULTS[fault]

    def meddle(node, message, reply):
        bad = node == 100 + BAD and message.metadata.message_type == "train"
        return spoil(reply) if bad else reply

    plan = plan_of(rounds=2)
    result, models = federate(plan, tmp_path, meddle)
    for record in result.history:
        assert record["clients"] == [0, 1, 3]
        assert why in record["refused"][str(BAD)]
    _, others = without_one(2)
    assert_agree(plan.task.trainable, models, others)


def test_a_party_whose_work_fails_tells_that_and_no_more(tmp_path):
    def collate(examples, retrieved):
        if len(examples) == 8:
            raise KeyError("a secret of the example")
        return mlp_task().collate(examples, retrieved)

    task = mlp_task()
    plan = plan_of(task=type(task)(**vars(task) | {"collate": collate}), rounds=1)
    result, _ = federate(plan, tmp_path, quorum=2)
    assert result.history[0]["clients"] == [0, 1]
    assert result.history[0]["refused"] == dict.fromkeys(
        ("2", "3"), "KeyError: the party's own log says more"
    )


def test_a_party_that_diverges_does_not_send(tmp_path):
    sent = []

    def meddle(node, message, reply):
        sent.append((node, message.metadata.message_type, reply))
        return reply

    examples = [dict(e) for e in FOUR.examples]
    for row in FOUR.clients[BAD]:
        examples[row]["y"] = float("inf")
    data = Partition(examples, FOUR.clients)
    result, _ = federate(plan_of(rounds=1), tmp_path, meddle, data=data)
    assert result.history[0]["refused"] == {str(BAD): "it diverged"}
    (reply,) = [r for node, kind, r in sent if node == 100 + BAD and kind == "train"]
    assert reply.has_error()


def test_answers_that_never_come_end_with_patience(tmp_path):
    def meddle(node, message, reply):
        lost = node == 100 + BAD and message.metadata.message_type == "train"
        return None if lost else reply

    plan = plan_of(rounds=1)
    result, _ = federate(plan, tmp_path, meddle, patience=0.5)
    assert result.history[0]["clients"] == [0, 1, 3]
    assert "no answer in 0.5 s" in result.history[0]["refused"][str(BAD)]


def test_a_round_below_its_quorum_is_asked_for_again_of_those_who_are_missing(tmp_path):
    asked = []

    def meddle(node, message, reply):
        if message.metadata.message_type != "train":
            return reply
        asked.append(node)
        first = asked.count(node) == 1
        return FAULTS["NaN"][0](reply) if node == 100 + BAD and first else reply

    plan = plan_of(rounds=1)
    result, models = federate(plan, tmp_path, meddle, quorum=4)
    assert sorted(asked) == [100, 101, 102, 102, 103]
    assert result.history[0]["clients"] == [0, 1, 2, 3] and result.history[0]["refused"] == {}
    assert_agree(plan.task.trainable, models, simulate(plan)[1])

    with pytest.raises(RoundFailedError, match="round 1: 3 of 4 parties answered, but 4 must"):
        federate(
            plan, tmp_path / "never", lambda *a: FAULTS["shape"][0](a[2]) if is_bad(*a) else a[2],
            quorum=4,
        )  # fmt: skip


def is_bad(node, message, reply):
    return node == 100 + BAD and message.metadata.message_type == "train"


def test_scaffold_stays_what_it_is_when_an_answer_is_lost(tmp_path):
    """A control variate moves only with a round that counted, on both sides."""
    plan = plan_of(scaffold(0.05, local_steps=3), rounds=4)

    def meddle(node, message, reply):
        lost = is_bad(node, message, reply) and int(message.content["order"]["round"]) == 2
        return FAULTS["NaN"][0](reply) if lost else reply

    result, models = federate(plan, tmp_path, meddle)
    assert [r["clients"] for r in result.history] == [[0, 1, 2, 3], [0, 1, 3], *[[0, 1, 2, 3]] * 2]

    # The simulator, in which client 2 is not drawn in round 2.
    second = stream(SETTINGS["seed"], "client sampling", 1).bit_generator.state

    def draw(sizes, rng):
        return np.array([0, 1, 3]) if rng.bit_generator.state == second else np.arange(4)

    sampling = ClientSampling("all but one", len, draw)
    _, others = simulate(plan_of(scaffold(0.05, local_steps=3, sampling=sampling), rounds=4))
    assert_agree(plan.task.trainable, models, others)


class Dies(Callback):
    def __init__(self, after):
        self.after = after

    def round_end(self, state, record):
        if state.round == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("algorithm", [fed_avg(local_steps=3), scaffold(0.05, local_steps=3)])
def test_a_server_that_ends_goes_on_after_the_last_finished_round(algorithm, tmp_path):
    plan = plan_of(algorithm, rounds=4)
    with pytest.raises(KeyboardInterrupt):
        federate(plan, tmp_path, callbacks=[Dies(2)])
    asked = []

    def meddle(node, message, reply):
        asked.append((message.metadata.message_type, dict(message.content["order"])))
        return reply

    result, models = federate(plan, tmp_path, meddle)
    assert {int(order["round"]) for kind, order in asked if kind == "train"} == {3, 4}
    whole, others = simulate(plan)
    assert_agree(others[1], models, others[2:])
    assert [r["round"] for r in result.history] == [1, 2, 3, 4]
    lines = (tmp_path / "server" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]
    assert_close(result.trainable, whole.trainable, 1e-6)


def test_a_server_that_ends_within_a_round_makes_it_again(tmp_path):
    """The clients' work is the same again, so nothing but time is lost."""
    plan = plan_of(scaffold(0.05, local_steps=3), rounds=3)

    def meddle(node, message, reply):
        order = message.content["order"]
        if message.metadata.message_type == "train" and order["round"] == 2 and node == 102:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        federate(plan, tmp_path, meddle)
    result, _ = federate(plan, tmp_path)
    assert_close(result.trainable, simulate(plan)[0].trainable, 1e-6)


def test_parties_that_do_not_fit_are_refused_by_name(tmp_path, caplog):
    plan = plan_of()
    apps = nodes(plan, tmp_path)
    apps[104] = nodes(plan, tmp_path)[100]  # number 0 again
    apps[105] = nodes(plan_of(batch_size=4), tmp_path)[101]
    app, config = nodes(plan, tmp_path)[100]
    apps[106] = app, config | {"partition-id": 9}
    apps[107] = app, {}
    federate(plan, tmp_path, apps=apps)
    for node, why in {
        104: "its number is 0, which node 100 has already",
        105: "batch_size is 4 there and 3 here",
        106: "from 0 to 3, got 9",
        107: "got None",
    }.items():
        assert any(f"node {node} is refused" in m and why in m for m in caplog.messages), why


def test_a_federation_nobody_comes_to_says_so(tmp_path):
    plan = plan_of()
    apps = nodes(plan, tmp_path, numbers=[0, 1])
    with pytest.raises(RoundFailedError, match=r"2 of 4 parties connected within 1\.5 s"):
        federate(plan, tmp_path, apps=apps, patience=1.5)


def test_memory_of_another_time_is_refused(tmp_path):
    plan = plan_of(scaffold(0.05, local_steps=3), rounds=4)
    with pytest.raises(KeyboardInterrupt):
        federate(plan, tmp_path, callbacks=[Dies(2)])
    (tmp_path / "party 2" / "memory.safetensors").unlink()
    result, _ = federate(plan, tmp_path)
    assert "counted round 2 of this party last" in result.history[-1]["refused"]["2"]
    other = plan_of(scaffold(0.05, local_steps=3), rounds=4, seed=12)
    moved = {100 + i: nodes(other, tmp_path)[100 + i] for i in range(4)}
    with pytest.raises(RoundFailedError, match=r"memory\.safetensors belongs to plan"):
        run_rounds(other, Loopback(moved), tmp_path / "another", patience=5)


def test_a_folder_is_asked_for_where_parties_keep_something(tmp_path):
    plan = plan_of(scaffold(0.05, local_steps=3))
    apps = {n: (app, {"partition-id": n - 100}) for n, (app, _) in nodes(plan, tmp_path).items()}
    with pytest.raises(RoundFailedError):
        run_rounds(plan, Loopback(apps), tmp_path / "server", patience=1)


def test_counts_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="present and quorum must be at least 1"):
        server_app(plan_of(), tmp_path, quorum=0)


@pytest.mark.parametrize(
    "config", [{"quorum": 0}, {"quorum": "2"}, {"patience": 0}, {"patience": float("nan")}]
)
def test_counts_of_a_runs_configuration_are_checked_too(tmp_path, config):
    plan = plan_of()
    app = server_app(lambda context: plan, tmp_path / "server", patience=5)
    with pytest.raises(ConfigError, match="present and quorum must be at least 1"):
        app(Loopback(nodes(plan, tmp_path)), Context(1, 1, {}, RecordDict(), config))


def test_the_server_app_runs_the_rounds(tmp_path):
    """Through Flower's own ServerApp."""
    plan = plan_of(rounds=2)
    app = server_app(lambda context: plan, tmp_path / "server", patience=5)
    app(Loopback(nodes(plan, tmp_path)), Context(1, 1, {}, RecordDict(), {}))
    federate(plan, tmp_path / "again")
    one, other = (tmp_path / f"{f}server" / "model.safetensors" for f in ("", "again/"))
    assert one.read_bytes() == other.read_bytes()


def test_a_node_that_fails_to_say_who_it_is_is_not_asked_at_once_again(tmp_path, monkeypatch):
    """Every message is a process at the party: a node in trouble is to be left alone for a while."""
    plan, asked = plan_of(rounds=1), []

    def meddle(node, message, reply):
        if message.metadata.message_type == "query.introduce" and node == 102:
            asked.append(node)
            if len(asked) < 3:
                return Message(Error(1, "no memory"), reply_to=message)
        return reply

    with pytest.raises(RoundFailedError, match="3 of 4 parties connected"):
        federate(plan, tmp_path, meddle, patience=3.5)
    assert asked == [102]
    monkeypatch.setattr(roll, "AGAIN", 0.1)
    result, _ = federate(plan, tmp_path, meddle, patience=30)
    assert result.history[0]["clients"] == [0, 1, 2, 3] and len(asked) == 3
