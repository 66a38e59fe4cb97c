"""The shared parts of the cells of experiments/aloftrag.py: texts, silos, models, test contexts."""

import functools
import pathlib
from urllib.parse import quote

import numpy as np

from experiments.loading import load_generator, load_retriever, replicates
from experiments.pretraining import WORLDS
from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import clusters
from fedrag_jax.data.partition import Partition
from fedrag_jax.data.prompts import named_style
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation.citing import contexts_of, without_gold
from fedrag_jax.generation.author import LocalAuthor
from fedrag_jax.generation.endpoint import EndpointAuthor
from fedrag_jax.label_free import pipeline
from fedrag_jax.label_free.prompts import by_name
from fedrag_jax.models import lora
from fedrag_jax.models.lora import LoraConfig
from fedrag_jax.rag import RAGSystem
from fedrag_jax.strategies.regimes import Budget
from fedrag_jax.strategies.tuner import Tuner

BASE = "base"  # the untuned generator
METRICS = ("em", "f1", "citation", "citation_precision", "citation_recall", "citation_f1")


class LabelFreeLab:
    """The shared parts of all cells: texts, questions, models, contexts, silos."""

    def __init__(self, config, dataset, folder: pathlib.Path):
        self.config, self.folder, self.replicates = config, folder, replicates(config)
        self.dataset = dataset
        self.passages = spread(dataset.passages, config.data.passages)
        there = {p.id for p in self.passages}
        questions = getattr(dataset, config.data.split)
        asked = [e for e in questions if len(e.positive_ids) == 1 and there >= {*e.positive_ids}]
        self.test = spread(asked, config.data.test_questions)
        if not self.test:
            raise ConfigError(
                f"config.data: none of {len(questions)} {config.data.split} questions of "
                f"{dataset.name} has one gold passage among the {len(there)} texts"
            )
        self.generator = load_generator(config.models)
        self.retriever = load_retriever(config.models)
        self.silos = self._silos() if config.silos else {"all": np.arange(len(self.passages))}
        self.silo_of = {self.passages[r].id: s for s, rows in self.silos.items() for r in rows}
        names = [*self.silos]
        self.asked_of = np.array([names.index(self.silo_of[e.positive_ids[0]]) for e in self.test])
        least = min(map(len, self.silos.values()))
        if max(config.contexts) >= least:
            raise ConfigError(
                f"config.contexts: {max(config.contexts)} passages do not leave one to choose where "
                f"{'a silo has' if config.silos else 'there are'} {least}; lower them, or raise "
                "config.data.passages"
            )
        self.test_clusters = clusters([e.positive_ids for e in self.test], self.passages)
        self.systems = {}
        self.contexts = functools.lru_cache(self._contexts)

    def _silos(self) -> dict[str, np.ndarray]:
        """Corpus rows of each topic; texts without one are dealt out."""
        topics = np.array([p.topic for p in self.passages])
        names = sorted({*topics} - {""})
        if len(names) < 2:
            raise ConfigError(f"config.silos: texts of several topics are needed, found {names}")
        owner = np.array([names.index(t) if t else i % len(names) for i, t in enumerate(topics)])
        return {name: np.flatnonzero(owner == i) for i, name in enumerate(names)}

    def pool(self, example) -> np.ndarray:
        """The corpus rows of the silo whose text a question is about."""
        return self.silos[self.silo_of[example.positive_ids[0]]]

    def prompts(self, silo: str = ""):
        """Returns the prompts of a silo's author."""
        author = self.config.author
        return by_name(author.prompts, author.languages.get(silo, author.language))

    @functools.cached_property
    def author(self):
        """Who rates and asks."""
        return endpoint(self.config.author) or LocalAuthor(self.generator)

    def system(self, seed: int, elsewhere: bool = False):
        """The untuned system over the texts, or over those of a pretraining world.

        Seeds differ in the random half of the adapters alone.
        """
        if elsewhere not in self.systems:
            self.systems[elsewhere] = self._built(elsewhere)
        system = self.systems[elsewhere]
        return system.replace(adapters=lora.init_adapters(system.decoder, seed))

    def _built(self, elsewhere: bool):
        c = self.config
        style, tokenizer = c.models.prompt_style, self.generator.tokenizer
        return RAGSystem.build(
            pretraining_world().passages if elsewhere else self.passages,
            generator=self.generator,
            retriever=self.retriever,
            adapters=LoraConfig(c.lora.rank, c.lora.alpha, tuple(c.lora.targets)),
            prompt_style=named_style(style, tokenizer, c.author.language),
            top_k=max(c.contexts),
            max_passage_tokens=c.models.max_passage_tokens,
            max_answer_tokens=c.models.max_answer_tokens,
            progress=True,
        )

    def _contexts(self, n: int, kind: str):
        """Returns the context of each test question, and whether it is hard; by the untuned retriever.

        Args:
          kind: "forced", the gold passage put in place of the last; "none", without it.
        """
        retriever, pool = (
            self.system(self.replicates[0][0]).retriever,
            self.pool if self.config.silos else None,
        )
        if kind == "none":
            return without_gold(retriever, self.test, n, pool=pool), None
        return contexts_of(retriever, self.test, n, pool=pool)

    def generated(self, name: str, seed: int, elsewhere: bool, **how):
        """Returns what each silo generated from its texts: `Generated` by silo.

        Args:
          elsewhere: whether the texts are those of a pretraining world.
          how: options of `pipeline.generate`.
        """
        where, retriever = self.folder / "label_free", self.system(seed, elsewhere).retriever
        silos = {"elsewhere": range(len(retriever.passages))} if elsewhere else self.silos
        made = {}
        for silo, rows in silos.items():
            asking = pipeline.Asking(
                self.author, self.prompts(silo), where / "replies" / quote(silo, safe="")
            )
            try:
                made[silo] = pipeline.generate(
                    asking,
                    [retriever.passages[r] for r in rows],
                    retriever,
                    where / f"{name}-seed{seed}" / quote(silo, safe=""),
                    n=max(self.config.contexts),
                    seed=seed,
                    pool=self.pool if self.config.silos else None,
                    **how,
                )
            except DataError as error:
                raise DataError(f"{name}, {silo}: {error}") from error
            told = pipeline.summary(made[silo].steps).replace("\n", "; ")
            print(f"{name}, {silo}: {told}", flush=True)
        most, prompts = self.config.models.max_answer_tokens, self.system(seed).prompts
        answers = [e.answer for some in made.values() for e in some.examples]
        cut = np.mean([len(prompts.answer_tokens(answer, "1")) >= most for answer in answers])
        if cut > 0.01:
            print(
                f"{name}: {cut:.0%} of the answers are longer than config.models.max_answer_tokens="
                f"{most} with their citation: their ends are not trained on",
                flush=True,
            )
        return made

    def tuner(self, name: str, regime: str, made, seed: int, client: int | None = None):
        """The `tune` of a variant, regime, seed and (local) silo."""
        t, c = self.config.training, self.config
        examples = [e for some in made.values() for e in some.examples]
        ends = np.cumsum([len(some.examples) for some in made.values()])
        held = np.split(np.arange(len(examples)), ends[:-1])
        rates = {"adapters": c.learning_rates[regime], "query": c.retriever_learning_rate}
        folder = self.folder / "tuned" / f"{name}-{regime}-seed{seed}"
        return Tuner(
            folder=folder if client is None else folder / f"client{client}",
            regime=regime,
            examples=examples,
            clients=Partition(examples, tuple(held)),
            budget=Budget(t.rounds, t.local_steps, len(held), t.batch_size, devices=t.devices),
            rates=lambda task, part: rates[part],
            seed=seed,
            client=client,
            checkpoint_every=1,
        )


def spread(items: list, most: int) -> list:
    """Returns this many items, evenly spaced over the list and so from every topic; 0 returns all."""
    count = min(most or len(items), len(items))
    return [items[i] for i in np.linspace(0, max(len(items) - 1, 0), count).astype(int)]


def endpoint(where):
    """Returns the author behind the endpoint of the config; None without one."""
    return EndpointAuthor(where.endpoint, where.model) if where.endpoint else None


@functools.cache
def pretraining_world():
    """Returns one of the worlds that the built-in generator was pretrained on."""
    return synthetic.generate(WORLDS[0]._replace(crowding=4.0))
