"""The shared parts of a comparison's cells, and the computation of one cell."""

import copy
import dataclasses
import pathlib

import numpy as np

from experiments.client_scores import client_scores, mixture_weights, own_scores
from experiments.curves import training_curves
from experiments.loading import (
    algorithm_of,
    clients_over,
    load_generator,
    load_retriever,
    own_questions,
    rates_name,
    replicates,
)
from experiments.reporting import cells
from experiments.reporting.cells import seeds_name
from experiments.reporting.comparison import own, own_weight
from fedrag_jax.clock import Clock
from fedrag_jax.data.examples import Dataset, Example, clusters, sample
from fedrag_jax.data.prompts import named_style
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation import evaluator
from fedrag_jax.evaluation.benchmarks.asking import showing
from fedrag_jax.evaluation.evaluator import evaluate
from fedrag_jax.evaluation.metrics import percent
from fedrag_jax.federated.algorithms.by_name import Named
from fedrag_jax.federated.sweep import require_trained
from fedrag_jax.models.hub import Pretrained
from fedrag_jax.models.lora import LoraConfig
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.clusters import with_topics
from fedrag_jax.retrieval.index.recall import index_recall
from fedrag_jax.strategies.own import named
from fedrag_jax.strategies.regimes import Budget, Stopping, parse, split_clients
from fedrag_jax.strategies.strategy import Strategy, tune_systems
from fedrag_jax.strategies.tuner import Tuner, tune_together
from fedrag_jax.tracking.ledger import Cost, corpus_cost

METRICS = ("em", "f1", "recall_at_5", "mrr")


class Lab:
    """The shared parts of all cells: data, base system, client split, folders.

    Attributes:
      dataset: the data set; its validation questions exclude the few-shot examples.
      shown: the few-shot examples of every prompt.
      asked: the questions of a cell's scores [Q]: the test set and, if configured, the questions for
        clients' own topics.
      of_test, of_own: bool [Q], whether a question counts for the test set and for own topics; by
        default the test set counts for both.
      asked_clusters: int [Q].
    """

    def __init__(self, config, dataset: Dataset, folder: pathlib.Path):
        self.config, self.folder = config, folder
        shots = config.models.get("shots", 0)  # runs of before have none
        self.shown = sample(dataset.validation, shots, config.data.sample_seed) if shots else []
        left = [e for e in dataset.validation if e not in self.shown]
        self.dataset = dataset = dataclasses.replace(dataset, validation=left)
        self.usual = config.federated  # whose mixtures judge the models of all splits
        self.models = self.load_models()
        others = own_questions(config, dataset)
        self.asked = [*dataset.test, *others]
        self.of_test = np.arange(len(self.asked)) < len(dataset.test)
        self.of_own = ~self.of_test if others else self.of_test
        golds = [e.positive_ids for e in self.asked]
        self.asked_clusters = clusters(golds, dataset.passages)
        self.systems, self.embed_seconds = {}, 0.0  # of the corpus, for the first of them
        if config.federated.column == "topic":
            self.dataset = with_topics(dataset, self.system(config.seeds[0]).retriever)
            self.asked = [*self.dataset.test, *others]

    def load_models(self) -> dict[str, Pretrained]:
        """`generator` and `retriever`, untuned."""
        models = self.config.models
        return {
            "generator": load_generator(models, clients_over(self.config)),
            "retriever": load_retriever(models),
        }

    def system(self, seed: int):
        """The untuned system; only the random half of its adapters depends on the seed.

        Its prompts have room for the questions that are trained on and for those that decide when to
        stop.
        """
        c = self.config
        lora = LoraConfig(c.lora.rank, c.lora.alpha, tuple(c.lora.targets))
        if (seed, lora) not in self.systems:
            system = RAGSystem.build(
                self.dataset.passages,
                [*self.dataset.train, *self.stop_questions()],
                **self.models,
                adapters=lora,
                prompt_style=self.prompt_style(),
                **c.retrieval,
                max_passage_tokens=c.models.max_passage_tokens,
                max_answer_tokens=c.models.max_answer_tokens,
                seed=seed,
                progress=True,
            )
            self.embed_seconds = self.embed_seconds or system.retriever.spent.embedding
            self.systems[seed, lora] = system
        return self.systems[seed, lora]

    def prompt_style(self):
        """The style of the config with the examples it shows; a table's answers are one line."""
        models, tokenizer = self.config.models, self.models["generator"].tokenizer
        style = named_style(models.prompt_style, tokenizer)._replace(one_line=True)
        if not self.shown:
            return style
        return showing(style, tokenizer, [(e.question, e.answer) for e in self.shown])

    def corpus_cost(self, clients: int):
        """Returns the cost of embedding the passages, and of copying text and vectors to clients."""
        retriever = self.system(self.config.seeds[0]).retriever
        cost = corpus_cost(retriever.passages, retriever.vectors, clients)
        return cost._replace(embed_seconds=self.embed_seconds)

    def like(self, config, folder: pathlib.Path) -> "Lab":
        """Returns a lab with the same data and untuned systems under another config."""
        other = copy.copy(self)
        other.config, other.folder = config, folder
        return other

    def clients(self, regime: str, split: int):
        """Returns the partition, which federated and local training share."""
        federated = self.config.federated
        alpha = parse(regime, federated.alpha).alpha
        return split_clients(self.dataset.train, federated.clients, alpha, federated.column, split)

    def mixtures(self, regime: str, split: int):
        """Returns the partition whose clients' mixtures of questions judge a model.

        It is the same for all splits: the lowest score over clients of few kinds is lower than that
        over clients of many, whatever the model. None for models of single clients of another split.
        """
        usual, here = self.usual, self.config.federated
        known = parse(regime, here.alpha)
        if known.kind == "local" and (known.alpha, here.clients) != (usual.alpha, usual.clients):
            return None
        return split_clients(self.dataset.train, usual.clients, usual.alpha, usual.column, split)

    def budget(self, converged: bool = False):
        """Returns the training budget: a number of examples, or until validation stops improving."""
        t, f = self.config.training, self.config.federated
        matched = Budget(
            t.rounds, t.local_steps, f.clients, t.batch_size, t.group_size or None, f.devices,
            f.participation,
        )  # fmt: skip
        if not converged:
            return matched
        stopping = Stopping(t.converged.every, t.converged.patience)
        return matched._replace(rounds=t.rounds * t.converged.cap, stopping=stopping)

    def stop_questions(self) -> list[Example]:
        """Returns the validation questions for early stopping."""
        c = self.config
        return sample(self.dataset.validation, c.training.converged.questions, c.data.sample_seed)

    def control_questions(self) -> list[Example]:
        """Returns the test questions for controls."""
        return sample(self.dataset.test, self.config.data.control_questions, 0)

    def rate(self, regime: str, strategy, part: str, task: str = "") -> float:
        """The learning rate chosen for a task or a part of a strategy in a regime, or for its kind.

        Raises:
          ConfigError: there is none under any of its names.
        """
        where = rates_name(self.config, regime)
        rates = self.config.learning_rates[where]
        names = strategy.name, strategy.rates.get(part)
        if task in strategy.rates:
            names = strategy.rates[task], strategy.rates[task]
        found = [rates[name] for name in names if name in rates]
        if not found:
            raise ConfigError(
                f"config.learning_rates[{where!r}] has none for {part!r} of {strategy.name!r}: search "
                f"it with experiments.choose_learning_rates and add it as {names[1] or names[0]!r}"
            )
        return found[0]

    def tuner(self, rates, regime: str, seed: int, split: int, client: int | None = None):
        """The `tune` of one regime, pair of seeds and (local) client.

        Args:
          rates: `rates(task name, part) -> learning rate`.
        """
        folder = self.folder / "tuned" / f"{regime}-{seeds_name(seed, split)}"
        known = parse(regime, self.config.federated.alpha)
        return Tuner(
            folder=folder if client is None else folder / f"client{client}",
            regime=known.kind,
            examples=self.dataset.train,
            clients=self.clients(regime, split),
            budget=self.budget(known.converged),
            validation=self.stop_questions() if known.converged else (),
            rates=rates,
            seed=seed,
            client=client,
            checkpoint_every=self.config.training.checkpoint_every,
            algorithm=Named(*algorithm_of(self.config, regime), self.system(seed).decoder),
        )

    def members(self, regime: str) -> list[int | None]:
        """Returns the clients that train a model each, or (None,) if all train one together."""
        local = regime.startswith("local")
        return [*range(self.config.federated.clients)] if local else [None]

    def tuned_systems(self, strategy: str | Strategy, regime: str, seed: int, split: int):
        """`(systems, tuners)`: one of each, or one per client in the local regime."""
        row = strategy if isinstance(strategy, Strategy) else named(strategy)
        where = regime, seed, split
        tuners = [
            self.tuner(lambda task, part: self.rate(regime, row, part, task), *where, client)
            for client in self.members(regime)
        ]
        systems = tune_systems(
            row,
            [self.system(seed)] * len(tuners),
            self.dataset,
            lambda asked: tune_together([(tuners[i], task) for i, task in asked]),
        )
        return require_trained(systems), tuners


def compute_cell(
    run: Lab, strategy: str, regime: str, seed: int, split: int, controls: bool = True
):
    """Computes one cell: trains, evaluates on the test set (optionally with `controls`), counts
    costs."""
    known, column = None, run.config.federated.column
    clients = run.clients(regime, split)
    if strategy == "none":  # untuned is untuned wherever the data sits
        known = untuned_cell(run.config, run.folder)
        systems, tuners = [run.system(seed)], []
    else:
        systems, tuners = run.tuned_systems(strategy, regime, seed, split)
    holders = 0 if regime == "centralised" else len(clients.clients)
    cost = sum((c for tuner in tuners for c in tuner.costs.values()), run.corpus_cost(holders))
    if known:
        found, controlled = [known_scores(run, known)], known.controls
        cost += Cost(evaluate_seconds=known.cost.evaluate_seconds)
    else:
        clock = Clock()
        found = asked_scores(run, systems, clients, own_mode(run.config, strategy))
        cost += Cost.of_evaluation(clock.lap())
        controls = controls and len(systems) == 1
        controlled = control_scores(systems[0], run.control_questions()) if controls else {}
    everybody = run.mixtures(regime, split)
    own_asked = [e for e, counts in zip(run.asked, run.of_own, strict=True) if counts]
    own_em = [f["em"][run.of_own] for f in found]
    judged = everybody and run.config.mode
    by_client = client_scores(everybody, own_asked, own_em, column) if judged else []
    scores = {}
    for metric in METRICS:
        mean = np.mean([f[metric] for f in found], axis=0)
        scores[metric] = np.where(run.of_test, mean, np.nan)
        each = [np.where(run.of_own, f[metric], np.nan) for f in found]
        name = own(metric)
        scores[name], scores[own_weight(name)] = own_scores(clients, run.asked, each, column)
    curves = training_curves(tuners)
    return cells.Cell(
        strategy, regime, seed, split, scores, controlled, by_client, cost, curves,
        run.asked_clusters, tuners[0].labels if tuners else {},
    )  # fmt: skip


def own_mode(config, strategy: str) -> str:
    """Returns the mode in which a strategy's systems answer; "" if the experiment writes no answers."""
    return config.mode and (named(strategy).mode or config.mode)


def asked_scores(run: Lab, systems, clients, mode: str) -> list[dict[str, np.ndarray]]:
    """Returns the scores [Q] of each system by metric, in [0, 1]; NaN for questions it is not asked.

    Models of lone clients answer the whole test set and the questions about their own topics.
    """
    mixtures = mixture_weights(clients, run.asked, run.config.federated.column)
    found = []
    for client, system in enumerate(systems):
        asked = run.of_test | (mixtures[client] > 0 if len(systems) > 1 else run.of_own)
        rows = np.flatnonzero(asked)
        questions = [run.asked[i] for i in rows]
        answered = evaluate(system, questions, mode=mode) if mode else None
        some = answered or evaluator.rankings_alone(system, questions)
        found.append({metric: np.full(len(asked), np.nan) for metric in METRICS})
        for metric in METRICS:
            found[-1][metric][rows] = some[metric]
    return found


def untuned_cell(config, folder: pathlib.Path) -> cells.Cell | None:
    """Returns a finished cell of the untuned system of any seed, whose adapters change nothing yet."""
    seeds, regime = replicates(config), config.regimes[0]
    found = (cells.load(folder, "none", regime, seed, split) for seed, split in seeds)
    return next((cell for cell in found if cell), None)


def known_scores(run: Lab, cell: cells.Cell) -> dict[str, np.ndarray]:
    """Returns the scores [Q] by metric of a cell's only model."""
    both = ((m, cell.scores[m], cell.scores[own(m)]) for m in METRICS)
    return {metric: np.where(run.of_test, test, others) for metric, test, others in both}


def control_scores(system, examples) -> dict[str, float]:
    """Returns EM in percent where it must be low (no passage, a wrong one) or high (the gold one), and
    the percentage of nearest passages that an approximate index finds."""
    controls = {
        "closed_book_em": percent(evaluator.closed_book(system, examples)["em"]),
        "distractor_em": percent(evaluator.distractor_passage(system, examples)["em"]),
    }
    labelled = [e for e in examples if e.positive_ids]
    for name, hard in (("gold_em", False), ("gold_em_two_hop", True)):
        if asked := [e for e in labelled if (e.hops > 1) == hard]:
            controls[name] = percent(evaluator.gold_passage(system, asked)["em"])
    if not getattr(system.retriever.index, "exact", True):
        questions = [e.question for e in examples]
        controls["index_recall"] = percent(index_recall(system.retriever, questions, system.top_k))
    return controls
