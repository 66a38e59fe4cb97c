"""A comparison of strategies cell by cell: what all cells share, and how one is computed."""

import collections
import copy
import json
import pathlib

import numpy as np

from experiments.inputs import load_generator
from fedrag_jax.data.examples import Dataset

CONTROL_QUESTIONS = 200


class Comparison:
    """What all cells share: data, base system, client split, folders."""

    def __init__(self, config, dataset: Dataset, folder: pathlib.Path):
        from fedrag_jax.models import hub
        from fedrag_jax.retrieval.clusters import with_topics

        self.config, self.dataset, self.folder = config, dataset, folder
        self.models = {
            "generator": load_generator(config.models),
            "retriever": hub.load(config.models.retriever),
        }
        self.systems = {}  # and the seconds their corpus takes to embed
        if config.federated.column == "topic":
            self.dataset = with_topics(dataset, self.system(config.seeds[0]).retriever)

    def system(self, seed: int):
        """The untuned system; only the random half of its adapters depends on the seed."""
        from fedrag_jax.clock import Clock
        from fedrag_jax.models.lora import LoraConfig
        from fedrag_jax.rag import RAGSystem

        c = self.config
        lora = LoraConfig(c.lora.rank, c.lora.alpha, tuple(c.lora.targets))
        if (seed, lora) not in self.systems:
            clock = Clock()
            system = RAGSystem.build(
                self.dataset.passages,
                self.dataset.train,
                **self.models,
                adapters=lora,
                prompt_style=c.models.prompt_style,
                **c.retrieval,
                max_passage_tokens=c.models.max_passage_tokens,
                max_answer_tokens=c.models.max_answer_tokens,
                seed=seed,
                progress=True,
            )
            self.systems[seed, lora] = system, clock.lap().embedding
        return self.systems[seed, lora][0]

    def corpus_cost(self, clients: int):
        """Of embedding the passages, and of having them and their vectors at so many clients."""
        from fedrag_jax.tracking.ledger import corpus_cost

        retriever = self.system(self.config.seeds[0]).retriever
        cost = corpus_cost(retriever.passages, retriever.vectors, clients)
        _, seconds = next(iter(self.systems.values()))
        return cost._replace(embed_seconds=seconds)

    def like(self, config, folder: pathlib.Path) -> "Comparison":
        """The same data and untuned systems under a config that differs in other things."""
        other = copy.copy(self)
        other.config, other.folder = config, folder
        return other

    def clients(self, setting: str, split: int):
        """Who holds what; federated and local training share it."""
        from fedrag_jax.strategies.settings import parse, split_clients

        federated = self.config.federated
        _, alpha = parse(setting, federated.alpha)
        return split_clients(self.dataset.train, federated.clients, alpha, federated.column, split)

    def budget(self):
        """How much training."""
        from fedrag_jax.strategies.settings import Budget

        t, f = self.config.training, self.config.federated
        group = t.group_size or None
        return Budget(
            t.rounds, t.local_steps, f.clients, t.batch_size, group, f.devices, f.participation
        )

    def rate(self, setting: str, task: str, part: str) -> float:
        """The learning rate chosen for a part of a task in a setting, or for its kind."""
        known = self.config.learning_rates
        rates = known[setting if setting in known else setting.partition("_")[0]]
        if task in rates:
            return rates[task]
        if task.startswith("rag_"):
            return rates.marginal_generator if part == "adapters" else rates.marginal_retriever
        return rates.generator if part == "adapters" else rates.retriever

    def tuner(self, setting: str, seed: int, split: int, client: int | None = None, rate=None):
        """The `tune` of one setting, pair of seeds and (local) client."""
        from fedrag_jax.strategies.settings import parse
        from fedrag_jax.strategies.tuner import Tuner
        from fedrag_jax.tracking.cells import seeds_name

        folder = self.folder / "tuned" / f"{setting}-{seeds_name(seed, split)}"
        return Tuner(
            folder=folder if client is None else folder / f"client{client}",
            setting=parse(setting, self.config.federated.alpha)[0],
            examples=self.dataset.train,
            clients=self.clients(setting, split),
            budget=self.budget(),
            rates=rate or (lambda task, part: self.rate(setting, task, part)),
            seed=seed,
            client=client,
            checkpoint_every=self.config.training.checkpoint_every,
        )

    def tuned_systems(self, strategy: str, setting: str, seed: int, split: int):
        """`(systems, tuners)`: one of each, or one per client in the local setting."""
        from fedrag_jax.strategies.strategies import STRATEGIES, together
        from fedrag_jax.strategies.tuner import tune_together

        local = setting.startswith("local")
        members = range(self.config.federated.clients) if local else (None,)
        tuners = [self.tuner(setting, seed, split, client) for client in members]
        systems = together(
            STRATEGIES[strategy],
            [self.system(seed)] * len(tuners),
            self.dataset,
            lambda asked: tune_together([(tuners[i], task) for i, task in asked]),
        )
        for failed in systems:
            if isinstance(failed, Exception):
                raise failed
        return systems, tuners


def compute_cell(
    run: Comparison, strategy: str, setting: str, seed: int, split: int, controls: bool = True
):
    """Trains, evaluates on the test set (with `controls`, if wanted), and prices one cell."""
    from fedrag_jax.clock import Clock
    from fedrag_jax.evaluation.evaluator import evaluate
    from fedrag_jax.tracking import cells
    from fedrag_jax.tracking.ledger import Cost

    test, known = run.dataset.test, None
    clients = run.clients(setting, split)
    if strategy == "none":  # untuned is untuned wherever the data sits
        known = cells.load(run.folder, strategy, run.config.settings[0], seed, split)
        systems, tuners = [run.system(seed)], []
    else:
        systems, tuners = run.tuned_systems(strategy, setting, seed, split)
    holders = 0 if setting == "centralised" else len(clients.clients)
    cost = sum((c for tuner in tuners for c in tuner.costs.values()), run.corpus_cost(holders))
    if known:
        scores, controlled = known.scores, known.controls
        em = [scores["em"]]
        cost += Cost(evaluate_seconds=known.cost.evaluate_seconds)
    else:
        clock = Clock()
        found = [evaluate(system, test, mode=run.config.mode) for system in systems]
        lap = clock.lap()
        cost += Cost(evaluate_seconds=lap.others + lap.searching, compile_seconds=lap.compiling)
        scores = {metric: np.mean([f[metric] for f in found], axis=0) for metric in found[0]}
        controls = controls and len(systems) == 1
        controlled = control_scores(systems[0], test) if controls else {}
        em = [f["em"] for f in found]
    curves = training_curves(tuners)
    by_client = client_scores(clients, test, em, run.config.federated.column)
    return cells.Cell(strategy, setting, seed, split, scores, controlled, by_client, cost, curves)


def training_curves(tuners) -> dict:
    """Of each task a point for each index refresh that the budget has."""
    curves = {}
    for task in tuners[0].costs if tuners else ():
        files = [t.folder / task / "rounds.jsonl" for t in tuners]
        histories = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        stretch = tuners[0].budget.schedule(tuners[0].setting).refresh_every
        curves[task] = curve(histories, stretch)
    return curves


def curve(histories, stretch: int) -> list[dict]:
    """Points: a mean over clients and over `stretch` rounds; examples and seconds add up."""
    points = []
    for start in range(0, len(histories[0]), stretch):
        stretches = [records[start : start + stretch] for records in histories]
        some = [record for records in stretches for record in records]
        points.append(
            {
                "round": start // stretch + 1,
                "loss": float(np.mean([r["loss"] for r in some])),
                "metrics": {
                    name: float(np.mean([r["metrics"][name] for r in some]))
                    for name in some[0]["metrics"]
                },
                "examples": sum(records[-1]["examples"] for records in stretches),
                "seconds": sum(r["seconds"] for r in some),
            }
        )
    return points


def control_scores(system, examples) -> dict[str, float]:
    """EM in percent where it must stay low (no passage, a wrong one) or high (the gold one)."""
    from fedrag_jax.evaluation import evaluator
    from fedrag_jax.evaluation.metrics import percent

    some = examples[:CONTROL_QUESTIONS]
    controls = {
        "closed_book_em": percent(evaluator.closed_book(system, some)["em"]),
        "distractor_em": percent(evaluator.distractor_passage(system, some)["em"]),
    }
    labelled = [e for e in some if e.positive_ids]
    for name, hard in (("gold_em", False), ("gold_em_two_hop", True)):
        if asked := [e for e in labelled if (e.hops > 1) == hard]:
            controls[name] = percent(evaluator.gold_passage(system, asked)["em"])
    return controls


def client_scores(clients, examples, scores, column: str) -> list[float]:
    """For each client the score of its model, in percent, on questions such as it holds.

    A test question counts in proportion to how much of its kind (the value of `column`) the client
    holds. Clients of whose kinds no test question is are left out.

    Args:
      scores: [Q] of the model that all clients use, or of the model of each: a list of one or all.
    """
    kinds = [getattr(e, column) for e in examples]
    asked, values = collections.Counter(kinds), []
    for client in range(len(clients.clients)):
        held = collections.Counter(getattr(e, column) for e in clients.of(client))
        weight = np.array([held[kind] / asked[kind] for kind in kinds])
        own = scores[client % len(scores)]
        if weight.sum():
            values.append(100 * float((weight * own).sum() / weight.sum()))
    return values
