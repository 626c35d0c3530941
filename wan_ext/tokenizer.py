"""umT5's tokenizer: a prompt, cleaned as in training, to token ids.

The sentencepiece model is read directly (a file, or the bytes that ComfyUI puts into its checkpoints), or a
tokenizer.json through `tokenizers`; both give the same ids.

Source: Wan-Video/Wan2.2 `wan/modules/tokenizers.py` for the cleaning.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path

import ftfy
import sentencepiece
import tokenizers

from core.errors import InputError
from core.hub import resolve

FILES = ("spiece.model", "tokenizer.json", "tokenizer.model")
EOS = "</s>"


class Tokenizer:
    """Prompts to token ids that end with the end-of-sentence token."""

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        *,
        vocab_size: int,
        eos_id: int,
        source: str,
        sentencepiece_model: bytes | None = None,
    ):
        """Most callers want `from_file` or `from_bytes`.

        Args:
            encode: text to ids, without special tokens.
            vocab_size: number of ids.
            eos_id: appended to every prompt.
            source: where it comes from, for messages.
            sentencepiece_model: the content of the file, if it was one of sentencepiece.
        """
        self._encode = encode
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.source = source
        self.sentencepiece_model = sentencepiece_model

    @classmethod
    def from_file(cls, path: Path | str) -> Tokenizer:
        """Read spiece.model or tokenizer.json, or the folder that holds one.

        Raises:
            InputError: nothing is there, or it is neither of the two.
        """
        path = resolve(path, patterns=FILES)
        if path.is_dir():
            found = tokenizer_in(path)
            if found is None:
                raise InputError(f"{path}: expected {' or '.join(FILES)} in this folder, found neither")
            path = found
        if not path.is_file():
            raise InputError(f"{path}: expected a tokenizer ({' or '.join(FILES)}), found nothing; check --tokenizer")
        if path.suffix != ".json":
            return cls.from_bytes(path.read_bytes(), source=str(path))
        try:
            model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path}: expected a tokenizer.json, found something else ({error})") from None
        eos_id = model.token_to_id(EOS)
        if eos_id is None:
            raise InputError(f"{path}: expected umT5's tokenizer, found one without {EOS}")
        return cls(
            lambda text: model.encode(text, add_special_tokens=False).ids,
            vocab_size=model.get_vocab_size(),
            eos_id=eos_id,
            source=str(path),
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str) -> Tokenizer:
        """From the content of a sentencepiece model file.

        Args:
            data: the file's bytes.
            source: where they come from, for messages.

        Raises:
            InputError: they are not a sentencepiece model.
        """
        model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(data)
        except RuntimeError:
            raise InputError(f"{source}: expected a sentencepiece model, found {len(data)} other bytes") from None
        return cls(
            model.EncodeAsIds,
            vocab_size=model.GetPieceSize(),
            eos_id=model.eos_id(),
            source=source,
            sentencepiece_model=data,
        )

    def __call__(self, prompt: str, *, max_length: int) -> list[int]:
        """Clean a prompt and turn it into at most `max_length` ids, the last of which is the end of the sentence."""
        return [*self._encode(clean_prompt(prompt))[: max_length - 1], self.eos_id]


def clean_prompt(text: str) -> str:
    """Mend mangled characters, resolve HTML entities (twice), and make all white space single blanks."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def tokenizer_in(folder: Path) -> Path | None:
    """The tokenizer file in a folder, or None."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)
