"""Copies of the hub's repositories, in the hub's own columns, written and opened by `datasets`."""

import datasets

PAGE = {"title": ["Ada Lovelace", "Byron", "London"],
        "sentences": [["Ada was born", " in London."], ["Byron wrote."], ["A city."]]}  # fmt: skip


def hotpot(number, **fields):
    """A row of HotpotQA, and of 2WikiMultihopQA, which has its columns."""
    return {
        "id": f"h{number}",
        "question": f"Where was the daughter of poet {number} born?",
        "answer": "London",
        "supporting_facts": {"title": ["Byron", "Ada Lovelace"], "sent_id": [0, 0]},
        "context": PAGE,
    } | fields


def squad(number, title="Some_Article"):
    """A row of SQuAD; two questions share a paragraph."""
    text = f"Paragraph {number // 2} says {number // 2}."
    answers = {"text": [str(number // 2)], "answer_start": [15]}
    about = {"id": f"s{number}", "title": title, "context": text}
    return about | {"question": f" What of {number}?", "answers": answers}


def musique(number):
    """A row of MuSiQue."""
    paragraphs = [
        {"idx": i, "title": title, "paragraph_text": f"{title} {number}.", "is_supporting": i > 0}
        for i, title in enumerate(("Noise", "First", "Second"))
    ]
    return {
        "id": f"2hop__{number}_7",
        "paragraphs": paragraphs,
        "question": f"Which {number}?",
        "question_decomposition": [],
        "answer": "Second",
        "answer_aliases": ["2nd"],
        "answerable": True,
    }


def trivia(number):
    """A row of TriviaQA, rc.wikipedia."""
    pages = {"title": ["Sinclair Lewis"], "wiki_context": ["Long. " * 30 + "Sinclair Lewis won."]}
    pages |= {"doc_source": ["TagMe"], "filename": ["Sinclair_Lewis.txt"]}
    answer = {"value": "Sinclair Lewis", "aliases": ["Harry Sinclair Lewis"]}
    return {
        "question": f"Who {number}?",
        "question_id": f"tc_{number}",
        "entity_pages": pages,
        "answer": answer,
    }


def popqa(number):
    """A row of PopQA."""
    return {
        "id": number,
        "subj": "George",
        "prop": ("occupation", "religion")[number % 2],
        "s_wiki_title": "George Rankin",
        "question": f"What is George's occupation {number}?",
        "possible_answers": '["politician"]',
    }


def pubmed(pubid):
    """A row of PubMedQA; one of the official test ids is 21645374."""
    return {
        "pubid": pubid,
        "question": "Do mitochondria?",
        "context": {"contexts": [f"Cells {pubid}."], "labels": ["B"]},
        "long_answer": "Yes.",
        "final_decision": "yes",
    }


def boolq(number):
    """A row of BoolQ."""
    return {
        "question": f"is {number} even",
        "answer": number % 2 == 0,
        "passage": f"{number} is a number.",
    }


def nq(number):
    """A row of Natural Questions, open."""
    return {"question": f"when was {number}", "answer": ["1972"]}


TRAIN, TEST = range(40), range(40, 50)
REPOSITORIES = {  # (repository, configuration): split: rows
    ("hotpotqa/hotpot_qa", ""): {
        "train": [hotpot(i) for i in TRAIN], "validation": [hotpot(i) for i in TEST]
    },
    ("framolfese/2WikiMultihopQA", ""): {
        "train": [hotpot(i) for i in TRAIN], "validation": [hotpot(i) for i in TEST]
    },
    ("rajpurkar/squad", ""): {
        "train": [squad(i, f"Article_{i // 4}") for i in TRAIN],
        "validation": [squad(i, "Other") for i in TEST],
    },
    ("dgslibisey/MuSiQue", ""): {
        "train": [musique(i) for i in TRAIN], "validation": [musique(i) for i in TEST]
    },
    ("mandarjoshi/trivia_qa", ""): {
        "train": [trivia(i) for i in TRAIN], "validation": [trivia(i) for i in TEST]
    },
    ("akariasai/PopQA", ""): {"test": [popqa(i) for i in TRAIN]},
    ("qiaojin/PubMedQA", ""): {"train": [pubmed(i) for i in (*TRAIN, 21645374)]},
    ("google/boolq", ""): {
        "train": [boolq(i) for i in TRAIN], "validation": [boolq(i) for i in TEST]
    },
    ("google-research-datasets/nq_open", ""): {
        "train": [nq(i) for i in TRAIN], "validation": [nq(i) for i in TEST]
    },
} | {
    ("google/xquad", f"xquad.{language}"): {
        "validation": [
            {"id": f"x{i}", "context": f"{language} {i}.", "question": "?",
             "answers": {"text": [str(i)], "answer_start": [3]}}
            for i in TRAIN
        ]
    }
    for language in ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
}  # fmt: skip


def write(root):
    """All of them below a folder, each a folder of Parquet files, with the hub's README where a
    repository has configurations."""
    datasets.disable_progress_bars()
    readmes = {}
    for (repo, config), tables in REPOSITORIES.items():
        for split, rows in tables.items():
            path = root / repo / config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(path)
            if config:
                entry = (
                    f"- config_name: {config}\n  data_files:\n  - split: {split}\n"
                    f"    path: {config}/{split}.parquet\n"
                )
                readmes.setdefault(repo, []).append(entry)
    for repo, entries in readmes.items():
        (root / repo / "README.md").write_text("---\nconfigs:\n" + "".join(entries) + "---\n")
