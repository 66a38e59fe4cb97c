"""Rows that the built-in decoder is pretrained on: contexts with questions, recalled sentences, copies,
and the formats to cite, to ask and to rate.
"""

import collections
import functools

import numpy as np

from fedrag_jax.data import prompts
from fedrag_jax.data.citations import UNKNOWN
from fedrag_jax.label_free.prompts import COMPACT

VOCABULARY = 3072
SCORED = 128  # positions of a row with a weight in the loss, at most
QUESTION_WEIGHT = 0.3  # of a question's own words, beside 1 for those of an answer
CITATION_WEIGHT = 3.0  # of a citation's number, beside 1 for each piece of an answer
QUESTIONS = 5  # most questions about a context
RECITED = 0.5  # of what is asked about sentences: to say one again from its name on
NAMESAKES = 0.4  # of a context: sharing a word with another, the distractors that matter


class Reader:
    """Draws training rows, each a list of (token, weight in the loss) pairs, from one world."""

    def __init__(self, world, tokenizer, rng):
        self.world, self.tokenizer, self.rng = world, tokenizer, rng
        self.row = {p.id: i for i, p in enumerate(world.passages)}
        self.asked = collections.defaultdict(list)
        self.two_hop = [e for e in world.train if e.hops == 2]
        for e in world.train:
            if e.hops == 1:
                self.asked[e.positive_ids[0]].append(e)
        self.facts = [p for p in world.passages if len(self.asked[p.id]) >= 2]
        self.junk = [p for p in world.passages if not p.title]
        self.namesakes = collections.defaultdict(list)
        for p in self.facts:
            for word in p.title.split():
                self.namesakes[word].append(p)
        self.stating, self.named = collections.defaultdict(list), collections.defaultdict(list)
        for p in self.facts:
            for e in self.asked[p.id]:
                self.stating[_fact(e)].append((p, e))
                for word in p.title.split():
                    self.named[word, _fact(e)].append((p, e))
        self._tokens = functools.lru_cache(maxsize=None)(
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        )

    def choice(self, items):
        return items[self.rng.integers(len(items))]

    def piece(self, text, weight=0.0, end=False):
        ids = list(self._tokens(text)) + ([self.tokenizer.eos_token_id] if end else [])
        return [(token, weight) for token in ids]

    def start(self):
        return [(self.tokenizer.bos_token_id, 0.0)]

    def context(self, golds, k, namesakes=NAMESAKES):
        """Returns the gold passages among k, shuffled; some of the others are namesakes of one."""
        chosen = {p.id: p for p in golds}
        while len(chosen) < k:
            near = self.namesakes[self.choice(golds).title.split()[self.rng.integers(2)]]
            p = self.choice(near if near and self.rng.random() < namesakes else self.facts)
            chosen.setdefault(p.id, p)
        passages = list(chosen.values())
        self.rng.shuffle(passages)
        return passages

    def read(self, k):
        """A context of k passages and several questions about it; some two-hop from k = 2 on."""
        if k > 1 and self.rng.random() < 0.15:
            examples = [self.choice(self.two_hop)]
            golds = [self.world.passages[self.row[i]] for i in examples[0].positive_ids]
        else:
            golds = [self.choice(self.facts)]
            examples = [self.choice(self.asked[golds[0].id])]
        context = self.context(golds, k)
        askable = [p for p in context if self.asked[p.id]]
        while askable and len(examples) < min(QUESTIONS, 4 * k):
            examples.append(self.choice(self.asked[self.choice(askable).id]))
        row = self.start()
        for p in context:
            row += self.piece(prompts.COMPACT.passage.format(text=p.text))
        for i in self.rng.permutation(len(examples)):
            asked = prompts.COMPACT.question.format(question=examples[i].question)
            row += self.piece(asked, QUESTION_WEIGHT)
            row += self.piece(" " + examples[i].answers[0], 1.0, end=True)
        return row

    def sentences(self, n):
        """Returns the same fact about n entities, and questions that differ only in the names."""
        fact = self.choice(list(self.stating))
        chosen = {}
        while len(chosen) < n:
            p, e = self.choice(self.stating[fact])
            if chosen and self.rng.random() < NAMESAKES:
                word = self.choice(next(iter(chosen.values()))[0].title.split())
                p, e = self.choice(self.named[word, fact])
            chosen.setdefault(p.id, (p, e))
        row, told = self.start(), []
        for p, e in chosen.values():
            sentence = next(s for s in p.text.split(". ") if e.answers[0] in s).rstrip(".") + "."
            told.append((prompts.COMPACT.passage.format(text=sentence), p, e))
            row += self.piece(told[-1][0])
        for i in [*self.rng.permutation(n), *self.rng.integers(n, size=max(0, 3 - n))][:QUESTIONS]:
            text, p, e = told[i]
            if self.rng.random() < RECITED:
                sentence = self.piece(text, 1.0)
                start = len(self.piece(text[: text.index(p.title) + len(p.title)]))
                row += [(token, 0.0) for token, _ in sentence[:start]] + sentence[start:]
                continue
            row += self.piece(prompts.COMPACT.question.format(question=e.question), QUESTION_WEIGHT)
            row += self.piece(" " + e.answers[0], 1.0, end=True)
        return row

    def cloze(self, k):
        """A context of k passages, then some of its sentences again: name and verb recall the rest."""
        context = self.context([self.choice(self.facts)], k)
        row = self.start()
        for p in context:
            row += self.piece(prompts.COMPACT.passage.format(text=p.text))
        for _ in range(QUESTIONS):
            sentence = self.choice(self.choice(context).text.split(". ")).rstrip(".")
            tokens = self.piece(sentence + ".", 1.0)
            row += [(token, 0.0) for token, _ in tokens[:3]] + tokens[3:]
        return row

    def cite(self, k):
        gold = self.choice(self.facts)
        example = self.choice(self.asked[gold.id])
        row, style = self.start(), prompts.COMPACT_CITED
        for number, p in enumerate(context := self.context([gold], k), 1):
            row += self.piece(style.passage.format(number=number, text=p.text))
        number = [p.id for p in context].index(gold.id) + 1
        target = style.answer.format(answer=number) + style.final + example.answers[0]
        row += self.piece(style.question.format(question=example.question))
        return row + self.piece(target, 1.0, end=True)

    def cite_several(self, k, sentences=False, unknown=0.04):
        """A context of k numbered passages and several questions, some of which it does not answer.

        Half of the contexts are such as a search finds, nearly all of them namesakes.

        Args:
          sentences: one of each passage alone.
        """
        searched = self.rng.random() < 0.5
        context = self.context([self.choice(self.facts)], k, 0.9 if searched else NAMESAKES)
        asked = {p.id: self.asked[p.id] for p in context}
        row, style = self.start(), prompts.COMPACT_CITED
        for number, p in enumerate(context, 1):
            text = p.text
            if sentences:
                about = self.choice(asked[p.id])
                text = next(s for s in text.split(". ") if about.answers[0] in s).rstrip(".") + "."
                asked[p.id] = [e for e in asked[p.id] if e.answers[0] in text]
            row += self.piece(style.passage.format(number=number, text=text))
        numbers = {p.id: number for number, p in enumerate(context, 1)}
        for _ in range(QUESTIONS):
            about = self.choice(self.facts if self.rng.random() < unknown else context)
            number = numbers.get(about.id, 0)
            example = self.choice(asked[about.id] if number else self.asked[about.id])
            row += self.piece(style.question.format(question=example.question))
            row += self.piece(style.answer.format(answer=number), CITATION_WEIGHT)
            row += self.piece(
                style.final + (example.answers[0] if number else UNKNOWN), 1.0, end=True
            )
        return row

    def rate_pair(self):
        """Ten for a question that a passage answers, or for its right answer, else none."""
        gold = self.choice(self.facts)
        example, other = (self.choice(self.asked[gold.id]) for _ in range(2))
        parts, good = {"text": gold.text, "question": example.question}, self.rng.random() < 0.5
        prompt = COMPACT.rate_question
        if self.rng.random() < 0.5:
            prompt, parts["answer"] = COMPACT.rate_answer, example.answers[0]
            wrong = self.choice(self.facts)
            if not good:  # another fact of the same passage, or the same of another
                same = [e for e in self.asked[wrong.id] if _fact(e) == _fact(example)]
                parts["answer"] = self.choice([other, *same]).answers[0]
                good = parts["answer"] == example.answers[0]
        elif not good:
            parts["text"] = self.context([gold], 2)[0].text
            good = parts["text"] == gold.text
        row = self.start() + self.piece(prompt.user.format(**parts)) + self.piece(prompt.start)
        return row + self.piece(prompts.RATE.answer.format(answer=10 * good), 1.0, end=True)

    def ask(self):
        """A question about a passage; sentences may lack, but not the one asked about."""
        gold = self.choice(self.facts)
        example = self.choice(self.asked[gold.id])
        text = " ".join(
            sentence.rstrip(".") + "."
            for sentence in gold.text.split(". ")
            if example.answers[0] in sentence or self.rng.random() < 0.7
        )
        target = prompts.ASK.answer.format(question=example.question, answer=example.answers[0])
        row = self.start() + self.piece(prompts.ASK.passage.format(text=text))
        return row + self.piece(prompts.ASK.question) + self.piece(target, 1.0, end=True)

    def rate(self):
        """Ten for a passage of facts, nine if one sentence is missing, junk two or less."""
        draw = self.rng.random()
        if draw < 0.4:
            text, rating = self.choice(self.junk).text, self.rng.integers(3)
        else:
            text, rating = self.choice(self.facts).text, 10
            if draw < 0.6 and ". " in text:
                text, rating = text.split(". ")[0] + ".", 9
        row = self.start() + self.piece(prompts.RATE.passage.format(text=text))
        row += self.piece(prompts.RATE.question)
        return row + self.piece(prompts.RATE.answer.format(answer=rating), 1.0, end=True)

    def copy(self, width):
        """Random sequences over a few hundred tokens, each once to see and once to repeat."""
        row, half = self.start(), self.rng.integers(6, 17)
        while len(row) + 2 * half <= width:
            tokens = [int(t) for t in self.rng.integers(VOCABULARY - 512, VOCABULARY, size=half)]
            row += [(t, 0.0) for t in tokens] + [(t, 1.0) for t in tokens]
            half = self.rng.integers(6, 17)
        return row


def _fact(example):
    return example.id.rsplit("-", 2)[1]


def pack(rows, pad, multiple=32):
    """Rows as `tokens` [B, T] and the scored `positions` [B, M] with their `weight`."""
    width = -(-max(len(row) for row in rows) // multiple) * multiple
    batch = {
        "tokens": np.full((len(rows), width), pad, np.int32),
        "positions": np.ones((len(rows), SCORED), np.int32),
        "weight": np.zeros((len(rows), SCORED), np.float32),
    }
    for i, row in enumerate(rows):
        scored = [j for j, (_, weight) in enumerate(row) if weight][:SCORED]
        batch["tokens"][i, : len(row)] = [token for token, _ in row]
        batch["positions"][i, : len(scored)] = scored
        batch["weight"][i, : len(scored)] = [row[j][1] for j in scored]
    return batch
