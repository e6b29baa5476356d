"""Any causal language model of transformers (extra: reference) as one that `eval` can score: GPT-2, OPT, MPT, …"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from k2mini.build import resolve_dtype
from k2mini.data.prompts import room
from k2mini.data.tokenizer import Tokenizer, open_tokenizer
from k2mini.errors import need_extra, short, some
from k2mini.evaluation.score import OtherConfig, Request, share_prefixes
from k2mini.inference.answers import text_of
from k2mini.inference.decoding import Completion, Decoding
from k2mini.model_config import read_config_json
from k2mini.nn.layers import log_softmax
from k2mini.weights.model_directory import ModelDirectory, tokenizer_file

LENGTHS = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")  # as configurations name the context
MADE = list[TemporaryDirectory[str]]()  # of tokenizers that are read again later, until the program ends


class TransformersModel:
    """A directory's model, as transformers computes it; its weights are loaded when they are first needed.

    Rows are padded on the right, where no causal model sees it. Code that a repository brings is never run.

    Args:
        path: a directory, or an id of the hub.
        dtype: by name; None: as stored on a GPU, float32 on a CPU.

    Raises ValueError where the extra is not installed, transformers does not know the architecture or needs the
    repository's code for it, it is no causal language model, or its context's length is not said.
    """

    def __init__(self, path: str | Path, dtype: str | None = None, device: torch.device | str = "cpu") -> None:
        try:
            import transformers
        except ImportError:
            raise need_extra("reference") from None
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.versions = {"transformers": transformers.__version__}  # for the report
        self._directory, self.device = ModelDirectory(path), torch.device(device)
        self._directory.require_model()
        self.path = self._directory.path
        if (self.path / "adapter_config.json").exists():  # transformers would load it, the fingerprint has it not
            raise ValueError(f"{self.path} has an adapter beside its base; name the folder that `k2mini merge` makes")
        kind = (raw := read_config_json(self.path)).get("model_type")
        if kind not in transformers.CONFIG_MAPPING:
            why = f"model_type {short(kind)} is none that transformers {transformers.__version__} knows"
            code = "; the repository's own code, which auto_map names, is never run" if "auto_map" in raw else ""
            raise ValueError(f"{self.path / 'config.json'}: {why}{code}")
        config = _loaded(transformers.AutoConfig, self.path)
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{self.path / 'config.json'}: transformers has no causal language model of type {kind}")
        self._of_text = config.get_text_config()
        length = next((n for name in LENGTHS if type(n := getattr(self._of_text, name, None)) is int and n > 0), None)
        if length is None:
            raise ValueError(f"{self.path / 'config.json'} does not say how long the context is; add {LENGTHS[0]}")
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        self.dtype: torch.dtype | None = resolve_dtype(dtype, stored, self.device)
        shape = {key: value for key, value in raw.items() if key not in ("_name_or_path", "transformers_version")}
        self.config = OtherConfig(length, {"transformers": shape})

    def fingerprint(self) -> str:
        """See `ModelDirectory.fingerprint`."""
        return self._directory.fingerprint()

    @cache  # noqa: B019 (a model lives as long as its command)
    def require_tokenizer(self) -> Tokenizer:
        """Its tokenizer; of vocab.json and merges.txt, as GPT-2 and OPT have them, what transformers makes of them.

        Raises ValueError where there is none, or it has tokens that the model has not.
        """
        from transformers import AutoTokenizer

        if tokenizer_file(self.path) is not None:
            path = self._directory.require_tokenizer_file()
        elif (self.path / "vocab.json").is_file() and (self.path / "merges.txt").is_file():
            MADE.append(TemporaryDirectory())
            _loaded(AutoTokenizer, self.path).save_pretrained(MADE[-1].name)
            path = Path(MADE[-1].name) / "tokenizer.json"
        else:
            names = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
            raise ValueError(f"{self.path} has no tokenizer ({names}); copy the one the model was trained with")
        tokenizer = open_tokenizer(path)
        tokenizer.add_stop_ids(read_config_json(self.path))
        if tokenizer.vocab_size > (rows := self._of_text.vocab_size):
            sizes = f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {rows:,}"
            raise ValueError(f"{self.path}: {sizes}; this tokenizer belongs to another model")
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM, GenerationConfig

        model, report = _loaded(AutoModelForCausalLM, self.path, dtype=self.dtype, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{self.path} lacks {some(missing)}, which transformers would draw at random")
        model.generation_config = GenerationConfig()  # the directory's own may sample
        return model.to(self.device).eval()

    @cached_property
    def _caches(self) -> bool:
        """Whether what comes before is kept as keys and values alone, and can be gone on from.

        Raises ValueError where the model is not causal.
        """
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        with torch.no_grad():
            pair = self._model(torch.tensor([[0, 1], [0, 2]], device=self.device), use_cache=True)
        first, second = pair.logits[:, 0].float()
        self._finite(first.sum())
        if not torch.allclose(first, second, atol=1e-3):
            raise ValueError(f"{self.path} is not causal: a token's logits depend on those that follow")
        cache = pair.get("past_key_values")
        known = (DynamicLayer, DynamicSlidingWindowLayer)
        return type(cache) is DynamicCache and all(type(layer) in known for layer in cache.layers)

    @torch.no_grad()
    def score(
        self, requests: Sequence[Request], batch_size: int, mine: Callable[[Sequence[int]], bool]
    ) -> Iterator[tuple[int, list[float]]]:
        """See `OtherModel`. What a group's contexts begin with runs once, and so does a context whose options have
        several tokens, where the model keeps keys and values."""
        for places, common in share_prefixes(requests, self._caches):
            letters = [place for place in places if max(map(len, requests[place].options)) == 1]
            batches = [letters[start : start + batch_size] for start in range(0, len(letters), batch_size)]
            batches += [[place] for place in sorted({*places} - {*letters})]
            own, shared = [batch for batch in batches if mine(batch)], None
            if common and own:
                shared = self._run([requests[places[0]].prefix[:common]])[1]
            for batch in own:
                if max(map(len, requests[batch[0]].options)) > 1:
                    yield batch[0], self._long(requests[batch[0]], common, shared)
                    continue
                rows = [requests[place].prefix[common:] for place in batch]
                for place, (row,) in zip(batch, self._last(rows, [1] * len(rows), shared), strict=True):
                    yield place, [self._finite(row[option]) for (option,) in requests[place].options]

    def _long(self, request: Request, common: int, shared: Any) -> list[float]:
        """The options of one request, each of them a row."""
        if self._caches and (whole := len(request.prefix) - 1) > common:
            shared, common = self._run([request.prefix[common:whole]], shared)[1], whole
        rows = [request.prefix[common:] + option[:-1] for option in request.options]
        found = self._last(rows, [len(option) for option in request.options], shared)
        picked = [own[torch.arange(len(own)), list(option)] for own, option in zip(found, request.options, strict=True)]
        return [self._finite(each.sum()) for each in picked]

    def _last(self, rows: Sequence[tuple[int, ...]], scored: list[int], past: Any) -> list[Tensor]:
        """The log-probabilities (T, V) at the last so many tokens of each row."""
        width, starts = max(map(len, rows)), [len(row) - number for row, number in zip(rows, scored, strict=True)]
        logits = self._run(rows, past, width - min(starts))[0]
        cut = width - logits.shape[1]  # positions that have no logits
        return [
            log_softmax(own[start - cut : start - cut + number])
            for own, start, number in zip(logits, starts, scored, strict=True)
        ]

    def _run(self, rows: Sequence[Sequence[int]], past: Any = None, keep: int = 1) -> tuple[Tensor, Any]:
        """The logits (B, T, V) of rows that follow `past`, at the last `keep` positions or more, and the new cache."""
        width = max(map(len, rows))
        tokens, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
        for place, row in enumerate(rows):
            tokens[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
        if past is not None:
            mask = torch.cat([torch.ones(len(rows), past.get_seq_length(), dtype=torch.int64), mask], dim=1)
            past = copy.deepcopy(past)
            past.batch_repeat_interleave(len(rows))
        how = {"past_key_values": past, "use_cache": self._caches, "logits_to_keep": keep}
        out = self._model(tokens.to(self.device), attention_mask=mask.to(self.device), **how)
        return out.logits, out.get("past_key_values")

    def _finite(self, value: Tensor) -> float:
        if not bool(value.isfinite()):
            raise ValueError(f"{self.path}: the logits are not finite; --dtype float32 or bfloat16 may help")
        return float(value)

    @torch.no_grad()
    def answers(self, prompts: list[list[int]], decoding: Decoding, stop_ids: Sequence[int]) -> Iterator[str]:
        """See `OtherModel`; greedy, a prompt at a time, and never an id of the embedding's that is no token."""
        spare = [*range(self.require_tokenizer().vocab_size, self._of_text.vocab_size)] or None
        for prompt in prompts:
            new = room(len(prompt), decoding.max_new_tokens, self.config.max_seq_len)
            tokens = torch.tensor([prompt], device=self.device)
            how: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": [*stop_ids], "pad_token_id": stop_ids[0]}
            how |= {"do_sample": False, "suppress_tokens": spare}
            made = self._model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
            ids = [token for token in made[0, len(prompt) :].tolist() if token not in stop_ids]
            yield text_of(self.require_tokenizer(), Completion(ids), decoding.stop)


def _loaded(kind: Any, path: Path, **how: Any) -> Any:
    """What transformers makes of a directory. Raises ValueError with the first line of what it says."""
    try:
        return kind.from_pretrained(path, local_files_only=True, trust_remote_code=False, **how)
    except Exception as error:  # what it raises for a field of a wrong type, say, is no ValueError
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ValueError(f"{path}: transformers can't read it ({short(said)})") from None
