"""Text to token ids and back, by LLaMA's `tokenizer.model`, SentencePiece (Kudo and Richardson 2018), or by JSON."""

from __future__ import annotations

import codecs
import hashlib
import logging
import re
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from k2mini.data.tokenizer_json import JsonModel, tokens_beyond
from k2mini.errors import short, some
from k2mini.files import MOST, sha256
from k2mini.model_config import read_fields

log = logging.getLogger(__name__)
_say_once = cache(log.info)

SPECIAL = ("control", "unknown")  # kinds of SentencePiece's special tokens


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for each byte that is not UTF-8, as SentencePiece does; Python's own "replace" merges some."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("k2mini.replace", _replace_each_byte)


def choose_tokenizer(model: Path, json: Path) -> Path:
    """Of two files the first, unless it lacks tokens of the other; the log says it. Raises ValueError for damage."""
    known = _SentencePiece(model)
    lacking = tokens_beyond(json, {known.piece(token) for token in range(known.vocab_size)})
    taken, why = (json, f"has {some(lacking)} more") if lacking else (model, "has all tokens of the other")
    _say_once(f"{model.parent} has two tokenizers; {taken.name} is taken, for it {why}")
    return taken


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file; what ends an answer is read from the files beside it. Raises ValueError as both do."""
    tokenizer = Tokenizer(path)
    tokenizer.add_stop_ids(read_fields(path.with_name("config.json")))
    return tokenizer


class _SentencePiece:
    """What `tokenizer.model` says; ids of BOS and EOS come from it and from nowhere else."""

    space, errors = "▁", "k2mini.replace"

    def __init__(self, path: Path) -> None:
        self._path = path
        if not 0 < (size := path.stat().st_size) <= MOST:
            raise ValueError(f"{path} is not a SentencePiece model: it has {size:,} bytes")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            self._adds_space = "".join(self._model.encode("a", out_type=str)).startswith("▁")
        except (RuntimeError, UnicodeDecodeError):  # the words of an error may have bytes of the file
            raise ValueError(f"{path} is not a SentencePiece model, or is damaged") from None
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id, self.eos_id, self.unk_id = self._model.bos_id(), self._model.eos_id(), self._model.unk_id()
        special = (self.bos_id, self.eos_id, self.unk_id)
        if not all(0 <= token < self.vocab_size for token in special):
            raise ValueError(f"{path} has no BOS, no EOS or no unknown token (ids {special})")

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        ids = list(range(self.vocab_size))  # asked about all at once: one by one takes a tenth of a second
        said = zip(ids, self._model.is_control(ids), self._model.is_unknown(ids), strict=True)
        return {self.piece(token): token for token, *special in said if any(special)}

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        # User-defined pieces, type 4 in sentencepiece_model.proto, where score and type come after the piece.
        content, found = self._model.serialized_model_proto(), list[int]()
        for rest in re.finditer(rb"(?:\x15.{4})?\x18\x04", content, re.DOTALL):
            end, size = rest.start(), len(rest[0]) + 2
            heads = ((n, bytes([10, n + size, 10, n])) for n in range(1, 128 - size))
            pieces = [content[end - n : end] for n, head in heads if content.endswith(head, 0, end - n)]
            found += [self._model.piece_to_id(piece.decode(errors="replace")) for piece in pieces]
        return {self.piece(token): token for token in found}

    def encode(self, text: str, special: bool) -> list[int]:
        if not special:
            return self._model.encode(text, out_type=int)
        known = self.special_tokens | self.added_tokens
        names = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
        # Each part is encoded by itself, as Meta's code and transformers' tokenizer do where it is `legacy`. There, one
        # that begins with a space gets no second one.
        ids = list[int]()
        for place, part in enumerate(re.split(f"({names})", text)):
            cut = self._adds_space and place > 0 and part.startswith(" ")
            own = self.encode(part[cut:], False) or [self._model.piece_to_id("▁")] * cut
            ids += [known[part]] if part in known else own
        return ids

    def piece(self, token: int) -> str:
        try:
            return self._model.id_to_piece(token)
        except UnicodeDecodeError:
            raise ValueError(f"{self._path} is damaged: its token {token} is not UTF-8") from None

    def kind(self, token: int) -> str:
        for kind in ("unknown", "control", "unused", "byte"):
            if getattr(self._model, f"is_{kind}")(token):
                return kind
        return "normal"

    def text(self, token: int, piece: str) -> bytes:
        return " ⁇ ".encode() if self._model.is_unknown(token) else piece.replace("▁", " ").encode()

    def hf_config(self, adds_space: bool) -> dict[str, Any]:
        """With which transformers' LlamaTokenizer gives the same ids."""
        return {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": adds_space,
            "bos_token": self.piece(self.bos_id),
            "eos_token": self.piece(self.eos_id),
            "unk_token": self.piece(self.unk_id),
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 10**30,
        }


class Tokenizer:
    """Text to token ids and back, from either source; BOS and EOS are never added unless asked.

    Args:
        path: a `tokenizer.model` (SentencePiece), or a `tokenizer.json` with its `tokenizer_config.json` beside it.

    Attributes:
        bos_id: None where the model was trained without BOS, as Qwen was.
        stop_ids: the tokens that end an answer, `eos_id` first.
        adds_space: whether a space is put before the text, as LLaMA's model does and SmolLM2's, for one, does not.

    Raises ValueError where the file is missing, damaged or of another kind, or has no EOS.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no tokenizer file {path}")
        self._model = JsonModel(self.path) if self.path.suffix == ".json" else _SentencePiece(self.path)
        self.vocab_size: int = self._model.vocab_size
        self.bos_id: int | None = self._model.bos_id
        self.eos_id: int = self._model.eos_id
        self.unk_id: int | None = self._model.unk_id
        self.stop_ids: tuple[int, ...] = (self.eos_id,)
        first = self._model.encode("a", False)
        self.adds_space: bool = bool(first) and self.piece(first[0]).startswith(self._model.space)

    def add_stop_ids(self, config: Any) -> None:
        """Let all tokens that generation_config.json, beside the tokenizer, and config.json's fields list end answers.

        Raises ValueError where one of them is no token.
        """
        file = self.path.with_name("generation_config.json")
        for fields, name in ((read_fields(file), file.name), (config, "config.json")):
            said = fields.get("eos_token_id")
            ends: list[Any] = said if isinstance(said, list) else [said] * (said is not None)
            known = [type(token) is int and 0 <= token < self.vocab_size for token in ends]
            if self.path.suffix != ".json" and ends != said:  # LLaMA-1's say 0 or 1, which are control tokens
                ends = [token for token in ends if all(known) and self.kind(token) not in SPECIAL]
            elif not all(known):
                wrong = short(ends[known.index(False)])
                raise ValueError(f"{file.with_name(name)}: eos_token_id {wrong} is no token of {self.path}")
            self.stop_ids = tuple(dict.fromkeys((*self.stop_ids, *ends)))

    def encode(self, text: str, *, bos: bool, eos: bool, special: bool = False) -> list[int]:
        """Token ids; BOS only where the model has one.

        Args:
            special: special tokens written out in the text ('<s>', '<|im_end|>') become themselves; else they are plain
                text, never control tokens.

        Raises ValueError where the text has half of a surrogate pair, as bytes that are not UTF-8 become.
        """
        try:
            ids = self._model.encode(text, special)
        except (RuntimeError, UnicodeError, TypeError):
            if half := re.search("[\ud800-\udfff]", text):
                shown = text[max(0, half.start() - 20) : half.end()]
                raise ValueError(f"the text is not UTF-8 (at the end of {shown!r})") from None
            raise
        before = [self.bos_id] if bos and self.bos_id is not None else []
        return before + ids + [self.eos_id] * eos

    def ends(self, text: str) -> list[int] | None:
        """Where the tokens of `encode(text, special=True)` end, in characters; None where only tokenizer.json says."""
        return self._model.ends(text) if isinstance(self._model, JsonModel) else None

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
        added = self.adds_space and first is not None and self.piece(first).startswith(self._model.space)
        return text[1:] if added else text

    def stream(self) -> StreamDecoder:
        """A decoder for the tokens of a continuation, one at a time."""
        return StreamDecoder(self, self._model.errors)

    def piece(self, token: int) -> str:
        """The piece as it stands in the vocabulary: '▁rock', 'Ġrock', '<0x0A>', '<s>'."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside the tokenizer's vocabulary of {self.vocab_size}")
        return self._model.piece(token)

    def piece_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; a multi-byte character may be spread over several tokens."""
        piece, kind = self.piece(token), self.kind(token)
        if kind == "byte":
            return bytes([int(piece[1:-1], 16)])
        return b"" if kind in ("control", "unused") else self._model.text(token, piece)

    def kind(self, token: int) -> str:
        """'normal', 'unknown', 'control', 'unused' or 'byte'."""
        return self._model.kind(token)

    @property
    def special_tokens(self) -> dict[str, int]:
        """What `encode` recognises with `special`, and the ids."""
        return self._model.special_tokens

    @property
    def added_tokens(self) -> dict[str, int]:
        """What `encode` recognises in any text, though it is not special: some models' role marks."""
        return self._model.added_tokens

    def fingerprint(self) -> str:
        """The SHA-256 of its file; of tokenizer.json with BOS and EOS, which stand in files beside it."""
        own = sha256(self.path)
        said = f"{own} {self.bos_id} {self.eos_id}"
        return hashlib.sha256(said.encode()).hexdigest() if self.path.suffix == ".json" else own

    def hf_config(self) -> dict[str, Any]:
        """The content of a tokenizer_config.json with which transformers gives the same ids."""
        return self._model.hf_config(self.adds_space)


class StreamDecoder:
    """Text as tokens come: never half a UTF-8 character, and no leading space lost.

    The concatenation of all that `push` and `flush` return is the text of the whole continuation.
    """

    def __init__(self, tokenizer: Tokenizer, errors: str) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors=errors)

    def push(self, token: int) -> str:
        """The text that this token completes; '' while a character is still open."""
        return self._utf8.decode(self._tokenizer.piece_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for each byte of a character that was never completed."""
        return self._utf8.decode(b"", final=True)
