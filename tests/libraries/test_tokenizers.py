# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the package uses of tokenizers beyond its documentation; a new minor may change it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from embedding_server.engine.tokenizer import is_panic


def test_a_panic_is_named_panic_exception() -> None:
    """PyO3 makes the class at run time, so that no module exports it."""
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[CLS]": 1}))
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    content = json.loads(raw.to_str())
    content["post_processor"]["special_tokens"].clear()
    broken = tokenizers.Tokenizer.from_str(json.dumps(content))
    with pytest.raises(BaseException) as caught:
        broken.encode_batch_fast(["a"])
    assert not isinstance(caught.value, Exception)
    assert is_panic(caught.value)


def test_a_part_has_the_same_json_without_a_vocabulary() -> None:
    """From which it is known where a text can be cut."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(use_regex=False)])
    assert json.loads(raw.to_str())["pre_tokenizer"] == {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": False,
            }
        ],
    }


PROGRAM = """
import os, tokenizers
tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
before = len(os.listdir("/proc/self/task"))
tokenizer.encode_batch_fast(["a b"] * 64)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize(("parallelism", "more"), [("false", False), ("true", True)])
def test_the_command_line_s_variable_stops_its_threads(parallelism: str, more: bool) -> None:
    env = {**os.environ, "TOKENIZERS_PARALLELISM": parallelism}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) > 0) == more


def test_a_library_leaves_the_variable_alone() -> None:
    program = (
        "import os, embedding_server.engine.tokenizer, tokenizers\n"
        "raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}, unk_token='a'))\n"
        "embedding_server.engine.tokenizer.Tokenizer(raw, max_tokens=9).encode(['a', 'b'])\n"
        "print(os.environ.get('TOKENIZERS_PARALLELISM'))"
    )
    env = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "None"
