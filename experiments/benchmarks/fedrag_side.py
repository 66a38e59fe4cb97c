"""FedRAG's side of `against_fedrag`, which runs it in FedRAG's own environment.

FedRAG has no simulator and no trainer for labelled passages. Its users decorate a training function and
get Flower clients and a Flower server. `TRAINERS` has two ways to write that function, and `RUNS` the
ways to run it. This side is written for speed: no dropout, no evaluation, no checkpoints, no progress
bars or logs, a fused optimizer, and one load of the model per process.
"""

import functools
import json
import logging
import pathlib
import sys
import time
import warnings
from importlib import metadata

import numpy as np
import torch
from datasets import Dataset
from fed_rag.data_structures import TestResult, TrainResult
from fed_rag.decorators import federate
from fed_rag.fl_tasks.huggingface import HuggingFaceFLTask
from flwr.client import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.strategy.aggregate import aggregate
from flwr.simulation import run_simulation
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

VERSIONS = ("fed-rag", "flwr", "ray", "torch", "transformers", "sentence-transformers")
SEEDS = np.random.default_rng(0)  # of its own, because a Trainer seeds all others


class Ranking(torch.nn.Module):
    """The gold passage of each question against those of its batch, by cosine; passages are frozen."""

    def __init__(self, model, documents, scale):
        super().__init__()
        self.model, self.documents, self.scale = model, documents, scale

    def forward(self, features, labels):
        queries = self.model(features[0])["sentence_embedding"]
        scores = self.scale * queries @ self.documents[labels].T
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(queries)))


@federate.trainer.huggingface
def by_trainer(
    model: SentenceTransformer, train_data: Dataset, val_data: Dataset, work: dict
) -> TrainResult:
    """Trains as FedRAG's own examples do: with the Trainer of the library that made the model."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=work["folder"],
        max_steps=work["local_steps"],
        per_device_train_batch_size=work["batch_size"],
        learning_rate=work["learning_rate"],
        seed=int(SEEDS.integers(2**31)),
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=0,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        log_level="error",
        disable_tqdm=True,
    )
    loss = Ranking(model, documents(work["folder"]), work["scale"])
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=train_data.select_columns(["question", "label"]),
        loss=loss,
    )
    return TrainResult(loss=trainer.train().training_loss)


@federate.trainer.huggingface
def by_loop(
    model: SentenceTransformer, train_data: Dataset, val_data: Dataset, work: dict
) -> TrainResult:
    """Trains as an expert would: a bare PyTorch loop over tokenised questions."""
    return TrainResult(loss=steps(model, train_data, work))


@federate.tester.huggingface
def tester(model: SentenceTransformer, test_data: Dataset) -> TestResult:
    """Never called: no round evaluates."""
    return TestResult(loss=0.0, metrics={})


TRAINERS = {"trainer": by_trainer, "loop": by_loop}


def steps(model, train_data, work) -> float:
    """The local work of one client; returns its mean loss."""
    loss = Ranking(model.train(), documents(work["folder"]), work["scale"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work["learning_rate"], weight_decay=0.0, fused=True
    )
    order, total = torch.randperm(len(train_data)), 0.0
    for rows in order[: work["local_steps"] * work["batch_size"]].split(work["batch_size"]):
        value = loss(*batch(train_data[rows.tolist()]))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += value.item()
    return total / work["local_steps"]


def batch(columns):
    """Features and labels, as `Ranking` takes them."""
    features = {name: torch.tensor(columns[name]) for name in ("input_ids", "attention_mask")}
    return [features], torch.tensor(columns["label"])


# --- what the processes of a run share -------------------------------------------------------------


def load(folder: str) -> SentenceTransformer:
    """The model, in evaluation and training the same function."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = SentenceTransformer(folder + "/model", device="cpu", config_kwargs=none)
    model.max_seq_length = read(folder)["tokens"]
    model.model_card_data.generate_widget_examples = False
    return model


@functools.cache
def only_model(folder: str) -> SentenceTransformer:
    """Returns the process's only model; a simulated client sets all its weights before training."""
    return load(folder)


@functools.cache
def documents(folder: str) -> torch.Tensor:
    return torch.from_numpy(np.load(folder + "/documents.npy", allow_pickle=False))


@functools.cache
def read(folder: str) -> dict:
    return json.loads(pathlib.Path(folder, "work.json").read_text()) | {"folder": folder}


@functools.cache
def client_data(folder: str, client: int) -> Dataset:
    """Questions of one client, as text and as tokens; row i of `documents` is the label of i."""
    work = read(folder)
    size = work["examples_per_client"]
    rows = range(client * size, (client + 1) * size)
    questions = [work["questions"][i] for i in rows]
    tokenizer = only_model(folder).tokenizer
    tokens = tokenizer(questions, truncation=True, max_length=work["tokens"])
    columns = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    return Dataset.from_dict({"question": questions, "label": list(rows)} | columns)


def fedrag_client(task, work, client: int, model):
    data = client_data(work["folder"], client)
    return task.client(model=model, train_data=data, val_data=data, work=work)


# --- the ways to run ---------------------------------------------------------------------------------


def simulation(work, trainer):
    """Flower's simulation engine: Ray's workers run the clients."""
    task = HuggingFaceFLTask.from_trainer_and_tester(trainer=TRAINERS[trainer], tester=tester)
    folder, clients = work["folder"], work["clients"]
    start = [x.detach().numpy() for x in only_model(folder).state_dict().values()]
    strategy = Timed(
        fraction_evaluate=0.0,
        min_fit_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters(start),
    )
    server = task.server(strategy=strategy)
    config = ServerConfig(num_rounds=work["rounds"])

    def client_fn(context):
        torch.set_num_threads(work["cpus_per_client"])
        number = int(context.node_config["partition-id"])
        return fedrag_client(task, work, number, only_model(folder)).to_client()

    run_simulation(
        ServerApp(server_fn=lambda context: ServerAppComponents(server=server, config=config)),
        ClientApp(client_fn=client_fn),
        num_supernodes=clients,
        backend_config={"client_resources": {"num_cpus": work["cpus_per_client"]}},
    )
    return strategy.ends, parameters_to_ndarrays(strategy.parameters)


class Timed(FedAvg):
    """FedAvg that notes when rounds end."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.ends = []

    def aggregate_fit(self, server_round, results, failures):
        if len(results) < self.min_fit_clients:
            raise RuntimeError(f"clients failed: {failures}")
        self.parameters, metrics = super().aggregate_fit(server_round, results, failures)
        self.ends.append(time.perf_counter())
        return self.parameters, metrics


def in_process(work, trainer):
    """FedRAG's clients one after the other, and Flower's `aggregate`: no server and no Ray."""
    task = HuggingFaceFLTask.from_trainer_and_tester(trainer=TRAINERS[trainer], tester=tester)
    clients = [fedrag_client(task, work, k, load(work["folder"])) for k in range(work["clients"])]
    weights, ends = [x.copy() for x in clients[0].get_weights()], []
    for _ in range(work["rounds"]):
        fitted = [client.fit(weights, {}) for client in clients]
        weights = aggregate([(mine, size) for mine, size, _ in fitted])
        ends.append(time.perf_counter())
    return ends, weights


def plain(work, _):
    """Does the same work in PyTorch alone: one model, weights averaged in place."""
    model, ends = only_model(work["folder"]), []
    state = model.state_dict()  # the parameters themselves
    data = [client_data(work["folder"], k) for k in range(work["clients"])]
    for _ in range(work["rounds"]):
        start = {name: x.clone() for name, x in state.items()}
        mean = {name: torch.zeros_like(x) for name, x in state.items()}
        for mine in data:
            for name, x in state.items():
                x.copy_(start[name])
            steps(model, mine, work)
            for name, x in state.items():
                mean[name].add_(x, alpha=1 / len(data))
        for name, x in state.items():
            x.copy_(mean[name])
        ends.append(time.perf_counter())
    return ends, [x.numpy() for x in state.values()]


RUNS = {"simulation": simulation, "in_process": in_process, "plain": plain}


def main():
    """`argv`: folder of the work, name in `RUNS`, name in `TRAINERS`. Prints one line of JSON, last."""
    folder, run, trainer = sys.argv[1:]
    warnings.filterwarnings("ignore")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    work = read(folder)
    model = load(folder)

    def probe():
        columns = client_data(folder, 0)[: work["probe"]]
        with torch.inference_mode():
            return float(Ranking(model, documents(folder), work["scale"])(*batch(columns)))

    clock = time.perf_counter()
    first, before = probe(), [x.clone() for x in model.state_dict().values()]
    aside = time.perf_counter() - clock
    ends, weights = RUNS[run](work, trainer)
    if len(ends) < work["rounds"]:
        raise SystemExit(f"{len(ends)} rounds done, {work['rounds']} wanted")
    clock = time.perf_counter()
    with torch.inference_mode():
        for x, new in zip(model.state_dict().values(), weights, strict=True):
            x.copy_(torch.from_numpy(np.asarray(new)))
    moved = max(
        float((x - y).abs().max()) for x, y in zip(model.state_dict().values(), before, strict=True)
    )
    report = {
        "round_seconds": np.diff(ends).tolist(),
        "first_loss": first,
        "last_loss": probe(),
        "moved": moved,
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }
    print(json.dumps(report | {"aside_seconds": aside + time.perf_counter() - clock}), flush=True)
