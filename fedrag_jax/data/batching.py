"""Examples and passages as padded integer arrays."""

import copy
import functools
from collections.abc import Sequence

import numpy as np

from fedrag_jax.data.examples import Example, Passage, embedding_text
from fedrag_jax.data.prompts import PromptStyle
from fedrag_jax.errors import CheckpointError, DataError

ANSWER_TOKENS = 16  # longest answer trained on and written, EOS included


class Prompts:
    """Builds prompts over one corpus; every text is tokenised once.

    Args:
      tokenizer: of the generator.
      style: the text around the parts.
      passages: the corpus; retrieved rows index into it.
      examples: those whose questions and answers set the width of training arrays.
      max_passage_tokens: longer passages are cut.
    """

    def __init__(
        self,
        tokenizer,
        style: PromptStyle,
        passages: Sequence[Passage],
        examples: Sequence[Example],
        max_passage_tokens: int = 256,
    ):
        self.tokenizer, self.style = tokenizer, style
        self.max_passage_tokens = max_passage_tokens
        self.eos = tokenizer.eos_token_id
        if style.end:
            # White space may come before the token that ends a turn, and more after it.
            end = self._tokenize([style.end])[0]
            self.eos = next((i for i in end if i in tokenizer.all_special_ids), end[0])
        if self.eos is None:
            raise CheckpointError(
                "the generator's tokenizer has no eos_token, with which answers end; name one in its "
                "tokenizer_config.json"
            )
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos
        opening = self._tokenize([style.opening])[0] if style.opening else []
        if style.bos and tokenizer.bos_token_id is not None:
            opening = [tokenizer.bos_token_id, *opening]
        self._opening = np.array(opening, np.int32)
        texts = [style.passage.format(text=_text(p)) for p in passages]
        self._passages = [np.array(t[:max_passage_tokens], np.int32) for t in self._tokenize(texts)]
        self._questions: dict[str, np.ndarray] = {}
        self._answers: dict[str, np.ndarray] = {}
        self._passage_lengths = np.array([len(p) for p in self._passages])
        self.answer_width = self._after_width = 0
        self._widen(examples)

    @functools.cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """EOS and every token with a line break in it (byte-level and byte-fallback spellings)."""
        vocabulary = self.tokenizer.get_vocab().items()
        breaks = (i for piece, i in vocabulary if "\u010a" in piece or piece == "<0x0A>")
        return tuple(sorted({self.eos, self.tokenizer.eos_token_id, *breaks} - {None}))

    def wide_enough_for(self, examples: Sequence[Example]) -> "Prompts":
        """The same with room for other questions and answers."""
        wider = copy.copy(self)
        wider._widen(examples)
        return wider

    def _widen(self, examples: Sequence[Example]) -> None:
        asked = [len(self.question_tokens(e.question)) for e in examples]
        answered = [len(self.answer_tokens(e.answers[0])) for e in examples]
        after = map(sum, zip(asked, answered, strict=True))
        self.answer_width = max([self.answer_width, *answered])
        self._after_width = max([self._after_width, *after])

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def question_tokens(self, question: str) -> np.ndarray:
        """Tokens from the end of the passages to where the answer starts."""
        if question not in self._questions:
            text = self.style.question.format(question=question)
            self._questions[question] = np.array(self._tokenize([text])[0], np.int32)
        return self._questions[question]

    def answer_tokens(self, answer: str) -> np.ndarray:
        """The scored tokens: the answer and its EOS."""
        if answer not in self._answers:
            tokens = self._tokenize([self.style.answer.format(answer=answer)])[0]
            self._answers[answer] = np.array([*tokens[: ANSWER_TOKENS - 1], self.eos], np.int32)
        return self._answers[answer]

    def prompt(self, question: str, rows: Sequence[int], width: int | None = None) -> np.ndarray:
        """Opening, passages in the order given, question; at most `width` tokens if it can be.

        Passages that do not fit are cut from the end; the question never is.
        """
        head = np.concatenate([self._opening, *(self._passages[r] for r in rows)])
        tail = self.question_tokens(question)
        room = None if width is None else max(0, width - len(tail))
        return np.concatenate([head[:room], tail])

    def training_width(self, k: int) -> int:
        """Tokens T of a training prompt with `k` passages and its answer.

        Several passages are seldom all long: each has room for the 90th percentile, the last is cut.
        """
        each = np.quantile(self._passage_lengths, 1.0 if k == 1 else 0.9)
        return len(self._opening) + k * int(each) + self._after_width

    def training_table(
        self, examples: Sequence[Example], retrieved: np.ndarray, per_passage: bool
    ) -> dict[str, np.ndarray]:
        """Prompts with their first answer, right-padded, as `objectives.likelihood` reads them.

        Args:
          retrieved: int [N, k] corpus rows.
          per_passage: one prompt per passage (K = k) rather than one with all of them (K = 1).

        Returns:
          `tokens` [N, K, T], `lengths` [N, K], `answer_positions` [N, K, A] where in `tokens` each
          answer token stands, `answer_mask` [N, A].

        Raises:
          DataError: a question or answer longer than any of those given to `Prompts`.
        """
        retrieved = np.asarray(retrieved)
        groups = retrieved[:, :, None] if per_passage else retrieved[:, None, :]
        n, prompts, k = groups.shape
        longest, width = self.answer_width, self.training_width(k)
        tokens = np.full((n, prompts, width), self.pad, np.int32)
        lengths = np.zeros((n, prompts), np.int32)
        positions = np.ones((n, prompts, longest), np.int32)
        mask = np.zeros((n, longest), np.float32)
        for i, example in enumerate(examples):
            answer = self.answer_tokens(example.answers[0])
            asked = self.question_tokens(example.question)
            if len(answer) > longest or len(asked) + len(answer) > self._after_width:
                raise DataError(
                    f"question {example.id!r} or its answer is longer than any the prompts were made "
                    "for; give the training questions to RAGSystem.build as `examples`"
                )
            mask[i, : len(answer)] = 1
            for j, rows in enumerate(groups[i]):
                prompt = self.prompt(example.question, rows, width - len(answer))
                end = len(prompt) + len(answer)
                tokens[i, j, : len(prompt)] = prompt
                tokens[i, j, len(prompt) : end] = answer
                positions[i, j, : len(answer)] = np.arange(len(prompt), end)
                lengths[i, j] = end
        return {
            "tokens": tokens,
            "lengths": lengths,
            "answer_positions": positions,
            "answer_mask": mask,
        }

    def passage_places(self, examples: Sequence[Example], retrieved) -> np.ndarray:
        """int [N, T]: of prompts with all passages in one, as `training_table` has them, whose the
        tokens are: from 0 for the first passage, -1 outside of them."""
        k = len(retrieved[0])
        places = np.full((len(examples), self.training_width(k)), -1, np.int32)
        for i, (example, rows) in enumerate(zip(examples, retrieved, strict=True)):
            asked = self.question_tokens(example.question)
            room = places.shape[1] - len(asked) - len(self.answer_tokens(example.answers[0]))
            whose = np.repeat(np.arange(k), [len(self._passages[r]) for r in rows])
            start = len(self._opening)
            end = min(start + len(whose), room)
            places[i, start:end] = whose[: max(end - start, 0)]
        return places


def _text(passage: Passage) -> str:
    """What the generator reads; the title only where the text does not name it already."""
    return passage.text if passage.title in passage.text else embedding_text(passage)


def left_padded(rows: Sequence[np.ndarray], pad: int, multiple: int = 32) -> tuple[np.ndarray, ...]:
    """Rows of different lengths as `tokens`, `mask` [B, T], ending together; T a multiple."""
    width = -(-max(len(row) for row in rows) // multiple) * multiple
    tokens = np.full((len(rows), width), pad, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        mask[i, width - len(row) :] = True
    return tokens, mask


def encoder_table(tokenizer, texts: Sequence[str], max_length: int) -> dict[str, np.ndarray]:
    """Texts for an encoder: `tokens`, `mask` [N, T], right-padded to the longest."""
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    width = max(len(row) for row in rows)
    tokens = np.full((len(rows), width), tokenizer.pad_token_id or 0, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    return {"tokens": tokens, "mask": mask}
