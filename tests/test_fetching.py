"""Models of the Hugging Face hub: fetched with all that a generator needs, or refused in one line."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from fedrag_jax.data.prompts import named_style
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.models import hub

GOLDEN = pathlib.Path(__file__).parent / "golden"
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
# In a process of its own, because the client reads its settings when it is imported.
LOAD = """
import json, sys
from fedrag_jax.errors import CheckpointError
from fedrag_jax.models import hub
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = hub.load(name).tokenizer.chat_template
    except CheckpointError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def checkpoint(folder, **templates):
    """A decoder with chat templates, of which `default` lies where transformers saves it."""
    shutil.copytree(GOLDEN / "llama_tied", folder)
    for name, template in templates.items():
        path = folder / f"additional_chat_templates/{name}.jinja"
        path = folder / "chat_template.jinja" if name == "default" else path
        path.parent.mkdir(exist_ok=True)
        path.write_text(template)
    return folder


def loaded(tmp_path, *names):
    """What `hub.load` makes of models below tmp_path/hub that a server offers."""
    command = [sys.executable, pathlib.Path(__file__).parent / "hub_server.py", tmp_path / "hub"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            environment = os.environ | {
                "HF_ENDPOINT": f"http://127.0.0.1:{int(server.stdout.readline())}",
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
            }
            done = subprocess.run(
                [sys.executable, "-c", LOAD, *names],
                env=environment,
                capture_output=True,
                text=True,
            )
        finally:
            server.terminate()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_chat_templates_come_from_the_hub(tmp_path):
    root = tmp_path / "hub/owner"
    checkpoint(root / "chat", default=CHAT)
    checkpoint(root / "chats", default=CHAT, tool_use="tools")
    (checkpoint(root / "pickled") / "model.safetensors").rename(root / "pickled/pytorch_model.bin")
    chat, chats, pickled = loaded(tmp_path, "owner/chat", "owner/chats", "owner/pickled").values()
    assert chat == CHAT and chats == {"default": CHAT, "tool_use": "tools"}
    assert "has no model.safetensors, and pickled weights (pytorch_model.bin) are never" in pickled


@pytest.mark.slow  # because the client tries again and again
def test_a_connection_that_breaks_off_is_told_in_a_line(tmp_path):
    checkpoint(tmp_path / "hub/owner/broken")
    (told,) = loaded(tmp_path, "owner/broken").values()
    assert "owner/broken is no folder, and cannot be had from the Hugging Face hub (" in told
    assert "peer closed connection" in told and "\n" not in told


def test_templates_lie_in_files_of_their_own(tmp_path):
    folder = checkpoint(tmp_path / "chats", default=CHAT, tool_use="tools")
    style = named_style("chat", hub.load(folder).tokenizer)
    assert style.opening.startswith("<|user|> You are") and "<|assistant|> " in style.question
    hub.save(hub.load(folder), tmp_path / "copy")
    assert named_style("chat", hub.load(tmp_path / "copy").tokenizer) == style


@pytest.mark.parametrize(
    ("templates", "words"),
    [
        (
            {"rag": CHAT, "tool_use": CHAT},
            r"\['rag', 'tool_use'\] none is named 'default'.*use 'in",
        ),
        (
            {"default": "{{ 1 / 0 }}" + CHAT},
            "template fails .ZeroDivisionError: .*; use 'instruct'",
        ),
        ({"default": CHAT + "{{ messages + 1 }}"}, "template fails .TypeError: .*; use 'instruct'"),
        ({"default": "{% if %}"}, "template fails .TemplateSyntaxError: .*; use 'instruct'"),
    ],
)
def test_templates_that_cannot_be_used_are_told(templates, words, tmp_path):
    tokenizer = hub.load(checkpoint(tmp_path / "chat", **templates)).tokenizer
    with pytest.raises(ConfigError, match=words):
        named_style("chat", tokenizer)


@pytest.mark.parametrize("root", [None, {"__version__": "0.2.5"}])
def test_the_old_layout_of_sentence_transformers_is_named(root, tmp_path):
    shutil.copytree(GOLDEN / "bert_mean", tmp_path / "old" / "0_Transformer")
    if root:
        (tmp_path / "old" / "config.json").write_text(json.dumps(root))
    with pytest.raises(CheckpointError, match=r"old layout .* in 0_Transformer: open it with"):
        hub.load(tmp_path / "old")
