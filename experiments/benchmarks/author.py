"""The share of a generator's replies about real texts that follow the format of label-free fine-tuning.

    python -m experiments.benchmarks.author --generator=smollm2 --data=squad
    python -m experiments.benchmarks.author --generator=FOLDER --prompts=instruct --texts=200

The generator rates a sample of the texts that a set's test questions are about, writes a question with
its answer about each (also about texts that it rates low), and rates these. For every kind of prompts
a line of JSON has the counts of each step, by the reason why replies were dropped, and the share of
answers that stand in their text word for word. The replies are in the files of the steps below --to, to
be read.
"""

import json
import pathlib
import tempfile
import time

from absl import app, flags

_GENERATOR = flags.DEFINE_string("generator", "builtin:citing", "name, folder or file of a decoder")
_DATA = flags.DEFINE_string("data", "squad", "a named set, or a folder in the same schema")
_TEXTS = flags.DEFINE_integer("texts", 50, "number of texts, a random sample", lower_bound=1)
_TOKENS = flags.DEFINE_integer("text_tokens", 256, "longer texts are left out", lower_bound=8)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the sample")
_PROMPTS = flags.DEFINE_multi_string(
    "prompts", [], "compact, instruct, short, examples or a JSON file; default: all but compact"
)
_TO = flags.DEFINE_string("to", "", "folder of the replies; by default a temporary one")


def main(argv):
    del argv
    import jax

    from fedrag_jax.data import datasets
    from fedrag_jax.data.examples import reading_text, sample
    from fedrag_jax.evaluation.metrics import substring_match
    from fedrag_jax.generation.author import LocalAuthor
    from fedrag_jax.label_free import pipeline, prompts
    from fedrag_jax.models import hub

    author = LocalAuthor(hub.given(_GENERATOR.value, "generator", "decoder"))
    dataset, tokenizer = datasets.load(_DATA.value), author.model.tokenizer
    golds = {i for example in dataset.test for i in example.positive_ids}
    short = [
        passage
        for passage in dataset.passages
        if passage.id in golds and len(tokenizer(reading_text(passage)).input_ids) <= _TOKENS.value
    ]
    texts = sample(short, _TEXTS.value, _SEED.value)
    read = {passage.id: reading_text(passage) for passage in texts}
    for kind in _PROMPTS.value or ["instruct", "short", "examples"]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(_TO.value or temporary) / pathlib.Path(kind).stem
            asking = pipeline.Asking(author, prompts.by_name(kind), folder / "replies")
            began = time.perf_counter()
            rated = pipeline.rate_texts(asking, texts, folder)
            asked = pipeline.ask(asking, texts, folder)
            judged = pipeline.rate_questions(asking, asked.kept.values(), texts, folder)
            quoted = [
                substring_match(read[e.positive_ids[0]], [e.answer]) for e in asked.kept.values()
            ]
            told = {
                "prompts": kind,
                "texts": len(texts),
                "texts_rated": rated.counts,
                "questions": asked.counts,
                "questions_rated": judged.counts,
                "answers_in_text": round(sum(quoted) / max(len(quoted), 1), 2),
                "seconds": round(time.perf_counter() - began),
                "device": jax.devices()[0].device_kind,
            }
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    app.run(main)
