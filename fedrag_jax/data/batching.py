"""Prompts and training batches of a generator as arrays of tokens."""

import copy
import functools
from collections.abc import Sequence

import numpy as np

from fedrag_jax.data.examples import Example, Passage, require_whole
from fedrag_jax.data.padding import clipped
from fedrag_jax.data.passage_parts import PassageParts
from fedrag_jax.data.prompts import PromptStyle, plain
from fedrag_jax.data.spelling import Spelling
from fedrag_jax.errors import CheckpointError, ConfigError, DataError

# Longest answer trained on and written unless told otherwise, EOS included: of styles whose answers
# end with their line, and of others.
ANSWER_TOKENS, ANSWER_TOKENS_OF_LINES = 16, 256


class Prompts:
    """Builds prompts over one corpus; every text is tokenised once.

    Args:
      tokenizer: the generator's tokenizer.
      style: the text around the parts.
      passages: the corpus; retrieved rows index into it.
      examples: examples whose questions and answers set the width of training arrays.
      max_passage_tokens: longer passages are truncated.
      max_answer_tokens: limit of answers in training and generation, including reasoning and EOS; by
        default 16 in a style with one-line answers, else 256.

    Attributes:
      system: the system prompt, see `under`; "" if there is none.
      bare: the style without the system prompt.

    Raises:
      CheckpointError: a tokenizer without EOS.
      DataError: a passage, question or answer with half a character in it.
      ConfigError: a `max_answer_tokens` below 2, or a style with a `{number}` after its `{text}`.
    """

    def __init__(
        self,
        tokenizer,
        style: PromptStyle,
        passages: Sequence[Passage],
        examples: Sequence[Example],
        max_passage_tokens: int = 256,
        max_answer_tokens: int | None = None,
    ):
        if max_answer_tokens is None:
            max_answer_tokens = ANSWER_TOKENS if style.one_line else ANSWER_TOKENS_OF_LINES
        before = style.passage.partition("{text}")[0]
        self._number = before.rstrip(" ") if "{number}" in before else ""
        if ("{number}" in style.passage) != bool(self._number):
            raise ConfigError(
                f"prompt style: passage needs its {{number}} before its {{text}}, got {style.passage!r}"
            )
        self.tokenizer, self.style, self._spelling = tokenizer, style, Spelling(tokenizer)
        self.bare, self.system = style, ""
        self.max_passage_tokens = max_passage_tokens
        self.max_answer_tokens = _checked(max_answer_tokens)
        self.eos = tokenizer.eos_token_id
        if style.end:
            # White space may come before the token that ends a turn, and more after it.
            end = self._spelling.after(".", style.end)
            self.eos = next((i for i in end if i in tokenizer.all_special_ids), end[0])
        if self.eos is None:
            raise CheckpointError(
                "the generator's tokenizer has no eos_token, with which answers end; name one in its "
                "tokenizer_config.json"
            )
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos
        self._opening = self._opened(style.opening)
        around = style.passage.removeprefix(self._number)
        self._passages = PassageParts(
            tokenizer, self._spelling, around, max_passage_tokens, passages
        )
        self._foreign = functools.lru_cache(4096)(self._passages.of)
        self._remember()
        self._numbers: list[np.ndarray] = []  # before the first passage, the second, ...
        self.answer_width = 0
        self._after_lengths: dict[str, int] = {}  # of question and answer, by example id
        self._context_width = 0  # of the longest of the contexts known beforehand
        self._widen(examples)

    def _remember(self) -> None:
        # Large enough for the questions of a training set; bounded, because a service runs for months.
        remembered = functools.lru_cache(1 << 17)
        self.question_tokens = remembered(functools.partial(Prompts.question_tokens, self))
        self.answer_tokens = remembered(functools.partial(Prompts.answer_tokens, self))

    def answering(self, max_answer_tokens: int) -> "Prompts":
        """Returns prompts with another limit of answers; for training, see `wide_enough_for`.

        Raises:
          ConfigError: a limit below 2.
        """
        other = copy.copy(self)
        other.max_answer_tokens = _checked(max_answer_tokens)
        other._remember()
        return other

    def cut(self, examples: Sequence[Example]) -> list[int]:
        """Returns the token counts, including EOS, of the answers that are too long to be trained on
        whole."""
        lengths = (len(self.spelled(e.answer)) + 1 for e in examples)
        return [length for length in lengths if length > self.max_answer_tokens]

    def under(self, system: str, most: int) -> "Prompts":
        """Returns prompts with this system prompt, which replaces an existing one; "" removes it.

        Args:
          most: maximum number of tokens in the opening of a prompt.

        Raises:
          DataError: a system prompt that contains half a character.
          ConfigError: a system prompt that makes the opening longer than `most`.
        """
        require_whole(system, f"the system prompt {system[:80]!r}")
        instructed = copy.copy(self)
        # Of a longer one not all need be tokenised to see that it is.
        instructed.system = self._plain(clipped(system, most + 1))
        instructed.style = self.bare.under(instructed.system) if system else self.bare
        instructed._opening = instructed._opened(instructed.style.opening)
        if len(system) > 64 * most or len(instructed._opening) > most:
            raise ConfigError(
                f"a system prompt of {len(system):,} characters: prompts may open with {most} tokens, "
                "so that there is room for passages; shorten it"
            )
        return instructed

    @property
    def cites(self) -> bool:
        """Whether passages are numbered, and answers follow the numbers of the passages they cite."""
        return bool(self._number and self.style.final)

    def require_citing(self) -> None:
        """Raises ConfigError if the style does not support citations."""
        if not self.cites:
            raise ConfigError(
                "to cite needs a prompt style with {number} and `final`, such as 'compact_cited', "
                "'cited' or 'chat_cited'"
            )

    @property
    def share_cut(self) -> float:
        """The share of passages that fill `max_passage_tokens`, so that their ends are not read."""
        return float((self._passages.lengths >= self.max_passage_tokens).mean())

    @functools.cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """EOS and, for one-line answers, every token that contains a line break, as it is and in
        byte-level and byte-fallback spellings."""
        ends_with_line = self.style.one_line and "\n" not in self.style.final
        vocabulary = self.tokenizer.get_vocab() if ends_with_line else {}
        marks = "\n", "\u010a", "<0x0A>"
        breaks = (i for piece, i in vocabulary.items() if any(mark in piece for mark in marks))
        return tuple(sorted({self.eos, self.tokenizer.eos_token_id, *breaks} - {None}))

    @property
    def stop(self) -> tuple[str, ...]:
        """The strings that end an answer of several lines, in addition to the stop tokens."""
        return (self.style.stop,) if self.style.stop and not self.style.one_line else ()

    def wide_enough_for(
        self,
        examples: Sequence[Example],
        reasoning: Sequence[str] | None = None,
        contexts: Sequence[np.ndarray] = (),
    ) -> "Prompts":
        """Returns prompts with room for other questions and answers, and their reasoning.

        Args:
          contexts: corpus rows of all future prompts, if known: the width is that of the longest
            prompt, so that no passage is truncated.
        """
        wider = copy.copy(self)
        wider._widen(examples, reasoning)
        wider._context_width = max((len(wider._head(rows)) for rows in contexts), default=0)
        return wider

    def _widen(self, examples: Sequence[Example], reasoning=None) -> None:
        reasoning = [""] * len(examples) if reasoning is None else reasoning
        self._after_lengths = dict(self._after_lengths)
        for e, why in zip(examples, reasoning, strict=True):
            answered = len(self.answer_tokens(e.answer, why))
            after = len(self.question_tokens(e.question)) + answered
            self.answer_width = max(self.answer_width, answered)
            self._after_lengths[e.id] = max(self._after_lengths.get(e.id, 0), after)

    @property
    def _after_width(self) -> int:
        return max(self._after_lengths.values(), default=0)

    def _opened(self, text: str) -> np.ndarray:
        """The tokens of a text that a prompt begins with."""
        begin = self.style.bos and self.tokenizer.bos_token_id is not None
        tokens = self._spelling.whole(text) if text else []
        return np.array([*[self.tokenizer.bos_token_id] * begin, *tokens], np.int32)

    def _plain(self, text: str) -> str:
        return plain(self.tokenizer, text)

    def question_tokens(self, question: str) -> np.ndarray:
        """Returns the tokens between the end of the passages and the start of the answer."""
        require_whole(question, f"the question {question[:80]!r}")
        # After a passage: what is before its own words is no part of it, but of the seam.
        before = self.style.passage.format(text="A text.", number=1)
        return np.array(self._spelling.after(before, self._asked(question)), np.int32)

    def _asked(self, question: str) -> str:
        return self.style.question.format(question=self._plain(question))

    def answer_tokens(self, answer: str, reasoning: str = "") -> np.ndarray:
        """Returns the scored tokens: the reasoning, if any, and its end mark, the answer and its EOS.

        An answer that is too long is truncated. If the reasoning leaves too little room, the reasoning
        is truncated and the answer stays. Reasoning is put on one line.

        Raises:
          ConfigError: reasoning in a style that has no mark between it and the answer.
          DataError: half a character in the answer or the reasoning.
        """
        require_whole(answer + reasoning, f"the answer {answer[:80]!r} or its reasoning")
        reasoning = " ".join(reasoning.split())
        if reasoning and not self.style.final:
            raise ConfigError(
                "the prompt style has no mark between reasoning and final answer: use "
                "'compact_reasoned' or 'raft', or train on answers alone (teacher=None)"
            )
        room = self.max_answer_tokens - 1
        tokens = self.spelled(reasoning or answer)
        if reasoning:
            final = self.style.final + self._plain(answer)
            last = self._spelling.after(self._answered(reasoning), final)[:room]
            tokens = [*tokens[: room - len(last)], *last]
        return np.array([*tokens[:room], self.eos], np.int32)

    def spelled(self, answer: str) -> list[int]:
        """Returns the tokens of an answer after a question, without EOS."""
        before = self.style.question.format(question="Which?")
        return self._spelling.after(before, self._answered(answer))

    def _answered(self, answer: str) -> str:
        return self.style.answer.format(answer=self._plain(answer))

    def prompt(self, question: str, rows: Sequence[int], width: int | None = None) -> np.ndarray:
        """Returns the tokens of opening, passages in the given order, and question.

        The length is at most `width` if possible. An entry of `rows` may be a passage outside the
        corpus; -1 is no passage. Passages that do not fit are cut from the end; the question never is.

        Raises:
          ConfigError: a question of far more characters than the width can hold.
          DataError: a question that contains half a character.
        """
        if width is not None and len(question) > 64 * max(width, 1):  # none of it need be tokenised
            raise ConfigError(
                f"a question of {len(question):,} characters is more than the {width} tokens that the "
                "generator reads beside its answer: shorten it"
            )
        tail = self.question_tokens(question)
        if not self._spelling.adds_up:
            whole = self._opened(self._head_text(rows) + self._asked(question))
            if width is None or len(whole) <= width:
                return whole
        head = self._head(rows)
        if width is not None:
            head = self._passages.fitted(head, max(0, width - len(tail)))
        return np.concatenate([head, tail])

    def _head(self, rows: Sequence[int]) -> np.ndarray:
        """The opening and the passages."""
        if not self._spelling.adds_up:
            return self._opened(self._head_text(rows))
        return np.concatenate([self._opening, *self._numbered(rows)])

    def _head_text(self, rows: Sequence[int]) -> str:
        return self.style.opening + "".join(self._numbered(rows))

    def _numbered(self, rows: Sequence[int]) -> list:
        """Tokens, or text, of each passage, after its number if the style has numbers."""
        read = [row for row in rows if isinstance(row, Passage) or row >= 0]
        parts = [
            self._foreign(row) if isinstance(row, Passage) else self._passages[row] for row in read
        ]
        if not self._number:
            return parts
        if not self._spelling.adds_up:
            return [self._number.format(number=n) + part for n, part in enumerate(parts, 1)]
        numbers = self._number_tokens(len(parts))
        return [np.append(n, tokens) for n, tokens in zip(numbers, parts, strict=True)]

    def _number_tokens(self, count: int) -> list[np.ndarray]:
        if len(self._numbers) < count:
            texts = [self._number.format(number=n) for n in range(1, count + 1)]
            # Made whole and then put in place: others may be answering meanwhile.
            self._numbers = [np.array(tokens, np.int32) for tokens in self._spelling(texts)]
        return self._numbers[:count]

    def training_width(self, k: int, packed: int = 1) -> int:
        """Returns the number of tokens T of a training prompt with `k` passages and its answer.

        Several passages are seldom all long. Each passage has room for the 90th percentile, and the
        last one is truncated, unless the contexts are known (`wide_enough_for`). If `packed`, T is the
        length of a row with k prompts; a question with its answer has room for the 90th percentile
        too, and a longer one takes room from the last passages.
        """
        opening, longest = len(self._opening), self._after_width
        if self._context_width:
            return self._context_width + longest
        each = int(np.quantile(self._passages.lengths, 1.0 if k * packed == 1 else 0.9))
        each += max((len(tokens) for tokens in self._number_tokens(k)), default=0)
        if packed == 1:
            return opening + k * each + longest
        after = int(np.quantile([*self._after_lengths.values()] or [0], 0.9))
        return packed * (opening + max(longest, after + k * each))

    def training_table(
        self,
        examples: Sequence[Example],
        retrieved: np.ndarray,
        per_passage: bool,
        packed: bool = False,
        reasoning: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Prompts with their first answer, right-padded, as `generation.likelihood` reads them.

        Args:
          retrieved: int [N, k] corpus rows, -1 for none; k may be 0.
          per_passage: one prompt per passage (K = k) instead of one with all of them (K = 1).
          packed: put the K prompts of a question one after another into one row.
          reasoning: the reasoning of each example, written before the answer; "" for none.

        Returns:
          `tokens` [N, K, T], `lengths` [N, K], `answer_positions` [N, K, A] (the index in `tokens` of
          each answer token), `answer_mask` [N, A]. If packed, `tokens` is [N, 1, T], and `segments`
          [N, 1, T] has the prompt of each token: 1 to K, 0 for padding.

        Raises:
          DataError: a question or answer longer than all of those given to `Prompts`.
        """
        retrieved = np.asarray(retrieved)
        groups = retrieved[:, :, None] if per_passage else retrieved[:, None, :]
        n, prompts, k = groups.shape
        rows = 1 if packed else prompts
        longest, width = self.answer_width, self.training_width(k, prompts if packed else 1)
        tokens = np.full((n, rows, width), self.pad, np.int32)
        segments = np.zeros((n, rows, width), np.int32)
        lengths = np.zeros((n, prompts), np.int32)
        positions = np.ones((n, prompts, longest), np.int32)
        mask = np.zeros((n, longest), np.float32)
        most = self._after_width
        for i, example in enumerate(examples):
            answer = self.answer_tokens(example.answer, reasoning[i] if reasoning else "")
            after = len(self.question_tokens(example.question)) + len(answer)
            if len(answer) > longest or after > most:
                raise DataError(
                    f"question {example.id!r} or its answer is longer than any the prompts were made "
                    "for; give the training questions to RAGSystem.build as `examples`, or take "
                    "prompts.wide_enough_for(questions)"
                )
            mask[i, : len(answer)] = 1
            end = 0
            for j, read in enumerate(groups[i]):
                row, start, later = (0, end, prompts - 1 - j) if packed else (j, 0, 0)
                kept = later * (len(self._opening) + after)  # prompts still to come need so much
                room = width - start - kept - len(answer)
                prompt = self.prompt(example.question, read, room)
                begin, end = start + len(prompt), start + len(prompt) + len(answer)
                tokens[i, row, start:begin], tokens[i, row, begin:end] = prompt, answer
                segments[i, row, start:end] = j + 1
                positions[i, j, : len(answer)] = np.arange(begin, end)
                lengths[i, j] = end - start
        table = {"tokens": tokens, "lengths": lengths}
        table |= {"answer_positions": positions, "answer_mask": mask}
        return table | ({"segments": segments} if packed else {})

    def passage_places(self, examples: Sequence[Example], retrieved) -> np.ndarray:
        """Returns int [N, T]: the passage of each token in the prompts of `training_table` that contain
        all passages, from 0 for the first passage; -1 outside of passages."""
        k = len(retrieved[0])
        places = np.full((len(examples), self.training_width(k)), -1, np.int32)
        for i, (example, rows) in enumerate(zip(examples, retrieved, strict=True)):
            asked = self.question_tokens(example.question)
            room = places.shape[1] - len(asked) - len(self.answer_tokens(example.answer))
            ends = np.maximum.accumulate([len(self._head(rows[:n])) for n in range(k + 1)])
            if ends[-1] > room:  # a cut prompt lacks a passage that would begin at its ending
                ends = np.where(ends < room - len(self._passages.ending), ends, room)
            places[i, ends[0] : ends[-1]] = np.repeat(np.arange(k), np.diff(ends))
        return places


def _checked(max_answer_tokens: int) -> int:
    if max_answer_tokens < 2:
        raise ConfigError(f"max_answer_tokens must be at least 2, got {max_answer_tokens}")
    return max_answer_tokens
