"""GGUF files that are damaged, forged or of models we do not know are refused by name."""

import struct
import tracemalloc

import pytest
from gguf_folders import folders_below

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models import hub

gguf = pytest.importorskip("gguf", reason="the library gguf is absent")
gguf_writer = pytest.importorskip("gguf_writer")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return folders_below(tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.expert_count": 8}, r"\['llama.expert_count'\] are not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "rope type 'yarn' is not supported"),
        ({"llama.attention.value_length": 32}, "value_length 32 is not the 64"),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count 32 is not the 64"),
        ({"llama.final_logit_softcapping": 30}, "final_logit_softcapping 30 is not supported"),
        ({"llama.block_count": 10**9}, "impossible sizes: .*1000000000"),
        ({"llama.attention.head_count": 0}, "impossible sizes"),
        ({"llama.embedding_length": "wide"}, "impossible sizes"),
        ({"tokenizer.ggml.merges": [1, 2]}, "its tokenizer is malformed"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"tokenizer.ggml.model": "bert"}, "model 'bert' is not supported"),
        ({"tokenizer.ggml.pre": "new"}, "pre 'new' is not supported; supported: .*'smollm'"),
        ({"tokenizer.ggml.merges": ["no token"]}, "makes no token"),
        ({"tokenizer.ggml.eos_token_id": 99999}, "special token is beyond the 512 tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"] * 256}, "has the token 'a' twice"),
        ({"tokenizer.ggml.tokens": ["a"]}, "1 tokens, 512 token types"),
        ({"general.alignment": 24}, "power of two, got 24"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(changes, words, folders, tmp_path):
    gguf_writer.write(folders("llama"), tmp_path / "model.gguf", **changes)
    with pytest.raises(CheckpointError, match=words):
        hub.load(tmp_path / "model.gguf")


def test_an_architecture_without_a_family_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'mamba' is not supported; supported: .*'gemma3'"):
        hub.load(tmp_path / "model.gguf")


def test_a_file_cut_anywhere_is_refused_and_takes_no_memory(folders, tmp_path):
    gguf_writer.write(folders("llama"), tmp_path / "whole.gguf", "Q8_0")
    whole, file = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "cut.gguf"
    for size in (0, 3, 7, 30, 500, 5000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            hub.load(file)


def header(*values: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values)) + b"".join(values)


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")


def tensor(name: str, shape, kind: int, offset: int) -> bytes:
    size = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + size + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(text("tokens") + struct.pack("<IIQ", 9, 8, 10**9)), "has 1000000000 entries"),
        (header(text("scores") + struct.pack("<IIQ", 9, 6, 4 * 10**6)), "16000000 bytes long"),
        (header(struct.pack("<Q", 2**63)), "a name at byte 32 is 9223372036854775808 bytes long"),
        (header(text("x") + struct.pack("<IIQ", 9, 9, 3)), "x is a value of type 9"),
        (header(ARCHITECTURE, ARCHITECTURE), "has general.architecture twice"),
        (header(text("a") + struct.pack("<I", 77)), "a is a value of type 77"),
        (header(tensors=10**12), "a number at byte 24"),
        (header(tensors=1) + tensor("w", (2**40, 2**40), 0, 0), "it is truncated"),
        (header(tensors=1) + tensor("w", (4, 0), 0, 0), r"tensor w has shape \(0, 4\)"),
        (header(tensors=1) + tensor("w", (4,) * 9, 0, 0), "tensor w has 9 dimensions"),
        (header(tensors=1) + tensor("w", (4,), 999, 0), "is of type 999"),
        (header(tensors=1) + tensor("w", (33,), 8, 0), "rows of 33, no multiple of the 32"),
        (
            header(tensors=2) + tensor("a", (8,), 0, 0) + tensor("b", (8,), 0, 16) + bytes(99),
            "tensors a and b overlap",
        ),
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3), "another byte order"),
        (b"PK\3\4" + bytes(60), "is not a GGUF file"),
    ],
)
def test_a_forged_file_is_refused_and_takes_no_memory(content, words, tmp_path):
    file = tmp_path / "forged.gguf"
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=words):
            hub.load(file)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_tensor_that_is_missing_or_of_another_model_is_named(folders, tmp_path):
    gguf_writer.write(folders("qwen3"), tmp_path / "model.gguf", **{"qwen3.block_count": 3})
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.2\."):
        hub.load(tmp_path / "model.gguf")
    gguf_writer.write(folders("qwen3"), tmp_path / "model.gguf", **{"qwen3.block_count": 1})
    with pytest.raises(CheckpointError, match=r"tensors \['blk\.1\..* are not part of a qwen3"):
        hub.load(tmp_path / "model.gguf")
