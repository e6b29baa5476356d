"""From a configuration to what is trained on and what validates."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from k2mini.config import CorpusSection, FinetuneConfig, InstructionSection, PretrainConfig, SourceSection
from k2mini.data.batches import Blocks, Samples
from k2mini.data.chats import open_template
from k2mini.data.corpus import Corpus, corpus_hashes, fingerprint, is_prepared, read_corpus_manifest
from k2mini.data.documents import data_path
from k2mini.data.instructions import hold_out, read_conversations
from k2mini.data.mixture import Mixture, mixed_blocks
from k2mini.data.packing import Example, Examples, PackedExamples
from k2mini.data.prepare import document_files, prepare, remove_parts
from k2mini.distributed import World
from k2mini.files import sha256
from k2mini.training.checkpoint import check_files
from k2mini.weights.model_directory import ModelDirectory

COUNTS = "data.json"  # in run.dir: of each file of instructions how many records were read, cut and left out
# What is trained on, what validates; by what the first is known beside `data`: a hash, a template's name and digest,
# what `k2mini corpus` made it; and what COUNTS gets.
Read = tuple[Samples, Samples | None, dict[str, Any], dict[str, dict[str, int]]]


def sources_of(data: CorpusSection | InstructionSection) -> list[SourceSection]:
    """What a run is trained on: `data.sources` or `data.path`. Raises ValueError where it is nothing, or one twice."""
    sources = [SourceSection(data.path)] if data.path is not None else data.sources or []
    if len({Path(source.path).resolve() for source in sources}) < max(1, len(sources)):
        named = ", ".join(source.path for source in sources) or "none"
        raise ValueError(f"data.sources must name one path or more, each once with its weight, not {named}")
    return sources


def documents(config: PretrainConfig, base: ModelDirectory, world: World) -> Read:
    """Blocks of the corpora that `data` names, which are prepared first where they are documents.

    Raises ValueError where one was prepared with another tokenizer or `data.eos`, is damaged, or fills no block.
    """
    data, seed = config.data, config.run.seed

    def blocks(parts: dict[Path, SourceSection], split: str, seed: int | None) -> Samples:
        corpora = [Corpus(directory, split) for directory in parts]
        if data.sources is None:
            return Blocks(corpora[0], data.seq_len, document_mask=data.document_mask, seed=seed)
        return mixed_blocks(corpora, [*parts.values()], data, seed)

    parts = {_prepared(Path(source.path), config, base, world): source for source in sources_of(data)}
    val: Samples | None = None
    if data.val_path is not None:
        corpus = Corpus(_prepared(Path(data.val_path), config, base, world))
        val = Blocks(corpus, data.seq_len, document_mask=data.document_mask, seed=None)
    elif with_val := [directory for directory in parts if "val" in read_corpus_manifest(directory)["splits"]]:
        val = blocks({directory: replace(parts[directory], weight=1.0) for directory in with_val}, "val", None)
    known_by: dict[str, Any] = {"content": " ".join(map(fingerprint, parts))}
    if corpora := [corpus for directory in parts for corpus in read_corpus_manifest(directory).get("corpora", [])]:
        known_by["corpora"] = corpora
    return blocks(parts, "train", seed), val, known_by, {}


def instructions(config: FinetuneConfig, base: ModelDirectory, _world: World) -> Read:
    """Examples of the files that `data` names, packed or not, without those that `data.val_size` holds out.

    Raises ValueError where a file has none, or a record can't be used and `data.on_error` is 'raise'.
    """
    data, seed, sources = config.data, config.run.seed, sources_of(config.data)
    tokenizer = base.require_tokenizer()
    template = open_template(data.template, base.path, tokenizer)
    counts: dict[str, dict[str, int]] = {}
    read = [read_conversations(Path(source.path), tokenizer, template, data, counts) for source in sources]
    examples, held_out = hold_out([record for found in read for record in found], data.val_size, seed)
    aside = set(map(id, held_out))
    if data.val_path is not None:
        records = read_conversations(Path(data.val_path), tokenizer, template, data, counts)
        held_out = [example for found in records for example in found]

    def rows(examples: list[Example], seed: int | None) -> Examples:
        return PackedExamples(examples, data.max_seq_len, seed=seed) if data.packing else Examples(examples, seed=seed)

    if data.sources is None:
        samples: Samples = rows(examples, seed)
    else:
        parts = [[each for record in found for each in record if id(each) not in aside] for found in read]
        samples = Mixture(
            sources, [*map(len, parts)], lambda chosen: rows([parts[i][j] for i, j in chosen], None), seed
        )
    val = Examples(held_out, seed=None) if held_out else None
    content = " ".join(sha256(data_path(source.path)) for source in sources)
    return samples, val, {"content": content, "template": template.name + template.digest}, counts


def _prepared(path: Path, config: PretrainConfig, base: ModelDirectory, world: World) -> Path:
    """The prepared corpus at `path`; documents there are prepared first, once, into the run's directory.

    Raises ValueError where the corpus was prepared with another tokenizer than the base's or another `data.eos`.
    """
    tokenizer, known_by = base.require_tokenizer_file(), base.tokenizer_hash()
    if not is_prepared(path) and not is_prepared(path := data_path(path)):
        files = document_files(path, config)
        sources = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = hashlib.sha256(f"{sources} {config.data.eos} {known_by}".encode()).hexdigest()[:12]
        made = Path(config.run.dir) / "data" / f"{path.stem}-{key}"
        if world.is_main and not remove_parts(made):
            prepare(files, tokenizer, made, eos=config.data.eos)
        world.barrier()
        path = made
    manifest = read_corpus_manifest(path)
    if manifest["tokenizer"] != known_by:
        raise ValueError(f"{path} was prepared with another tokenizer than {tokenizer}; prepare it again")
    try:
        base.check_vocab_size(manifest["vocab_size"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if manifest["eos"] != config.data.eos:
        raise ValueError(f"{path} was prepared with eos {manifest['eos']}, data.eos is {config.data.eos}")
    check_files(path, corpus_hashes(path), world, "prepare it again")
    return path
