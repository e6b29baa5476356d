"""Prefill and decoding beside transformers, llama.cpp (where llama-cpp-python is installed) and the memory's bandwidth.

    python tools/bench_inference.py --model DIR [--pairs 3] [--threads 2]     a real model, such as SmolLM2-135M
    python tools/bench_inference.py --shape 1.1b                             random weights of TinyLlama's shape
    python tools/bench_inference.py --model DIR --dtype bfloat16             that dtype beside float32, and nothing else

Each measurement is taken in turns, ours and theirs, in one process with the same threads; medians, and the range of
the ratios pair by pair. Decoding: 32 greedy tokens after a prompt of 512. llama.cpp reads a GGUF from `k2mini convert`.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_models import begun

from k2mini.build import load_model
from k2mini.cpu import describe
from k2mini.inference.beam import Beams, beam_search, prefill
from k2mini.inference.compile import compile_decoding
from k2mini.inference.decoding import Decoding
from k2mini.inference.sampling import Sampling
from k2mini.model_config import ModelConfig, hf_config
from k2mini.nn.init import init_weights
from k2mini.nn.llama import Llama
from k2mini.weights.convert import convert
from k2mini.weights.model_files import save_model

PROMPT, NEW = 512, 32
TINY_LLAMA = ModelConfig(
    dim=2048,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    intermediate_dim=5632,
    vocab_size=32000,
    norm_eps=1e-5,
)
Measure = Callable[[], float]  # tokens a second


def pairs(label: str, ours: Measure, theirs: Measure, number: int) -> None:
    """Measure in turns and print medians and ratios."""
    ours(), theirs()  # warm-up: compilation, pages, threads
    a, b = zip(*((ours(), theirs()) for _ in range(number)), strict=True)
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    print(
        f"{label:52} {statistics.median(a):8.1f} {statistics.median(b):8.1f}  "
        f"{statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def prompt(config: ModelConfig, batch: int = 1) -> torch.Tensor:
    """Random token ids. (batch, PROMPT)"""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(300, config.vocab_size - 300, (batch, PROMPT), generator=generator)


def our_prefill(model: Llama) -> float:
    """A prompt, read by the engine, and the token after it."""
    start = time.perf_counter()
    begun(model, prompt(model.config).tolist(), Decoding(2))
    return PROMPT / (time.perf_counter() - start)


def our_decode(model: Llama, batch: int = 1) -> float:
    """Greedy tokens after a prompt, by the engine's steps."""
    engine = begun(model, prompt(model.config, batch).tolist(), Decoding(NEW + 2))
    engine.step()  # compiles, where it must
    start = time.perf_counter()
    for _ in range(NEW):
        engine.step()
    return batch * NEW / (time.perf_counter() - start)


def our_beams(model: Llama) -> float:
    """K2's search: four beams, no repeated bigram."""
    start = time.perf_counter()
    decoding = Decoding(NEW, Sampling(no_repeat_ngram_size=2), beams=Beams(4))
    beam_search(model, prompt(model.config)[:, :64].tolist(), decoding, stop_ids=[])
    return NEW / (time.perf_counter() - start)


def prefix_reuse(model: Llama, questions: int = 64, shared: int = 600, own: int = 20) -> None:
    """Questions over a common prefix: computed once, and with every question as it would be alone."""
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(300, 20000, (shared,), generator=generator).tolist()
    prompts = [prefix + torch.randint(300, 20000, (own,), generator=generator).tolist() for _ in range(questions)]
    with torch.inference_mode():
        start = time.perf_counter()
        _, together = prefill(model, prompts, capacity=shared + own)
        middle = time.perf_counter()
        apart = torch.cat([prefill(model, [each], capacity=shared + own)[1] for each in prompts])
        end = time.perf_counter()
    print(
        f"{questions} questions over {shared} common tokens: {middle - start:.1f} s, apart {end - middle:.1f} s "
        f"({(end - middle) / (middle - start):.1f} times), "
        f"logits differ by at most {(together - apart).abs().max():.1e}"
    )


def reference_of(model: Llama) -> Any:
    """The same tensors in transformers' LLaMA, with SDPA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = {**hf_config(model.config, "float32", 1, 2), "attn_implementation": "sdpa"}
    raw = LlamaConfig(**values)
    with torch.device("meta"):
        reference = LlamaForCausalLM(raw)
    rotary = type(reference.model.rotary_emb)(raw)
    reference.load_state_dict(model.state_dict(), strict=False, assign=True)
    reference.tie_weights()
    reference.model.rotary_emb = rotary
    return reference.eval()


@torch.inference_mode()
def their_prefill(reference: Any, config: ModelConfig) -> float:
    """Tokens a second of the peer, on the prompt of `our_prefill`."""
    tokens = prompt(config)
    start = time.perf_counter()
    reference(tokens, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    return PROMPT / (time.perf_counter() - start)


@torch.inference_mode()
def their_decode(reference: Any, config: ModelConfig, batch: int = 1) -> float:
    """Tokens a second of the peer, after the prompt of `our_decode`."""
    out = reference(prompt(config, batch), use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1)
    start = time.perf_counter()
    for _ in range(NEW):
        out = reference(token[:, None], past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1].argmax(-1)
    return batch * NEW / (time.perf_counter() - start)


def their_beams(reference: Any, config: ModelConfig) -> float:
    """Tokens a second of the peer, with the beams of `our_beams`."""
    start = time.perf_counter()
    reference.generate(
        prompt(config)[:, :64],
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        num_beams=4,
        no_repeat_ngram_size=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return NEW / (time.perf_counter() - start)


class LlamaCpp:
    """llama.cpp over a GGUF."""

    def __init__(self, path: Path, threads: int, config: ModelConfig) -> None:
        import llama_cpp

        self._config = config
        self._model = llama_cpp.Llama(
            str(path), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def prefill(self) -> float:
        """Tokens a second of the peer, on the prompt of `our_prefill`."""
        self._model.reset()
        start = time.perf_counter()
        self._model.eval(prompt(self._config)[0].tolist())
        return PROMPT / (time.perf_counter() - start)

    def decode(self) -> float:
        """Tokens a second of the peer, after the prompt of `our_decode`."""
        self.prefill()
        start = time.perf_counter()
        for _ in range(NEW):
            self._model.eval([self._model.sample(temp=0.0, repeat_penalty=1.0)])
        return NEW / (time.perf_counter() - start)


SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def to_q8(source: Path, target: Path) -> None:
    """llama.cpp's own quantisation."""
    import llama_cpp

    llama_cpp.llama_log_set(SILENT, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise SystemExit("llama.cpp could not quantise")


def bandwidth() -> float:
    """GB/s of reading a gigabyte."""
    block = torch.ones(1 << 28)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        best = max(best, 4 * block.numel() / (time.perf_counter() - start) / 1e9)
    return best


def build_random(folder: Path, tokenizer: Path) -> Path:
    """TinyLlama's shape, random, with a vocabulary for the GGUF."""
    from k2mini.data.tokenizer import Tokenizer

    model = Llama(TINY_LLAMA)
    init_weights(model, 0)
    save_model(model.state_dict(), TINY_LLAMA, folder, tokenizer=Tokenizer(tokenizer))
    return folder


def main() -> None:
    """Measure the model that the command line names against every peer that is installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path)
    which.add_argument("--shape", choices=["1.1b"])
    parser.add_argument("--tokenizer", type=Path, default=Path("../shared/assets/llama_tokenizer.model"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or build_random(Path(scratch) / "model", options.tokenizer)
        if options.dtype is not None:
            narrow(folder, options.dtype, options.pairs)
            return
        run(folder, Path(scratch), options.pairs, options.threads, small=options.model is not None)


def narrow(folder: Path, dtype: str, number: int) -> None:
    """A dtype of 16 bits beside our float32 and beside the same tensors in transformers."""
    (full, _), (half, _) = load_model(folder), load_model(folder, dtype=dtype)
    reference, config = reference_of(half), half.config
    print(f"{config.num_parameters() / 1e6:.0f} M parameters, {torch.get_num_threads()} threads; {describe()}")
    print(f"{'tokens a second':52} {dtype:>8} {'other':>8}  ratio")
    pairs("prefill / our float32", lambda: our_prefill(half), lambda: our_prefill(full), number)
    pairs(
        "prefill / transformers, same dtype",
        lambda: our_prefill(half),
        lambda: their_prefill(reference, config),
        number,
    )
    pairs("decode / our float32", lambda: our_decode(half), lambda: our_decode(full), number)


def run(folder: Path, scratch: Path, number: int, threads: int, *, small: bool) -> None:
    """All measurements of one model."""
    eager, _ = load_model(folder)
    config = eager.config
    print(
        f"{config.num_parameters() / 1e6:.0f} M parameters, {threads} threads, torch {torch.__version__}; {describe()}"
    )
    print(f"read bandwidth: {(read := bandwidth()):.1f} GB/s")
    print(f"{'tokens a second':52} {'k2mini':>8} {'peer':>8}  ratio")
    reference = reference_of(eager)
    compiled, _ = load_model(folder)
    compile_decoding(compiled)
    int8, _ = load_model(folder, quantize="int8")
    int8_head, _ = load_model(folder, quantize="int8", quantize_head=True)
    for model in (int8, int8_head):
        compile_decoding(model)
    pairs("prefill, transformers", lambda: our_prefill(eager), lambda: their_prefill(reference, config), number)
    decode = lambda: our_decode(compiled)  # noqa: E731
    pairs("decode, eager, transformers", lambda: our_decode(eager), lambda: their_decode(reference, config), number)
    pairs("decode, transformers", decode, lambda: their_decode(reference, config), number)
    if small:
        for label, model in (("eager", eager), ("compiled", compiled)):
            ours, theirs = partial(our_decode, model, 8), partial(their_decode, reference, config, 8)
            pairs(f"decode, 8 rows, {label}, transformers", ours, theirs, number)
        pairs("4 beams, transformers", lambda: our_beams(compiled), lambda: their_beams(reference, config), number)
        prefix_reuse(eager)
    pairs("decode, int8 / our float32", lambda: our_decode(int8), decode, number)
    pairs("decode, int8 with its head / our float32", lambda: our_decode(int8_head), decode, number)
    head = config.vocab_size * config.dim
    touched = 4 * (config.num_parameters() - (0 if config.tie_embeddings else head))
    rate = statistics.median(decode() for _ in range(number)) * touched / 1e9
    print(f"float32 decoding reads {rate:.1f} GB/s of weights, {100 * rate / read:.0f} % of the bandwidth")
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        print("llama-cpp-python is not installed, so llama.cpp was not measured")
        return
    full, q8 = scratch / "f32.gguf", scratch / "q8.gguf"
    convert(folder, "gguf", full, dtype=torch.float32)
    to_q8(full, q8)
    peer = LlamaCpp(full, threads, config)
    pairs("prefill, llama.cpp F32", lambda: our_prefill(eager), peer.prefill, number)
    pairs("decode, llama.cpp F32", decode, peer.decode, number)
    peer = LlamaCpp(q8, threads, config)
    pairs("decode, int8, llama.cpp Q8_0", lambda: our_decode(int8), peer.decode, number)
    pairs("decode, int8 with its head, llama.cpp Q8_0", lambda: our_decode(int8_head), peer.decode, number)


if __name__ == "__main__":
    main()
