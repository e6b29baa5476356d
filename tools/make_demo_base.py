"""Train the demo's base: python tools/make_demo_base.py [--steps N] (about 10 minutes on two cores).

A LLaMA of 1.1 M parameters that speaks the demo's kind of language about every-day things (animals, countries,
instruments, …) and knows no geoscience: the tables of geoscience are read for their spelling alone, so that the
tokenizer's 1,200 pieces suit both. Writes k2mini/demo/base/.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from pathlib import Path

import sentencepiece

from k2mini.config import CheckpointSection, ModelConfig, TrainSection
from k2mini.demo.pipeline import BASE, TEMPLATE
from k2mini.demo.world import choice_questions, documents, instructions, read_facts
from k2mini.nn.llama import Llama, init_weights
from k2mini.text.batches import Blocks
from k2mini.text.prompts import get_template
from k2mini.text.tokenizer import Tokenizer
from k2mini.training.loop import train
from k2mini.weights.formats import save_model

VOCAB_SIZE = 1200
SEED = 1


def base_texts(rng: random.Random) -> list[str]:
    """What the base reads: documents, questions with answers, and multiple choice, on every-day things."""
    general, template = read_facts("general"), get_template(TEMPLATE)
    texts = documents(general, 40, rng)
    for record in instructions(general, 12000, rng):
        texts.append(template.prompt(record["instruction"], record["input"]) + record["output"])
    for _ in range(6):
        for question in choice_questions(general, general, len(general), rng, held_out=False):
            listed = "\n".join(f"{chr(65 + i)}. {option}" for i, option in enumerate(question.options))
            texts.append(template.prompt(f"{question.stem}\nChoose from:\n{listed}") + chr(65 + question.answer))
    rng.shuffle(texts)
    return texts


def train_tokenizer(texts: list[str], folder: Path) -> Path:
    """A SentencePiece BPE with LLaMA's settings."""
    (folder / "text.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=-1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=BASE)
    options = parser.parse_args()
    rng = random.Random(SEED)
    texts = base_texts(rng)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spelling = texts + documents(read_facts("geoscience"), 20, rng)
        tokenizer = Tokenizer(train_tokenizer(spelling, folder))
        encoded = [tokenizer.encode(text, bos=True, eos=True) for text in texts]
        print(f"{len(texts):,} texts, {sum(map(len, encoded)):,} tokens")
        config = ModelConfig(
            dim=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            intermediate_dim=344,
            vocab_size=tokenizer.vocab_size,
            max_seq_len=256,
        )
        model = Llama(config)
        init_weights(model, SEED)
        train(
            model,
            Blocks(encoded, 128, document_mask=True, seed=SEED),
            folder / "run",
            seed=SEED,
            section=TrainSection(
                lr=2e-3,
                global_batch_size=8,
                micro_batch_size=8,
                max_steps=options.steps,
                warmup_steps=100,
                schedule="cosine",
                weight_decay=0.01,
                beta2=0.99,
            ),
            checkpoint=CheckpointSection(every=options.steps),
            identity={},
        )
        shutil.rmtree(options.out, ignore_errors=True)
        # fp16 halves the package; the demo trains from exactly these values.
        save_model(model.half().state_dict(), config, options.out, tokenizer=tokenizer)
    print(f"{options.out}: {config.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
