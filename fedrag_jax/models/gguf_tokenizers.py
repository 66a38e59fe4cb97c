"""Builds the tokenizer that a GGUF file describes: vocabulary, merges or scores, special tokens,
template.

transformers can also read it, but only with PyTorch. A file names but does not contain the text
splitting before merges and the normalisation; these come from the models' original tokenizers.
"""

import pathlib
from typing import Any

from fedrag_jax.errors import CheckpointError

_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _REST
# tokenizer.ggml.pre: what splits a text; "" is GPT-2's own pattern.
_SPLITS = {
    "gpt-2": "", "smollm": "", "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3, "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
}  # fmt: skip
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def read_tokenizer(metadata: dict[str, Any], path: pathlib.Path):
    """Returns a Hugging Face tokenizer.

    Args:
      metadata: the metadata of the file.
      path: the file, for messages.

    Raises:
      CheckpointError: an unsupported kind of tokenizer or text splitting; a missing or inconsistent
        list.
    """
    import transformers  # here, because it takes seconds
    from tokenizers import processors

    told = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}
    try:
        kind, tokens = told["model"], told["tokens"]
        kinds = told.get("token_type", [1] * len(tokens))
        if len(kinds) != len(tokens):
            raise CheckpointError(f"{path}: {len(tokens)} tokens, {len(kinds)} token types")
        if kind not in ("gpt2", "llama"):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.model {kind!r} is not supported; supported: 'gpt2', 'llama'"
            )
        gemma = metadata.get("general.architecture") == "gemma3"
        read = _byte_level if kind == "gpt2" else _gemma if gemma else _sentencepiece
        tokens, backend = read(told, path)
        names = {n: tokens[told[key]] for n, key in _SPECIAL.items() if key in told}
    except KeyError as error:
        raise CheckpointError(f"{path} does not say tokenizer.ggml.{error.args[0]}") from error
    except CheckpointError:
        raise
    except (TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: its tokenizer is malformed ({error})") from error
    except IndexError as error:
        raise CheckpointError(
            f"{path}: a special token is beyond the {len(tokens)} tokens"
        ) from error
    _add(backend, tokens, kinds)
    llama3 = _SPLITS.get(told.get("pre")) is _LLAMA3
    first = _around(told, "bos_token", names, kind == "llama" or llama3)
    last = _around(told, "eos_token", names, False)
    if first or last:
        single = [*first, "$A", *last]
        backend.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, *(f"{part}:1" if part != "$A" else "$B:1" for part in single)],
            special_tokens=[(token, tokens.index(token)) for token in {*first, *last}],
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _byte_level(told, path):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = told.get("pre")
    if split not in _SPLITS:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre {split!r} is not supported; supported: {sorted(_SPLITS)}"
        )
    vocabulary = _vocabulary(told["tokens"], path)
    merges = [tuple(merge.split(" ", 1)) for merge in told["merges"]]
    unknown = [merge for merge in merges if len(merge) != 2 or "".join(merge) not in vocabulary]
    if unknown:
        raise CheckpointError(f"{path}: merge {unknown[0]} makes no token of the vocabulary")
    # Llama 3 takes a word that is a token whole, whatever its merges.
    whole = _SPLITS[split] is _LLAMA3
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole))
    pattern = _SPLITS[split]
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    steps += [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.normalizer = normalizers.NFC() if pattern is _QWEN2 else None
    backend.decoder = decoders.ByteLevel()
    return told["tokens"], backend


def _sentencepiece(told, path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = told["tokens"]
    prefix = told.get("add_space_prefix", True)
    backend = Tokenizer(models.BPE(*_merged(tokens, told["scores"], path), **_FALLBACK))
    scheme = "first" if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([*_decoded(), *strip])
    return tokens, backend


def _gemma(told, path):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    # A file has runs of spaces as they are, and merges in the order of the vocabulary, not by score.
    tokens = ["▁" * len(t) if t and not t.strip(" ") else t for t in told["tokens"]]
    order = [-i for i in range(len(tokens))]
    unknown = tokens[told["unknown_token_id"]]
    backend = Tokenizer(models.BPE(*_merged(tokens, order, path), unk_token=unknown, **_FALLBACK))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(_decoded())
    return tokens, backend


_FALLBACK = {"fuse_unk": True, "byte_fallback": True}


def _decoded() -> list:
    from tokenizers import decoders

    return [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def _merged(tokens: list[str], scores: list[float], path):
    """Returns the vocabulary, and pairs of tokens that merge into a token, the best tokens first."""
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = _vocabulary(tokens, path)
    if len(scores) != len(tokens):
        raise CheckpointError(f"{path}: {len(tokens)} tokens, {len(scores)} scores")
    return vocabulary, generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)))


def _vocabulary(tokens: list[str], path) -> dict[str, int]:
    if len({*tokens}) < len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise CheckpointError(f"{path} has the token {twice!r} twice")
    return {token: i for i, token in enumerate(tokens)}


def _add(backend, tokens, kinds) -> None:
    """Adds tokens that are recognised in a text before it is split."""
    from tokenizers import AddedToken

    def of(kind, special):
        return [
            AddedToken(token, normalized=False, special=special)
            for token, one in zip(tokens, kinds, strict=True)
            if one == kind
        ]

    backend.add_special_tokens(of(_CONTROL, True))
    backend.add_tokens(of(_USER_DEFINED, False))


def _around(told, name: str, names: dict[str, str], default: bool) -> list[str]:
    """The special tokens at one end of every text."""
    return [names[name]] if told.get(f"add_{name}", default) and name in names else []
