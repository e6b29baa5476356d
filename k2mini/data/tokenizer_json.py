"""`tokenizer.json`, through Hugging Face's `tokenizers` (extra): byte-level BPE (Radford et al. 2019), as LLaMA-3 and
Qwen have it, and what SentencePiece models are converted to."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Set
from pathlib import Path
from typing import Any

from k2mini.errors import need_extra, short
from k2mini.files import parse_json, read_json, read_text
from k2mini.model_config import read_fields


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte, of GPT-2's `bytes_to_unicode`: what can't be seen stands for itself from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTES = _byte_alphabet()
MOST_TOKENS = 2**24  # more are a damaged file's


class JsonModel:
    """What `tokenizer.json` says, and of BOS and EOS the files beside it.

    BOS is one only where the model was trained with it in front of every text: the file's own post-processor says so,
    which is not used for anything else.

    Raises ValueError where the extra is not installed, the file is damaged or of a kind that can't be decoded token by
    token, or no EOS is named.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise need_extra("tokenizers") from None
        self._path = path
        self._config = self._beside("tokenizer_config.json")
        content = parse_json(text := read_text(path), str(path))
        try:
            self._model = Tokenizer.from_str(text)
            self._model.no_truncation()
            self._model.no_padding()
            self._added = self._model.get_added_tokens_decoder()
            self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
            if self.vocab_size > MOST_TOKENS:
                raise ValueError(f"an id is {self.vocab_size - 1:,}")
            first = self._model.encode("a").ids[:1]
        except BaseException as error:  # a panic in Rust is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{path} is not a tokenizer.json, or is damaged ({short(str(error))})") from None
        decoders = re.findall(r'"type": "(\w+)"', json.dumps(content.get("decoder")))
        self._byte_level = "ByteLevel" in decoders
        if not self._byte_level and not {"Metaspace", "ByteFallback"} & set(decoders):
            raise ValueError(f"{path} is neither byte-level BPE nor SentencePiece's: its decoder is {decoders}")
        # Each byte that is not UTF-8 gives U+FFFD, as in SentencePiece; tokenizers loses those beside it, too.
        self.space, self.errors = ("Ġ", "replace") if self._byte_level else ("▁", "k2mini.replace")
        self._byte_fallback = bool(content["model"].get("byte_fallback"))
        self._lock = threading.Lock()
        self.special_tokens = {token.content: id_ for id_, token in self._added.items() if token.special}
        self.added_tokens = {token.content: id_ for id_, token in self._added.items() if not token.special}
        self.unk_id: int | None = self._id(content["model"].get("unk_token"))
        eos_id, bos_id = self._named("eos_token"), self._named("bos_token")
        if eos_id is None:
            raise ValueError(f"no EOS of {path} is named in tokenizer_config.json; copy that file, too")
        self.eos_id: int = eos_id
        self.bos_id = bos_id if first == [bos_id] else None

    def _id(self, token: Any) -> int | None:
        return self._model.token_to_id(token) if isinstance(token, str) else None

    def _beside(self, name: str) -> dict[str, Any]:
        return read_fields(self._path.with_name(name))

    def _named(self, key: str) -> int | None:
        """The id of bos_token or eos_token, by the first file that says what it is, or that there is none."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if key in (fields := self._beside(name)):
                token = fields[key].get("content") if isinstance(fields[key], dict) else fields[key]
                if token is not None and self._id(token) is None:
                    raise ValueError(f"{self._path.with_name(name)}: {key} {short(token)} is no token of {self._path}")
                return self._id(token)
        said = self._beside("config.json").get(f"{key}_id")
        said = said[0] if isinstance(said, list) and said else said
        return said if type(said) is int and 0 <= said < self.vocab_size else None

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids without BOS and EOS; without `special` as transformers' `split_special_tokens=True` gives them."""
        with self._lock:  # the switch is the tokenizer's, not the call's
            self._model.encode_special_tokens = not special
            return self._model.encode(text, add_special_tokens=False).ids

    def ends(self, text: str) -> list[int]:
        """See `Tokenizer.ends`."""
        with self._lock:
            self._model.encode_special_tokens = False
            return [end for _, end in self._model.encode(text, add_special_tokens=False).offsets]

    def piece(self, token: int) -> str:
        """The piece in the vocabulary; ids may be left out of it."""
        piece = self._model.id_to_token(token)
        return piece if piece is not None else f"[PAD{token}]"

    def kind(self, token: int) -> str:
        """'normal', also of an added token that is not special; 'unknown', 'control', 'unused' or 'byte'."""
        if token in self._added:
            return "control" if self._added[token].special else "normal"
        if self._model.id_to_token(token) is None:
            return "unused"
        if self._byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", self.piece(token)):
            return "byte"
        return "unknown" if token == self.unk_id else "normal"

    def text(self, token: int, piece: str) -> bytes:
        """The bytes of a normal piece."""
        if token in self._added:
            return piece.encode()
        if self._byte_level:
            known = all(char in BYTES for char in piece)
            return bytes(BYTES[char] for char in piece) if known else piece.encode()
        return piece.replace("▁", " ").encode()

    def hf_config(self, adds_space: bool) -> dict[str, Any]:
        """tokenizer_config.json as it stands."""
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        own = {key: self.piece(token) for key, token in names.items() if token is not None}
        return self._config or {"tokenizer_class": "PreTrainedTokenizerFast", **own}


def tokens_beyond(path: Path, known: Set[str]) -> list[str]:
    """The tokens of a tokenizer.json that are not `known`. Raises ValueError where it is damaged."""
    content = read_json(path)
    try:
        vocab, added = content["model"]["vocab"], content.get("added_tokens", [])
        pieces = [*vocab] if isinstance(vocab, dict) else [piece for piece, _ in vocab]
        return sorted({*pieces, *(token["content"] for token in added)} - known)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path} is not a tokenizer.json, or is damaged; copy it again, or remove it") from None
