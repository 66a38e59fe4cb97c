"""Retriever, generator and passages as one system that answers questions."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax

from fedrag_jax import inference
from fedrag_jax.data.batching import ANSWER_TOKENS, Prompts
from fedrag_jax.data.citations import cited
from fedrag_jax.data.examples import Passage
from fedrag_jax.data.prompts import PromptStyle, named_style
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.models import hub, lora, peft
from fedrag_jax.models.network import Network
from fedrag_jax.models.writing import Sampling, Writer
from fedrag_jax.retrieval.federated import FederatedStore
from fedrag_jax.retrieval.retriever import Retriever

HEAD = "head.safetensors"


class Response(NamedTuple):
    """An answer and where it comes from.

    Attributes:
      sources: the passages it was read from, best first.
      scores: their cosines.
      cited: those of the sources that it cites; none where the prompt style has no numbers.
    """

    answer: str
    sources: tuple[Passage, ...]
    scores: tuple[float, ...]
    cited: tuple[Passage, ...] = ()


class Reading(NamedTuple):
    """What was written: an answer, and the reasoning or citation before it; "" if there is none."""

    answer: str
    reasoning: str


@dataclasses.dataclass(frozen=True)
class RAGSystem:
    """Everything needed to answer: which passages, read how, by which parameters.

    Immutable: `replace` gives a system with other parameters over the same corpus.
    """

    generator: hub.Pretrained
    decoder: Network  # the generator's network with its adapters
    adapters: Any
    retriever: Retriever
    prompts: Prompts
    top_k: int
    marginal_k: int
    score_scale: float

    @classmethod
    def build(
        cls,
        passages: Sequence[Passage],
        examples: Sequence = (),
        *,
        generator: str | hub.Pretrained = "builtin:decoder",
        retriever: str | hub.Pretrained = "builtin:encoder",
        adapters: lora.LoraConfig | None = None,
        prompt_style: str | PromptStyle = "compact",
        top_k: int = 5,
        marginal_k: int = 10,
        score_scale: float = 20.0,
        max_passage_tokens: int = 256,
        max_answer_tokens: int = ANSWER_TOKENS,
        seed: int = 0,
        progress: bool = False,
    ) -> "RAGSystem":
        """Loads the two models, embeds the corpus and attaches fresh (zero) adapters.

        Args:
          examples: questions that may be trained on; they set the widths of training arrays.
          prompt_style: "compact", "instruct", "chat" (the generator's own chat template), "raft" or
            "compact_reasoned" for answers that come after reasoning, or a style of your own.
          top_k: passages read together.
          marginal_k: passages that training of the retriever marginalises over (all, if the corpus has
            fewer). More than are read, because only a question whose gold passage is among them teaches
            the retriever.
          score_scale: of cosines in training losses and in answers that weigh passages; a smaller one
            spreads p(z|x) over more of them.
          max_answer_tokens: of the longest answer trained on, and written unless told otherwise,
            reasoning included.
          seed: of the adapters' random half.

        Raises:
          ConfigError: an unknown prompt style, `top_k` larger than the corpus, `marginal_k` below 1,
            `score_scale` not positive, `max_answer_tokens` below 2.
          CheckpointError: a folder that holds no such model.
        """
        if not 1 <= top_k <= len(passages):
            raise ConfigError(
                f"top_k must be between 1 and the corpus' {len(passages)} passages, got {top_k}"
            )
        if marginal_k < 1:
            raise ConfigError(f"marginal_k must be at least 1, got {marginal_k}")
        if not score_scale > 0:
            raise ConfigError(f"score_scale must be > 0, got {score_scale}")
        generator = hub.load(generator) if isinstance(generator, str) else generator
        retriever = hub.load(retriever) if isinstance(retriever, str) else retriever
        for model, role, method in (
            (generator, "generator", "decoder"),
            (retriever, "retriever", "encoder"),
        ):
            if model.kind != method:
                raise ConfigError(
                    f"models.{role} must be a {method}; {model.name} is an {model.kind}"
                )
        style = prompt_style
        if isinstance(prompt_style, str):
            style = named_style(prompt_style, generator.tokenizer)
        adapters = adapters or lora.LoraConfig()
        decoder = lora.add_lora(generator.network, adapters)
        prompts = Prompts(
            generator.tokenizer, style, passages, examples, max_passage_tokens, max_answer_tokens
        )
        return cls(
            generator=generator,
            decoder=decoder,
            adapters=lora.init_adapters(decoder, seed),
            retriever=Retriever.build(retriever, passages, progress),
            prompts=prompts,
            top_k=top_k,
            marginal_k=min(marginal_k, len(passages)),
            score_scale=score_scale,
        )

    def replace(self, *, adapters=None, query=None, document=None, head=None) -> "RAGSystem":
        """The system with tuned parts; the corpus is re-embedded if `document` is given."""
        retriever = self.retriever
        if head is not None:
            retriever = retriever.with_head(head)
        if document is not None:
            retriever = retriever.refresh(document)
        if query is not None:
            retriever = retriever.with_query(query)
        adapters = self.adapters if adapters is None else adapters
        return dataclasses.replace(self, adapters=adapters, retriever=retriever)

    def query(self, question: str, **how) -> Response:
        """Answers one question.

        Args:
          how: see `batch_query`.
        """
        return self.batch_query([question], **how)[0]

    def batch_query(self, questions: Sequence[str], **how) -> list[Response]:
        """Answers questions from their top-k passages.

        Args:
          how: `mode` and `beams`, see `read`; `max_new_tokens`, `temperature`, `top_p`, `seed`,
            `stop`, as in `models.writing.Sampling`: by default the likeliest answer of at most the
            system's `max_answer_tokens`, from one prompt with all passages.

        Raises:
          ConfigError: a value out of its range.
        """
        rows, scores = self.retriever.search(questions, self.top_k)
        readings = self.read(questions, rows, scores, **how)
        # One prompt numbers all passages, prompts of one passage each number none.
        cites = self.prompts.cites and how.get("mode", "concatenated") == "concatenated"
        responses = []
        for reading, r, s in zip(readings, rows, scores, strict=True):
            sources = tuple(self.retriever.passages[i] for i in r)
            numbers = (cites and cited(reading.reasoning, len(sources))) or ()
            named = tuple(sources[n - 1] for n in numbers)
            responses.append(Response(reading.answer, sources, tuple(map(float, s)), named))
        return responses

    def answer(
        self, questions: Sequence[str], rows: Sequence[Sequence[int]], scores=None, **how
    ) -> list[str]:
        """The answers of `read`."""
        return [reading.answer for reading in self.read(questions, rows, scores, **how)]

    def read(
        self,
        questions: Sequence[str],
        rows: Sequence[Sequence[int]],
        scores=None,
        *,
        mode: str = "concatenated",
        beams: int | None = None,
        **sampling,
    ) -> list[Reading]:
        """Answers given corpus rows to read (none: closed book).

        In a style with reasoning the answer is what follows the style's `final`; all that was written
        if that never came.

        Args:
          scores: cosines [Q, k] of the rows; computed if they are not given.
          mode: how several passages come to one answer: one of `inference.MODES`.
          beams: hypotheses that a mode of `inference.BEAMS` holds at a time.
          sampling: see `batch_query`.

        Raises:
          ConfigError: a value out of its range; a mode other than `concatenated` with more rows for one
            question than for another, or with none.
        """
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
        texts = inference.MODES[mode](self.writer, prompts, log_weights, settings, beams)
        mark = self.prompts.style.final.strip()
        readings = []
        for text in texts:
            reasoning, found, answer = text.partition(mark) if mark else ("", "", text)
            reading = Reading(answer, reasoning) if found else Reading(text, "")
            readings.append(Reading(*map(str.strip, reading)))
        return readings

    def stream(self, question: str, mode: str = "concatenated", **sampling) -> Iterator[str]:
        """The answer that `query` gives, in pieces as they are written; reasoning is held back.

        Args:
          sampling: see `batch_query`.

        Raises:
          ConfigError: with the first piece, a value out of its range or another mode.
        """
        if mode != "concatenated":
            raise ConfigError(
                f"mode {mode!r} cannot be streamed: its answer is known at the end alone; use query, "
                "or mode 'concatenated'"
            )
        settings = self._sampling(sampling)
        rows, _ = self.retriever.search([question], self.top_k)
        (prompt,) = self._prompts([question], rows, settings)
        answer = space = ""
        for piece in self._answer(self.writer.stream(prompt, settings)):
            # White space waits for what follows it: there is none at either end of an answer.
            piece = space + piece if answer else piece.lstrip()
            space = piece[len(piece.rstrip()) :]
            answer += piece.rstrip()
            if piece.strip():
                yield piece.rstrip()

    @property
    def writer(self) -> Writer:
        """The generator with its adapters; an answer ends with its line."""
        return Writer(
            self.decoder,
            self.generator.params,
            self.prompts.tokenizer,
            self.prompts.stop_tokens,
            self.adapters,
        )

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        return Sampling(**{"max_new_tokens": self.prompts.max_answer_tokens} | given)

    def _answer(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces of a text that follow the mark of the final answer; all if it never comes."""
        pieces, said, mark = iter(pieces), "", self.prompts.style.final.strip()
        for piece in pieces if mark else ():
            said += piece
            if mark in said:
                said = said.partition(mark)[2]
                break
        yield said
        yield from pieces

    def _prompts(self, questions, rows, settings: Sampling) -> list[np.ndarray]:
        limit = self.decoder.config.max_positions - settings.max_new_tokens
        return [self.prompts.prompt(q, r, limit) for q, r in zip(questions, rows, strict=True)]

    def _log_weights(self, questions, rows, scores, mode: str) -> np.ndarray:
        """log p(z | x) [Q, k], the log-softmax of scaled cosines."""
        if 0 in (counts := {len(some) for some in rows}) or len(counts) > 1:
            raise ConfigError(
                f"mode {mode!r} reads equally many passages for all questions, and at least one; got "
                f"{sorted(counts)}: use mode 'concatenated'"
            )
        if scores is None:
            scores = self.retriever.cosines(questions, rows)
        return log_softmax(self.score_scale * np.asarray(scores, np.float64), axis=-1)

    # --- on disk ------------------------------------------------------------------------------

    def save(self, path: str | pathlib.Path) -> None:
        """One folder: generator, adapters (PEFT), both encoders, head, passages, settings.

        Raises:
          CheckpointError: the generator is quantised, or passages lie with silos; nothing is written.
        """
        folder = pathlib.Path(path)
        if isinstance(self.retriever.store, FederatedStore):
            raise CheckpointError(
                "a system over silos has no index of its own to save: save it before over_silos"
            )
        hub.save(self.generator, folder / "generator")
        peft.save(self.adapters, self.decoder, folder / "adapters", base="../generator")
        for side in ("query", "document"):
            encoder = hub.Pretrained(
                self.retriever.encoder,
                getattr(self.retriever, side),
                self.retriever.tokenizer,
                side,
            )
            hub.save(encoder, folder / f"{side}_encoder")
        if self.retriever.head is not None:
            hub.save_arrays({"head": self.retriever.head}, folder / HEAD)
        else:
            (folder / HEAD).unlink(missing_ok=True)
        with open(folder / "passages.jsonl", "w", encoding="utf-8") as file:
            for passage in self.retriever.passages:
                file.write(json.dumps(dataclasses.asdict(passage), ensure_ascii=False) + "\n")
        settings = {
            "top_k": self.top_k,
            "marginal_k": self.marginal_k,
            "score_scale": self.score_scale,
            "prompt_style": self.prompts.style._asdict(),
            "max_passage_tokens": self.prompts.max_passage_tokens,
            "max_answer_tokens": self.prompts.max_answer_tokens,
        }
        (folder / "system.json").write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "RAGSystem":
        """What `save` wrote; it answers as before.

        Raises:
          CheckpointError: the folder holds no saved system.
        """
        folder = pathlib.Path(path)
        try:
            settings = json.loads((folder / "system.json").read_text())
            lines = (folder / "passages.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise CheckpointError(
                f"{folder} holds no saved RAGSystem ({error}); save one there first"
            ) from error
        generator, document = (hub.load(folder / n) for n in ("generator", "document_encoder"))
        decoder, adapters = peft.load(generator.network, folder / "adapters")
        system = cls.build(
            [Passage(**json.loads(line)) for line in lines],
            generator=generator,
            retriever=document,
            adapters=decoder.lora,
            prompt_style=PromptStyle(**settings["prompt_style"]),
            top_k=settings["top_k"],
            marginal_k=settings["marginal_k"],
            score_scale=settings["score_scale"],
            max_passage_tokens=settings["max_passage_tokens"],
            max_answer_tokens=settings.get("max_answer_tokens", ANSWER_TOKENS),
        )
        head = hub.load_arrays(folder / HEAD)["head"] if (folder / HEAD).exists() else None
        return system.replace(
            adapters=adapters, query=hub.load(folder / "query_encoder").params, head=head
        )
