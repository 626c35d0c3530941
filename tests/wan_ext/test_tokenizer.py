"""Laws of the tokenizer: every source the same ids, prompts cleaned and cut as in training, no network or protobuf."""

from __future__ import annotations

import subprocess
import sys

import pytest

from core.errors import InputError
from tests.wan_ext.encoders import SENTENCES, spiece_bytes, write_tokenizer_json
from wan_ext.tokenizer import Tokenizer, clean_prompt


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "spiece.model").write_bytes(spiece_bytes())
    (tmp_path / "json").mkdir()
    write_tokenizer_json(tmp_path / "json" / "tokenizer.json", data=spiece_bytes())
    return tmp_path


def test_every_source_gives_the_same_ids(folder):
    sources = [
        Tokenizer.from_bytes(spiece_bytes(), source="bytes"),
        Tokenizer.from_file(folder / "spiece.model"),
        Tokenizer.from_file(folder),
        Tokenizer.from_file(folder / "json" / "tokenizer.json"),
        Tokenizer.from_file(folder / "json"),
    ]
    for prompt in (*SENTENCES[:5], "a chair seen from above", ""):
        ids = [tokenizer(prompt, max_length=64) for tokenizer in sources]
        assert all(other == ids[0] for other in ids)
        assert ids[0][-1] == 1
    assert all(tokenizer.vocab_size == 48 for tokenizer in sources)


def test_a_long_prompt_is_cut_and_keeps_its_end(folder):
    tokenizer = Tokenizer.from_file(folder)
    whole = tokenizer(SENTENCES[2], max_length=64)
    assert tokenizer(SENTENCES[2], max_length=6) == [*whole[:5], 1]
    assert tokenizer(SENTENCES[2], max_length=len(whole)) == whole


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a  ball\n\ton a   floor ", "a ball on a floor"),
        ("salt &amp;amp; pepper &lt;3", "salt & pepper <3"),
        ("x < y &amp;amp; z", "x < y & z"),  # ftfy leaves entities alone beside a literal <
        ("donâ€™t blur", "don't blur"),
    ],
)
def test_prompts_are_cleaned(raw, clean):
    assert clean_prompt(raw) == clean


def test_protobuf_is_not_needed(folder):
    program = (
        "import sys; sys.modules['google.protobuf'] = None; from wan_ext.tokenizer import Tokenizer; "
        f"print(Tokenizer.from_file({str(folder)!r})('a red ball', max_length=9)[-1])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "1"


def test_what_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"<html>not found</html>")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "spiece.model", "expected a sentencepiece model"),
        (tmp_path / "tokenizer.json", "expected a tokenizer.json"),
        (tmp_path / "empty", "found neither"),
        (tmp_path / "nowhere", "found nothing"),
    ):
        with pytest.raises(InputError, match=message) as error:
            Tokenizer.from_file(path)
        assert str(path) in str(error.value)


def test_the_hub_is_asked_only_when_the_path_says_so(folder, monkeypatch):
    asked = []

    def snapshot_download(repository, *, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InputError, match="found nothing"):
        Tokenizer.from_file("google/umt5-xxl")  # looks like a hub id, and is a path
    assert asked == []
    assert Tokenizer.from_file("hub:google/umt5-xxl").vocab_size == 48
    assert asked == [("google/umt5-xxl", ["spiece.model", "tokenizer.json", "tokenizer.model"])]
