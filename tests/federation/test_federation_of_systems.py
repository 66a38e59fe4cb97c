"""`fedrag federate`: parties with documents of their own, from a folder."""

import io
import json
import stat
import subprocess
import sys
import tomllib
import zipfile

import loopback
import numpy as np
import pytest
from cryptography import x509
from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.clientapp import ClientApp
from loopback import Loopback
from toys import leaves

from fedrag_jax.cli.command_line import main
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.files import write_json
from fedrag_jax.integrations.flower import federation, systems
from fedrag_jax.integrations.flower.certificates import make_certificates, make_node_key
from fedrag_jax.integrations.flower.party import client_app
from fedrag_jax.integrations.flower.party_search import SHARES, share_passages
from fedrag_jax.integrations.flower.searches import search_parties
from fedrag_jax.integrations.flower.server import run_rounds
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.index.silos import over_silos

PARTIES = "north", "library"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation") / "here"
    arguments = ["--parties", *PARTIES, "--passages", "12", "--host", "127.0.0.1"]
    assert main(["federate", "init", str(folder), *arguments]) == 0
    return folder


def test_a_federation_is_made_that_keeps_its_secrets(made):
    listed = {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()}
    assert {"README.md", "pyproject.toml", ".gitignore", "federation/client.py"} <= listed
    assert "\nquorum = 2  " in (made / "pyproject.toml").read_text()  # more than half of two
    assert "\nclients = 2\n" in (made / "pyproject.toml").read_text()
    for name in ("server/certificates/server.key", "parties/north/node.key"):
        assert stat.S_IMODE((made / name).stat().st_mode) == 0o600
    # The server has public keys alone, and parties nothing of the server's but its authority.
    assert {p.name for p in (made / "server" / "parties").iterdir()} == {"north.pub", "library.pub"}
    about = json.loads((made / "parties" / "library" / "party.json").read_text())
    assert about == {"name": "library", "number": 1, "server": "127.0.0.1:9092"}
    documents = [(made / "parties" / name / "documents" / "records.jsonl") for name in PARTIES]
    held = [
        {json.loads(line)["id"] for line in path.read_text().splitlines()} for path in documents
    ]
    assert [len(ids) for ids in held] == [12, 12] and not held[0] & held[1]
    for name, ids in zip(PARTIES, held, strict=True):
        path = made / "parties" / name / "questions.jsonl"
        asked = [json.loads(line) for line in path.read_text().splitlines()]
        assert {row["split"] for row in asked} == {"train", "test"}
        assert all({*row["positive_ids"]} <= ids for row in asked)
        assert len({row["id"] for row in asked}) == len(asked)
    with pytest.raises(ConfigError, match="is not empty"):
        federation.make(made, ["localhost"], 9092, PARTIES, 12, 0)
    with pytest.raises(ConfigError, match="names of parties must differ"):
        federation.make(made / "new", ["localhost"], 9092, ["a", "a"], 12, 0)
    with pytest.raises(ConfigError, match=r"'a\.\.b' is neither a name nor an address of a server"):
        federation.make(made / "new", ["a..b"], 9092, PARTIES, 12, 0)
    assert not (made / "new").exists()
    # The server's port does not depend on folders that are handed over.
    assert json.loads((made / "server" / "server.json").read_text()) == {"port": 9092}


def test_names_of_servers_may_be_long_or_not_of_ascii(tmp_path):
    long = f"{'x' * 60}.elb.amazonaws.com"
    make_certificates(tmp_path, [long, "münchen.example"])
    served = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    named = served.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert named.get_values_for_type(x509.DNSName) == [long, "xn--mnchen-3ya.example"]


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own use
def test_the_app_that_parties_are_sent_holds_no_key_and_no_document(made):
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(made))) as app:
        names = {*app.namelist()}
    own = {f"federation/{name}.py" for name in ("__init__", "client", "server")}
    assert names == {"pyproject.toml", "README.md", ".info/CONTENT"} | own


@pytest.mark.slow
def test_parties_train_on_their_own_documents_and_answer_from_them(made, monkeypatch):
    config = {"clients": 2, "rounds": 2, "local-steps": 1, "batch-size": 2}
    config |= {"objective": "concatenated"}
    there = loopback.Context
    monkeypatch.setattr(loopback, "Context", lambda r, n, c, s, _: there(r, n, c, s, config))
    app = client_app(systems.party_plan, systems.party_questions)
    folders = [made / "parties" / name for name in PARTIES]
    apps = {
        100 + i: (app, {"partition-id": i, "fedrag-folder": str(folder)})
        for i, folder in enumerate(folders)
    }
    config = config | {"folder": str(made / "server" / "run")}
    plan = systems.server_plan(Context(1, 1, {}, RecordDict(), config))
    assert {*plan.task.trainable} == {"adapters"}
    result = run_rounds(plan, Loopback(apps), made / "server" / "run", patience=60)
    assert [record["clients"] for record in result.history] == [[0, 1], [0, 1]]
    assert result.history[0]["refused"] == {}
    for folder in folders:
        system = systems.tuned(folder)
        np.testing.assert_array_equal(leaves(system.adapters), leaves(result.trainable["adapters"]))
        before = RAGSystem.load(folder / "system")
        own = {p.id for p in before.store.passages()}
        assert {p.id for p in system.store.passages()} == own
        read = {p.id for p in system.query("Who owns it?").sources}
        assert read and read <= own
    to = made / "tuned"
    assert main(["federate", "tuned", str(folders[0]), "--to", str(to)]) == 0
    # Its own system stays as it is, and so does the trained one when another run has begun.
    for taken in (folders[0] / "system", to):
        assert main(["federate", "tuned", str(folders[0]), "--to", str(taken)]) == 1
    other = config | {"learning-rate": 0.5}
    systems.server_plan(Context(1, 1, {}, RecordDict(), other))
    systems.party_plan(Context(1, 1, apps[100][1], RecordDict(), other))
    for system in (
        systems.tuned(folders[0]), systems.server_system(Context(1, 1, {}, RecordDict(), other)),
    ):  # fmt: skip
        np.testing.assert_array_equal(leaves(system.adapters), leaves(result.trainable["adapters"]))
    assert leaves(RAGSystem.load(to).adapters) == pytest.approx(
        leaves(result.trainable["adapters"]), abs=1e-6
    )


def test_a_search_finds_what_the_simulated_silos_find(made):
    """With the same documents and models, from the folder that a run is told to the file it writes."""
    app = ClientApp()
    share_passages(app, systems.party_system)
    folders = [made / "parties" / name for name in PARTIES]
    apps = {
        100 + i: (app, {"partition-id": i, "fedrag-folder": str(folder), SHARES: True})
        for i, folder in enumerate(folders)
    }
    questions = [
        json.loads((folder / "questions.jsonl").read_text().splitlines()[0])["question"]
        for folder in folders
    ]
    where = made / "server" / "search"
    where.mkdir()
    write_json(where / "questions.json", questions)
    config = {"search": str(where), "top-k": 4, "clients": 2, "patience": 60}
    config["folder"] = str(made / "server" / "run that nobody has made")
    search_parties(Loopback(apps), Context(1, 1, {}, RecordDict(), config))
    told = json.loads((where / "found.json").read_text())
    assert told["answered"] == [0, 1] and told["refused"] == {} and told["bytes_up"] > 0

    stores = [RAGSystem.load(folder / "system").store for folder in folders]
    passages = [p for store in stores for p in sorted(store.passages(), key=lambda p: p.id)]
    silos = np.split(np.arange(len(passages)), [len(stores[0])])
    retriever = over_silos(RAGSystem.build(passages).retriever, silos)
    rows, scores = retriever.search(questions, 4)
    for one, best, near in zip(told["found"], rows, scores, strict=True):
        assert [p["text"] for p in one["passages"]] == [passages[row].text for row in best]
        assert [p["parties"] for p in one["passages"]] == [[int(r >= len(stores[0]))] for r in best]
        np.testing.assert_allclose([p["score"] for p in one["passages"]], near, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"rounds": "5"}, "rounds must be of type int, got '5'"),
        ({"objective": "nothing"}, "unknown objective 'nothing'"),
        ({"algorithm": "fedsa"}, "fedsa leaves each client a model of its own"),
        ({"algorithm-options": "mu=1"}, "algorithm-options must be JSON"),
        ({"algorithm-options": "[1]"}, "algorithm-options must be JSON"),
        (
            {"round": 3, "rounds": 3},
            r"unknown keys \['round'\]; choose among \['clients', 'rounds'",
        ),
        ({"learning-rate": -1}, "learning-rate must be above 0 and finite, got -1.0"),
        ({"learning-rate": float("nan")}, "learning-rate must be above 0 and finite, got nan"),
    ],
)
def test_configurations_that_cannot_be_are_refused(config, why):
    with pytest.raises(ConfigError, match=why):
        systems.server_plan(Context(1, 1, {}, RecordDict(), config))


def test_the_server_logs_to_weights_and_biases_if_its_configuration_says_so(tmp_path):
    config = {"folder": str(tmp_path), "wandb": "offline", "wandb-project": "ours"}
    (log,) = systems.server_callbacks(Context(1, 1, {}, RecordDict(), config))
    assert (log.mode, log.about["project"], log.folder) == ("offline", "ours", tmp_path)
    (log,) = systems.server_callbacks(Context(1, 1, {}, RecordDict(), {}))
    assert log.mode == "disabled"
    with pytest.raises(ConfigError, match="wandb must be one of"):
        systems.server_callbacks(Context(1, 1, {}, RecordDict(), {"wandb": "on"}))


def test_a_party_without_documents_is_refused_before_anything_is_written(tmp_path, capsys):
    many = [f"party{i}" for i in range(11)]
    assert main(["federate", "init", str(tmp_path / "many"), "--parties", *many]) == 1
    assert "1 to 10 parties" in capsys.readouterr().err
    assert main(["federate", "init", str(tmp_path / "few"), "--passages=0"]) == 1
    assert "at least 1 passage" in capsys.readouterr().err
    assert main(["federate", "init", str(tmp_path / "few"), "--passages=1"]) == 1
    told = capsys.readouterr().err
    assert "hospital_north: no training question is about its passages; ask for more than 1" in told
    assert not any(tmp_path.iterdir())


def test_folders_that_are_none_are_refused_with_what_to_do(tmp_path, capsys):
    assert main(["federate", "run", str(tmp_path)]) == 1
    assert "is not a federation: fedrag federate init" in capsys.readouterr().err
    assert main(["federate", "join", str(tmp_path)]) == 1
    assert "party.json is missing" in capsys.readouterr().err
    (tmp_path / "party.json").write_text('{"name": "north", "server": "127.0.0.1:9092"}')
    assert main(["federate", "join", str(tmp_path)]) == 1
    assert "party.json needs the party's number and server" in capsys.readouterr().err
    for question, more in ((" ", []), ("Who?", ["--top-k", "0"]), ("Who?", ["--patience", "0"])):
        assert main(["federate", "search", str(tmp_path), question, *more]) == 1
        assert "a search needs questions with words" in capsys.readouterr().err
    context = Context(1, 1, {"fedrag-folder": str(tmp_path)}, RecordDict(), {})
    with pytest.raises(ConfigError, match="fedrag index DOCUMENTS --to"):
        systems.party_plan(context)
    with pytest.raises(ConfigError, match="fedrag-folder of the node's configuration"):
        systems.party_plan(Context(1, 1, {}, RecordDict(), {}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as a trained"):
        systems.tuned(tmp_path / "nowhere")


def test_certificates_are_those_that_openssl_and_ssh_take(tmp_path):
    make_certificates(tmp_path, ["server.example.org", "10.0.0.7"])
    leaf = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    leaf.verify_directly_issued_by(
        x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes())
    )
    make_node_key(tmp_path / "key")
    assert (tmp_path / "key.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    checked = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", tmp_path / "ca.crt", tmp_path / "server.pem"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_quorum_is_more_than_half_of_the_parties(tmp_path):
    for clients, quorum in ((1, 1), (2, 2), (3, 2), (9, 5)):
        federation._copy_project(tmp_path / str(clients), clients)
        text = (tmp_path / str(clients) / "pyproject.toml").read_text()
        config = tomllib.loads(text)["tool"]["flwr"]["app"]["config"]
        assert (config["clients"], config["quorum"]) == (clients, quorum)
        assert {*config} == {*systems.DEFAULTS, *systems.SERVER}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--port", "65535"], "--port must be between 1 and 65534, got 65535"),
        (["--port", "0"], "--port must be between 1 and 65534, got 0"),
        (["--host", ""], "'' is neither a name nor an address of a server"),
    ],
)
def test_federations_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path, capsys, options, why
):
    assert main(["federate", "init", str(tmp_path / "here"), *options]) == 1
    assert why in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_help_of_federate_does_not_need_flower():
    code = (
        "import sys; sys.modules['flwr'] = None\n"
        "from fedrag_jax.cli.command_line import main\n"
        "try: main(['federate', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert main(['federate', 'join', 'nowhere']) == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "training across machines needs flwr" in done.stderr
