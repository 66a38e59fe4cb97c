"""Retriever, generator and passages as one system that answers questions."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Unpack

import numpy as np
from scipy.special import log_softmax

from fedrag_jax import rag_folder
from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.citations import cited
from fedrag_jax.data.examples import Passage, check_passages
from fedrag_jax.data.prompts import PromptStyle, named_style
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation import inference
from fedrag_jax.generation.inference import Response, Streamed
from fedrag_jax.generation.rollouts import SEARCHING, Searching, searching_of
from fedrag_jax.generation.searching import returned
from fedrag_jax.generation.text import AnsweringOptions, Sampling, SamplingOptions, Writer
from fedrag_jax.models import hub, lora, sentence_folders
from fedrag_jax.models.network import Network
from fedrag_jax.rag_async import AsyncAnswers
from fedrag_jax.retrieval.index.by_name import index_kind
from fedrag_jax.retrieval.looking_up import Searched, answers_by_searching, require_bare
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.retrieval.stores.passage_source import Found, PassageSource, found_in


@dataclasses.dataclass(frozen=True)
class RAGSystem(AsyncAnswers):
    """A retriever, a generator and passages that together answer questions.

    A system is immutable: `replace` returns a system with other parameters over the same corpus, and
    `over` returns one that answers from a store, whose passages may change, instead of the corpus.
    """

    generator: hub.Pretrained
    decoder: Network  # the generator's network with its adapters
    adapters: Any
    retriever: Retriever
    prompts: Prompts
    top_k: int
    marginal_k: int
    score_scale: float
    store: PassageSource | None = None
    searching: Searching = SEARCHING
    index: str = "flat"  # the kind of the retriever's index, and its options
    index_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def build(
        cls,
        passages: Sequence[Passage] = (),
        examples: Sequence = (),
        *,
        store: PassageSource | None = None,
        generator: str | hub.Pretrained = "builtin:decoder",
        retriever: str | hub.Pretrained = "builtin:encoder",
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        similarity: str | None = None,
        adapters: lora.LoraConfig | None = None,
        prompt_style: str | PromptStyle = "compact",
        system_prompt: str = "",
        top_k: int = 5,
        marginal_k: int = 10,
        score_scale: float | None = None,
        index: str = "flat",
        index_options: Mapping[str, Any] = MappingProxyType({}),
        vectors: str = "float32",
        head: np.ndarray | None = None,
        max_passage_tokens: int = 256,
        max_answer_tokens: int | None = None,
        seed: int = 0,
        searching: Searching | None = None,
        progress: bool = False,
    ) -> "RAGSystem":
        """Loads the two models, embeds the corpus and attaches fresh (zero) adapters.

        Args:
          passages: the corpus for training, and for answering unless there is a store.
          examples: questions for training; they determine the widths of training arrays.
          store: the store to answer from, see `over`.
          query_prompt, document_prompt, similarity: options of the retriever, see `Retriever.build`.
          prompt_style: "compact", whose answers are one line; "instruct" or "chat" (the generator's
            own template); "raft" or "compact_reasoned", with reasoning; or a `PromptStyle`.
          system_prompt: the text at the start of all prompts, see `under`.
          top_k: number of passages read together.
          marginal_k: number of passages, at most the corpus, that retriever training marginalises over.
          score_scale: factor of similarities in training losses and in answers that weight passages;
            by default 20 for cosines and 1 for other similarities.
          index, index_options: the index of the corpus, see `retrieval.index.by_name`.
          vectors: type of the stored passage vectors, "float32" or "float16".
          head: matrix [D, d] after both encoders, see `Retriever`; default: none.
          max_answer_tokens: limit of answers in training and, by default, in generation, including
            reasoning; by default 16 for one-line answers, else 256.
          seed: seed of the random half of the adapters.
          searching: options of mode "search"; by default those that suit the prompt style.

        Raises:
          ConfigError: an unknown prompt style, similarity, index or type of vectors, `top_k` larger
            than the corpus, `marginal_k` or `score_scale` not positive, `max_answer_tokens` below 2.
          DataError: two passages with one id, or a text with half a character.
          CheckpointError: a folder that does not contain such a model.
        """
        passages = passages and check_passages(passages, "the system's passages")
        if top_k < 1 or (store is None and top_k > len(passages)):
            raise ConfigError(
                f"top_k must be between 1 and the corpus' {len(passages)} passages, got {top_k}"
            )
        for name, value in (("marginal_k", marginal_k), ("score_scale", score_scale)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be > 0, got {value}")
        searched = {"index": index_kind(index, index_options), "dtype": vectors, "head": head}
        generator = hub.given(generator, "generator", "decoder")
        retriever = hub.given(retriever, "retriever", "encoder")
        retriever = sentence_folders.used_as(retriever, query_prompt, document_prompt, similarity)
        named = isinstance(prompt_style, str)
        style = named_style(prompt_style, generator.tokenizer) if named else prompt_style
        decoder = lora.add_lora(generator.network, adapters or lora.LoraConfig())
        if score_scale is None:
            score_scale = 20.0 if retriever.network.config.similarity == "cosine" else 1.0
        longest = max_passage_tokens, max_answer_tokens
        system = cls(
            generator=generator,
            decoder=decoder,
            adapters=lora.init_adapters(decoder, seed),
            retriever=Retriever.build(retriever, passages, progress, **searched),
            prompts=Prompts(generator.tokenizer, style, passages, examples, *longest),
            top_k=top_k,
            marginal_k=min(marginal_k, len(passages) or marginal_k),
            score_scale=score_scale,
            searching=searching or searching_of(style, generator.tokenizer),
            index=index,
            index_options=dict(index_options),
        )
        return (system.under(system_prompt) if system_prompt else system).over(store)

    def replace(
        self, *, adapters=None, query=None, document=None, head=None, decoder=None
    ) -> "RAGSystem":
        """Returns the system with tuned parts; the corpus is re-embedded if `document` is given.
        `decoder` is a tree of arrays that replaces some or all of the generator's base.

        Raises:
          ConfigError: adapters of another rank or other layers than the system's.
        """
        retriever = self.retriever
        for name, part in (("with_head", head), ("refresh", document), ("with_query", query)):
            retriever = retriever if part is None else getattr(retriever, name)(part)
        own = {} if adapters is None else {"adapters": lora.fitting(self.decoder, adapters)}
        changed = {"retriever": retriever} | own
        if decoder is not None:
            changed["generator"] = self.generator.with_arrays(decoder)
        return dataclasses.replace(self, **changed)

    def under(self, system_prompt: str) -> "RAGSystem":
        """Returns the system with this system prompt, which replaces an existing one; "" removes it.

        In a chat style the prompt is a separate turn if the template has one, else the first line.

        Raises:
          ConfigError: a prompt that fills half of the generator's context, or more.
        """
        half = self.decoder.config.max_positions // 2
        return dataclasses.replace(self, prompts=self.prompts.under(system_prompt, half))

    # --- the passages it answers from ---------------------------------------------------------

    def over(self, store: PassageSource | None) -> "RAGSystem":
        """Returns the system answering from a store; None returns to its own corpus.

        A vector store must contain the vectors of `embed`. After tuning the document encoder, call
        `store.refresh(system.embed)`.

        Raises:
          ConfigError: the store's vectors have another dimension than the system's, or there is
            neither a store nor a corpus.
        """
        if store is None and not len(self.retriever.passages):
            raise ConfigError("a system needs passages to answer from: give it some, or a store")
        dimension = self.retriever.vectors.shape[1]
        if store is not None and store.dimension not in (None, dimension):
            raise ConfigError(
                f"the store holds vectors of dimension {store.dimension}, the system's are of "
                f"{dimension}: open the store that its encoder filled, or fill one with system.embed"
            )
        return dataclasses.replace(self, store=store)

    def embed(self, passages: Sequence[Passage]) -> np.ndarray:
        """Returns the document encoder's vectors [N, D] of passages, for a store."""
        return self.retriever.embed_new(passages)

    def retrieve(self, questions: Sequence[str], k: int | None = None) -> list[list[Found]]:
        """Returns the k passages nearest to each question (default `top_k`), best first.

        Raises:
          ConfigError: k below 1, or above the size of the corpus if there is no store.
          DataError: a blank question.
        """
        inference.require_asked(questions)
        k = self.top_k if k is None else k
        if self.store is not None:
            by_vector = self.store.dimension is not None and len(questions)
            vectors = self.retriever.embed_questions(questions) if by_vector else None
            return self.store.search(questions, vectors, k)
        return found_in(self.retriever.passages, *self.retriever.search(questions, k))

    # --- questions and answers ----------------------------------------------------------------

    def query(self, question: str, **how: Unpack[AnsweringOptions]) -> Response:
        """Answers one question; `how` has the options of `batch_query`."""
        return self.batch_query([question], **how)[0]

    def batch_query(
        self, questions: Sequence[str], **how: Unpack[AnsweringOptions]
    ) -> list[Response]:
        """Answers questions from their top-k passages, or in mode "search" from the model's searches.

        Args:
          how: `mode` and `beams`, see `read`; `max_new_tokens`, `temperature`, `top_p`, `seed`,
            `stop`, as in `generation.text.Sampling`. The default is greedy decoding of at most the
            system's `max_answer_tokens`, from one prompt with all passages.

        Raises:
          ConfigError: a value out of its range.
        """
        if how.get("mode") == inference.SEARCH:
            return returned(self._searching(questions, **how))
        found = self.retrieve(questions)
        read = [[f.passage for f in some] for some in found]
        by_cosine = self.store is None or self.store.cosines
        scores = [[f.score for f in some] for some in found] if by_cosine else None
        readings = self.read(questions, read, scores, **how)
        responses = []
        for reading, sources, some in zip(readings, read, found, strict=True):
            named = self.cited(reading.reasoning, sources, how.get("mode", "concatenated"))
            told = tuple(f.score for f in some), named, reading.finish, reading.tokens
            responses.append(Response(reading.answer, tuple(sources), *told))
        return responses

    def cited(self, reasoning: str, sources: Sequence, mode: str = "concatenated") -> tuple:
        """Returns the sources whose numbers the reasoning before an answer cites.

        Only a single prompt with all passages numbers them; prompts of one passage each do not.
        """
        cites = self.prompts.cites and mode == "concatenated"
        numbers = (cites and cited(reasoning, len(sources))) or ()
        return tuple(sources[n - 1] for n in numbers)

    def answer(
        self, questions: Sequence[str], rows: Sequence[Sequence], scores=None, **how
    ) -> list[str]:
        """Returns only the answers of `read`."""
        return [reading.answer for reading in self.read(questions, rows, scores, **how)]

    def read(
        self,
        questions: Sequence[str],
        rows: Sequence[Sequence],
        scores=None,
        *,
        mode: str = "concatenated",
        beams: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[inference.Reading]:
        """Answers questions from given passages: corpus rows or any passages (none: closed book).

        With reasoning, the answer is the text after the style's `final`, or all text if it is missing.

        Args:
          scores: [Q, k] passage scores, for modes that weight them; default: similarities.
          mode: how several passages are combined into one answer, one of `inference.MODES`.
          beams: number of hypotheses for a mode of `inference.BEAMS`.
          sampling: see `batch_query`.

        Raises:
          ConfigError: a value out of its range; rows of different length in modes other than
            `concatenated`.
        """
        inference.require_asked(questions)
        settings = self._sampling(sampling)
        beams = inference.check(mode, beams, settings)
        if mode == "vote" and self.prompts.style.final:
            raise ConfigError(
                "mode 'vote' counts texts that are equal, and reasoning seldom is: use another mode, "
                "or a prompt style without reasoning"
            )
        if mode == "concatenated":
            log_weights, read = None, [[some] for some in rows]
        else:
            log_weights = self._log_weights(questions, rows, scores, mode)
            read = [[[row] for row in some] for some in rows]
        prompts = [
            self._prompts([question] * len(some), some, settings)
            for question, some in zip(questions, read, strict=True)
        ]
        found = inference.MODES[mode](self.writer, prompts, log_weights, settings, beams)
        mark = self.prompts.style.final.strip()
        return [inference.reading(*of, mark) for of in zip(found, prompts, strict=True)]

    def stream(
        self,
        question: str,
        read: Sequence | None = None,
        mode: str = "concatenated",
        beams: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Streamed | Searched:
        """Yields the answer of `query` in pieces as they are written, without the reasoning.

        In mode "search" it yields a `Lookup` for each search, then the answer.

        Args:
          read: passages as in `rows` of `read`; default: the retrieved ones.
          beams, sampling: see `batch_query`; the modes that are streamed take no beams.

        Raises:
          ConfigError: at the first piece, for a value out of its range or an unsupported mode.
        """
        if mode == inference.SEARCH and read is None:
            return Searched(self._searching([question], mode, beams, **sampling))

        def written():
            if mode != "concatenated":
                raise ConfigError(
                    f"mode {mode!r} cannot be streamed: its answer is known at the end alone; use "
                    "query, or mode 'concatenated'"
                )
            settings = self._sampling(sampling)
            inference.check(mode, beams, settings)
            rows = [f.passage for f in self.retrieve([question])[0]] if read is None else read
            (prompt,) = self._prompts([question], [rows], settings)
            return (yield from self.writer.stream(prompt, settings)), len(prompt)

        inference.require_asked([question])
        return Streamed(written, self.prompts.style.final.strip())

    @property
    def writer(self) -> Writer:
        """The generator with its adapters and the stop tokens of this prompt style."""
        ends = tuple(sorted({*self.prompts.stop_tokens, *self.generator.ends}))
        params, tokenizer = self.generator.params, self.prompts.tokenizer
        return Writer(self.decoder, params, tokenizer, ends, self.adapters)

    def _searching(self, questions: Sequence[str], mode: str, beams: int | None = None, **sampling):
        inference.require_asked(questions)
        if beams is not None:
            raise ConfigError(f"mode {mode!r} takes no beams, got {beams}")
        require_bare(self.prompts.system)
        settings = Sampling.of({"max_new_tokens": self.searching.budget.written} | sampling)
        return answers_by_searching(self.writer, self.searching, self.retrieve, questions, settings)

    def _sampling(self, given: Mapping[str, Any]) -> Sampling:
        sampling = Sampling.of({"max_new_tokens": self.prompts.max_answer_tokens, **given})
        return dataclasses.replace(sampling, stop=(*sampling.stop, *self.prompts.stop))

    def _prompts(self, questions, rows, settings: Sampling) -> list[np.ndarray]:
        limit = self.decoder.config.max_positions - settings.max_new_tokens
        return [self.prompts.prompt(q, r, limit) for q, r in zip(questions, rows, strict=True)]

    def _log_weights(self, questions, rows, scores, mode: str) -> np.ndarray:
        """log p(z | x) [Q, k]: the log-softmax of scaled similarities."""
        inference.require_even(mode, rows)
        if scores is None:
            scores = self.retriever.similarities(questions, rows)
        return log_softmax(self.score_scale * np.asarray(scores, np.float64), axis=-1)

    # --- on disk ------------------------------------------------------------------------------

    def save(self, path: str | pathlib.Path) -> None:
        """Writes a folder, see `rag_folder.write`; an old system stays until the new one is complete.

        Raises:
          CheckpointError: as `rag_folder.write`; nothing is written.
        """
        rag_folder.write(pathlib.Path(path), self)

    @classmethod
    def load(
        cls, path: str | pathlib.Path, *, memory_map: bool = False, elsewhere: bool = False
    ) -> "RAGSystem":
        """Opens a folder that `save` wrote; the system answers as before.

        Args:
          memory_map, elsewhere: as in `open_store`, for a store saved with the system; `elsewhere`
            also for an index in a service.

        Raises:
          CheckpointError: the folder holds no saved system, or its index or store lies elsewhere.
        """
        options, tuned = rag_folder.read(pathlib.Path(path), memory_map, elsewhere)
        return cls.build(**options).replace(**tuned)
