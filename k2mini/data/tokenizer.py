"""SentencePiece tokenizers (Kudo and Richardson 2018), as LLaMA's `tokenizer.model` is one."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import sentencepiece

from k2mini.files import MOST


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for each byte that is not UTF-8, as SentencePiece does; Python's own "replace" merges some."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("k2mini.replace", _replace_each_byte)


class Tokenizer:
    """Text to token ids and back.

    Ids of BOS and EOS come from the SentencePiece model and from nowhere else. Neither is ever added unless asked.

    Args:
        path: a `tokenizer.model` file.

    Raises ValueError where the file is missing or not a SentencePiece model, or has no BOS or EOS.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no tokenizer file {path}")
        if not 0 < (size := self.path.stat().st_size) <= MOST:
            raise ValueError(f"{path} is not a SentencePiece model: it has {size:,} bytes")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.path.read_bytes())
            first = "".join(self._model.encode("a", out_type=str))
        except (RuntimeError, UnicodeDecodeError):  # the words of an error may have bytes of the file
            raise ValueError(f"{path} is not a SentencePiece model, or is damaged") from None
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        special = (self.bos_id, self.eos_id, self.unk_id)
        if not all(0 <= token < self.vocab_size for token in special):
            raise ValueError(f"{path} has no BOS, no EOS or no unknown token (ids {special})")
        # LLaMA's model puts a space before the text; SmolLM2's, for one, does not.
        self.adds_space: bool = first.startswith("▁")

    @property
    def special_tokens(self) -> dict[str, int]:
        """Control pieces and their ids."""
        return {self.piece(t): t for t in range(self.vocab_size) if self.kind(t) == "control"}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return (self.eos_id,)

    def encode(self, text: str, *, bos: bool, eos: bool, special: bool = False) -> list[int]:
        """Token ids. Control symbols written out in the text ('<s>') are plain text, never control tokens.

        Raises ValueError where the text has half of a surrogate pair, as bytes that are not UTF-8 become.
        """
        if special:
            known = self.special_tokens
            parts = re.split("(" + "|".join(map(re.escape, known)) + ")", text)
            each = [[known[p]] if p in known else self.encode(p, bos=False, eos=False) for p in parts if p]
            return [self.bos_id] * bos + [i for e in each for i in e] + [self.eos_id] * eos
        try:
            ids: list[int] = self._model.encode(text, out_type=int)
        except (RuntimeError, UnicodeError):
            if half := re.search("[\ud800-\udfff]", text):
                shown = text[max(0, half.start() - 20) : half.end()]
                raise ValueError(f"the text is not UTF-8 (at the end of {shown!r})") from None
            raise
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_more(self, text: str) -> list[int]:
        """Token ids of text that goes on after other text: without the space that LLaMA's model puts before a text."""
        before = self.encode("\n", bos=False, eos=False) if self.adds_space else []
        return self.encode("\n" * bool(before) + text, bos=False, eos=False)[len(before) :]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole sequence. Control tokens give nothing; bytes that are not UTF-8 give U+FFFD."""
        ids = list(ids)
        stream = self.stream()
        text = "".join(stream.push(token) for token in ids) + stream.flush()
        first = next((token for token in ids if self.piece_bytes(token)), None)
        added = self.adds_space and first is not None and self.piece(first).startswith("▁")
        return text[1:] if added else text

    def stream(self) -> StreamDecoder:
        """A decoder for the tokens of a continuation, one at a time."""
        return StreamDecoder(self)

    def piece(self, token: int) -> str:
        """The piece as it stands in the vocabulary: '▁rock', '<0x0A>', '<s>'."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside the tokenizer's vocabulary of {self.vocab_size}")
        try:
            return self._model.id_to_piece(token)
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} is damaged: its token {token} is not UTF-8") from None

    def piece_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; a multi-byte character may be spread over several tokens."""
        piece = self.piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        if self._model.is_control(token) or self._model.is_unused(token):
            return b""
        if self._model.is_unknown(token):
            return " ⁇ ".encode()
        return piece.replace("▁", " ").encode()

    def kind(self, token: int) -> str:
        """'normal', 'unknown', 'control', 'unused' or 'byte'."""
        for kind in ("unknown", "control", "unused", "byte"):
            if getattr(self._model, f"is_{kind}")(token):
                return kind
        return "normal"

    def score(self, token: int) -> float:
        """The piece's score, by which SentencePiece chooses what to merge."""
        return float(self._model.get_score(token))

    @property
    def unk_id(self) -> int:
        """The id that unknown text gets."""
        return int(self._model.unk_id())

    def hf_config(self) -> dict[str, Any]:
        """The content of a tokenizer_config.json with which transformers' LlamaTokenizer gives the same ids."""
        return {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": self.adds_space,
            "bos_token": self.piece(self.bos_id),
            "eos_token": self.piece(self.eos_id),
            "unk_token": self.piece(self.unk_id),
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 10**30,
        }


class StreamDecoder:
    """Text as tokens come: never half a UTF-8 character, and no leading space lost.

    The concatenation of all that `push` and `flush` return is the text of the whole continuation.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="k2mini.replace")

    def push(self, token: int) -> str:
        """The text that this token completes; '' while a character is still open."""
        return self._utf8.decode(self._tokenizer.piece_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for each byte of a character that was never completed."""
        return self._utf8.decode(b"", final=True)


class TextStream:
    """The text of one continuation, token by token, which ends before the first of the stop strings.

    Text that may be the beginning of a stop string is held back until more tokens decide.

    Args:
        stop: strings; one may begin in one token and end in another.

    Attributes:
        text: all that was given out so far.
        stopped: whether a stop string has come.

    Raises ValueError where a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise ValueError("a stop string is empty")
        self._stream, self._stop = tokenizer.stream(), tuple(stop)
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """Take one more token. Returns the text that is certain now to be part of the answer."""
        return "" if self.stopped else self._give(self._held + self._stream.push(token))

    def write(self, token: int, out: TextIO) -> bool:
        """Print what `push` returns, at once. Returns whether a stop string has come."""
        out.write(self.push(token))
        out.flush()
        return self.stopped

    def flush(self) -> str:
        """The text held back, once no more tokens come."""
        if self.stopped:
            return ""
        out = self._give(self._held + self._stream.flush())
        held, self._held = self._held, ""
        self.text += held
        return out + held

    def _give(self, text: str) -> str:
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            out = text[: min(places)]
        else:
            kept = max((_overlap(text, stop) for stop in self._stop), default=0)
            out, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
