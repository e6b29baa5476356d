"""Train the demo's base: python tools/make_demo_base.py [--steps N] (about 4 minutes).

The base is a LLaMA of 1.1 M parameters, trained on the demo's kind of sentences about every-day things (animals,
countries, instruments, …). It knows no geoscience: the geoscience tables are used only to train the tokenizer and as
words in random order, so that the 1,200 pieces suit both. Writes k2mini/demo/base/.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import sentencepiece

from k2mini.config import CheckpointSection, RunSection, TrainSection
from k2mini.corpus.signals_facts import Fact
from k2mini.data.batches import Blocks
from k2mini.data.corpus import Documents
from k2mini.data.prompts import get_template
from k2mini.data.tokenizer import Tokenizer
from k2mini.demo.phrases import ANSWER, TEMPLATE
from k2mini.demo.sources import BASE
from k2mini.demo.world import choice_questions, documents, instructions, read_facts, split_entities
from k2mini.model_config import ModelConfig
from k2mini.nn.init import init_weights
from k2mini.nn.llama import Llama
from k2mini.training.loop import Task, train
from k2mini.weights.model_files import save_model

VOCAB_SIZE = 1200
SYLLABLES = [start + vowel for start in (*"bcdfgklmnprstvz", "br", "dr", "kl", "st", "tr") for vowel in "aeiou"]
SEED = 1


def base_texts(rng: random.Random) -> list[str]:
    """The base's training texts: documents, questions with answers, multiple choice, lists of words, fables.

    Only half of the entities occur in questions, so that the base learns to answer from what documents say.
    """
    general, template = read_facts("general"), get_template(TEMPLATE)
    asked, _ = split_entities(general, rng)
    texts = documents(general, 40, rng)
    for record in instructions(asked, 12000, rng):
        texts.append(template.prompt(record["instruction"], record["input"]) + record["output"])
    for _ in range(3):
        for question in choice_questions(asked, general, len(asked), rng, held_out=False):
            listed = "\n".join(f"{chr(65 + i)}. {option}" for i, option in enumerate(question.options))
            prompt = template.prompt(f"{question.stem}\nChoose from:\n{listed}")
            texts.append(prompt + ANSWER + chr(65 + question.answer))
    texts += word_lists(general + read_facts("geoscience"), 3000, rng)
    texts += fables(general, 1500, rng)
    rng.shuffle(texts)
    return texts


def word_lists(facts: list[Fact], number: int, rng: random.Random) -> list[str]:
    """Lists of words in random order, which teach their spelling and no fact."""
    words = sorted({word for fact in facts for word in (fact.name, fact.value, fact.property.noun)})
    return ["Words: " + ", ".join(rng.sample(words, 8)) + "." for _ in range(number)]


def fables(facts: list[Fact], number: int, rng: random.Random) -> list[str]:
    """Documents on things that don't exist, so that the base does not become certain of every sentence it begins."""
    properties = {fact.key: fact for fact in facts}
    values = {key: sorted({fact.value for fact in facts if fact.key == key}) for key in properties}
    texts = []
    for _ in range(number):
        name = "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))) + rng.choice("nlrmstx")
        told = [
            replace(properties[key], name=name, value=rng.choice(values[key])) for key in rng.sample(sorted(values), 3)
        ]
        texts += documents(told, 1, rng)
    return texts


def train_tokenizer(texts: list[str], folder: Path) -> Path:
    """Train a SentencePiece BPE with LLaMA's settings. Returns its file."""
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
    """Train the base and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1800)
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
            Task(Blocks(Documents(encoded), 128, document_mask=True, seed=SEED)),
            RunSection(str(folder / "run"), SEED),
            TrainSection(
                lr=2e-3,
                global_batch_size=8,
                micro_batch_size=8,
                max_steps=options.steps,
                warmup_steps=100,
                schedule="cosine",
                weight_decay=0.1,
                beta2=0.99,
            ),
            CheckpointSection(every=options.steps),
        )
        shutil.rmtree(options.out, ignore_errors=True)
        # fp16 halves the package; the demo trains from exactly these values.
        save_model(model.half().state_dict(), config, options.out, tokenizer=tokenizer)
    print(f"{options.out}: {config.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
