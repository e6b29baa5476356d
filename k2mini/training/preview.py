"""`k2mini preview`: the samples of a run, as text and token by token, with what counts in its loss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from k2mini.config import IGNORE_INDEX, FinetuneConfig, PretrainConfig, RunConfig
from k2mini.config_file import check_context
from k2mini.data.batches import Batch, Blocks, Samples
from k2mini.data.chats import open_template
from k2mini.data.corpus import Corpus, Documents, TokenSource, is_prepared
from k2mini.data.documents import data_path, read_documents
from k2mini.data.instructions import read_examples
from k2mini.data.mixture import Mixture, mixed_blocks
from k2mini.data.packing import Examples
from k2mini.data.prepare import document_files
from k2mini.data.tokenizer import Tokenizer
from k2mini.training.samples import sources_of
from k2mini.weights.model_directory import ModelDirectory, model_directory


def preview(config: RunConfig, number: int) -> Iterator[str]:
    """The first `number` samples of a run, in the order in which it takes them, as lines of text.

    Raises ValueError where the data or the tokenizer can't be read.
    """
    base = ModelDirectory(model_directory(config.model.path, weights=False))
    tokenizer = base.require_tokenizer()
    check_context(config, base.config.max_seq_len)
    if number < 1:
        raise ValueError(f"--number must be at least 1, not {number}")
    samples = _samples(config, base.path, tokenizer)
    for index in range(min(number, samples.num_samples)):
        yield f"sample {index} of {samples.num_samples:,}"
        batch = samples.batch(index, 1)
        yield from _text(batch, tokenizer, documents=isinstance(config, PretrainConfig))
        yield ""
        yield from _table(batch, tokenizer)


def _samples(config: RunConfig, base: Path, tokenizer: Tokenizer) -> Samples:
    seed, sources = config.run.seed, sources_of(config.data)
    if isinstance(config, FinetuneConfig):
        section = config.data
        template = open_template(section.template, base, tokenizer)
        parts = [read_examples(Path(source.path), tokenizer, template, section) for source in sources]
        if section.sources is None:
            return Examples(parts[0], seed=seed)
        sizes = [len(part) for part in parts]
        return Mixture(sources, sizes, lambda chosen: Examples([parts[i][j] for i, j in chosen], seed=None), seed)
    corpora, corpus = [_corpus(source.path, config, tokenizer) for source in sources], config.data
    if corpus.sources is None:
        return Blocks(corpora[0], corpus.seq_len, document_mask=corpus.document_mask, seed=seed)
    return mixed_blocks(corpora, sources, corpus, seed)


def _corpus(path: str, config: PretrainConfig, tokenizer: Tokenizer) -> TokenSource:
    source, eos = data_path(path), config.data.eos
    if is_prepared(source):
        return Corpus(source)
    files = document_files(source, config)
    return Documents([ids for file in files for ids in read_documents(file, tokenizer, eos=eos)])


def _text(batch: Batch, tokenizer: Tokenizer, *, documents: bool) -> Iterator[str]:
    """A row as it reads, indented, under headings that say what is supervised and, of `documents`, where one begins.

    A row's first token and BOS go with what follows: the one is never predicted, the other only across documents.
    """
    tokens, labels = batch.tokens[0].tolist(), batch.labels[0].tolist()
    supervised = [False, *(label != IGNORE_INDEX for label in labels)]  # of each token, whether it is to be predicted
    ids = [*tokens, labels[-1]] if supervised[-1] else tokens
    stream, heading, text = tokenizer.stream(), "", ""
    for place, token in enumerate(ids):
        # Without BOS a document begins after EOS, and of a row's first token it is not known.
        after_eos = documents and ids[place - 1 : place] == [tokenizer.eos_id]
        begins = after_eos if tokenizer.bos_id is None else token == tokenizer.bos_id
        judged = min(place + (begins or not place), len(ids) - 1)
        said = "supervised" if supervised[judged] else "not supervised"
        if documents and (begins or (not place and tokenizer.bos_id is not None)):
            said += ", a document from its beginning" if begins else ", a document goes on"
        if begins or not place or not heading.startswith(said):
            yield from _indented(heading, text)
            heading, text = said, ""
        text += tokenizer.piece(token) if tokenizer.kind(token) == "control" else stream.push(token)
    yield from _indented(heading, text + stream.flush())


def _indented(heading: str, text: str) -> list[str]:
    return [f"{heading}:", *(f"    {line}".rstrip() for line in text.split("\n"))] if text else []


def _table(batch: Batch, tokenizer: Tokenizer) -> Iterator[str]:
    """A line for each position: its place in its document, its token, and the token to predict where that counts."""
    yield "position      id  piece                  supervised: the next token"
    tokens, labels = batch.tokens[0].tolist(), batch.labels[0].tolist()
    positions = range(len(tokens)) if batch.positions is None else batch.positions[0].tolist()
    for position, token, label in zip(positions, tokens, labels, strict=True):
        if position < 0:
            continue
        target = "" if label == IGNORE_INDEX else f"{label:>6}  {tokenizer.piece(label)!r}"
        yield f"{position:>8}  {token:>6}  {tokenizer.piece(token)!r:<22} {target}".rstrip()
    count = batch.num_supervised()
    yield f"{batch.num_tokens()} tokens, {count} of them supervised"
