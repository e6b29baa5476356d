"""Signatures are pinned; what is found agrees with sets of 5-grams and with a comparison of all pairs."""

import random

import numpy as np
import pytest

from k2mini.corpus.near import PERMUTATIONS, THRESHOLD, near_duplicates, signature


def text(rng, count):
    return [f"w{rng.randrange(20_000)}" for _ in range(count)]


def edited(found, share, rng):
    """A copy in which a share of the words, anywhere, is another."""
    found = list(found)
    for place in rng.sample(range(len(found)), round(share * len(found))):
        found[place] = f"new{rng.randrange(10**9)}"
    return found


def jaccard(one, other):
    one, other = ({tuple(found[k : k + 5]) for k in range(len(found) - 4)} for found in (one, other))
    return len(one & other) / len(one | other)


def kept(texts, threshold=THRESHOLD):
    signatures = np.stack([signature(" ".join(found)) for found in texts])
    return near_duplicates(signatures, np.array([len(found) for found in texts]), threshold)


def test_a_signature_is_the_same_everywhere():
    """Pinned: parts of a corpus are signed on different machines, and compared with one another."""
    found = signature("The granite of the north is older than the basalt.")
    assert (found.shape, found.dtype, PERMUTATIONS) == ((256,), np.uint32, 256)
    assert found[:3].tolist() == [228097242, 495388669, 1955751428]
    assert int(found.astype(np.uint64).sum()) == 170160806758
    assert np.array_equal(found, signature("THE granite — of the “north” is older,\n\nthan the ba\u00adsalt"))
    assert not np.array_equal(found, signature("The granite of the south is older than the basalt."))


def test_short_texts():
    for one, other in [("", " -- "), ("basalt", "Basalt!"), ("a b c", "a b c.")]:
        assert np.array_equal(signature(one), signature(other))
    assert (signature("a b c") != signature("a b d")).all()
    assert (signature("") != signature("basalt")).all()


def test_estimates_of_the_jaccard_index():
    """Their error has the standard deviation that the docstring states, and no bias."""
    rng, errors = random.Random(0), []
    for _ in range(60):
        one = text(rng, 300)
        other = edited(one, rng.choice((0.02, 0.05, 0.1)), rng)
        true = jaccard(one, other)
        estimate = (signature(" ".join(one)) == signature(" ".join(other))).mean()
        errors.append((estimate - true) / (true * (1 - true) / PERMUTATIONS) ** 0.5)
    assert abs(np.mean(errors)) < 3 / 60**0.5
    assert 0.75 < np.std(errors) < 1.25


def test_copies_with_a_twentieth_of_the_words_replaced():
    """At least 95 % are found, and no other text is lost."""
    rng = random.Random(1)
    texts = [text(rng, rng.choice((300, 400, 700))) for _ in range(60)]
    copies = [edited(found, 0.05, rng) for found in texts]
    found = kept([*texts, *copies])
    assert (found[:60] == np.arange(60)).all()
    assert (found[60:] == np.arange(60)).mean() >= 0.95
    assert {*found[60:]} <= {*range(60)} | {*range(60, 120)}


def test_the_longest_is_kept_and_the_first_of_equals():
    rng = random.Random(2)
    one, other = text(rng, 300), text(rng, 300)
    texts = [one, other, [*one, *other[:50]], one[:-9], other, other]
    assert kept(texts).tolist() == [2, 1, 2, 2, 1, 1]
    assert kept(texts, threshold=1.0).tolist() == [0, 1, 2, 3, 1, 1]
    assert kept([one]).tolist() == [0]
    assert near_duplicates(np.empty((0, PERMUTATIONS), np.uint32), np.empty(0), 0.5).tolist() == []


def test_no_document_goes_for_one_that_it_is_unlike():
    """Each is like the next, none like the one after that."""
    rng = random.Random(3)
    whole = text(rng, 1000)
    texts = [whole[start : start + 500] for start in (0, 125, 250, 375)]
    assert jaccard(texts[0], texts[1]) > 0.55
    assert jaccard(texts[0], texts[2]) < 0.35
    assert kept(texts).tolist() == [0, 0, 2, 2]


def test_documents_a_little_below_the_threshold_stay():
    """Of pairs at J = 0.455 hardly one is dropped; by the estimate alone, one in thirteen would be."""
    draw = np.random.default_rng(0)
    one, other = draw.integers(0, 2**32, (2, 1000, PERMUTATIONS), np.uint32)
    other = np.where(draw.random(other.shape) < 0.455, one, other)
    assert np.mean((one == other).mean(1) >= THRESHOLD) > 0.07
    found = near_duplicates(np.concatenate([one, other]), np.ones(2000))
    assert (found != np.arange(2000)).sum() <= 10


def naive(signatures, lengths, threshold):
    """Longest first, every document goes for the first kept one that it is like."""
    found, threshold = {}, threshold + (threshold * (1 - threshold) / PERMUTATIONS) ** 0.5
    for one in sorted(range(len(signatures)), key=lambda one: (-lengths[one], one)):
        alike = [two for two in found if found[two] == two and (signatures[one] == signatures[two]).mean() >= threshold]
        found[one] = alike[0] if alike else one
    return [found[one] for one in range(len(signatures))]


@pytest.mark.parametrize("seed", range(4))
def test_all_pairs_compared_find_the_same(seed):
    """Of copies at 0 to 6 % of edits; the order of the documents makes no difference to how many are kept."""
    rng = random.Random(seed)
    texts = [text(rng, 200) for _ in range(12)]
    texts += [edited(found, rng.choice((0, 0.01, 0.03, 0.06)), rng) for found in texts for _ in range(rng.randrange(3))]
    rng.shuffle(texts)
    signatures, lengths = np.stack([signature(" ".join(found)) for found in texts]), [rng.randrange(5) for _ in texts]
    found = near_duplicates(signatures, np.array(lengths), THRESHOLD)
    assert found.tolist() == naive(signatures, lengths, THRESHOLD)
    order = rng.sample(range(len(texts)), len(texts))
    again = near_duplicates(signatures[order], np.array(lengths)[order], THRESHOLD)
    assert len({*again}) == len({*found})


def test_bands_that_agree_are_not_enough():
    """Two texts that share a band but little else, and many that all do."""
    signatures = np.random.default_rng(0).integers(0, 2**32, (50, PERMUTATIONS), np.uint32)
    signatures[:, :4] = 7
    signatures[10] = signatures[40]
    expected = [*range(40), 10, *range(41, 50)]
    assert near_duplicates(signatures, np.ones(50), THRESHOLD).tolist() == expected


def test_signatures_may_lie_in_a_file(tmp_path):
    rng = random.Random(5)
    texts = [text(rng, 100) for _ in range(20)] * 2
    signatures = np.stack([signature(" ".join(found)) for found in texts])
    np.save(tmp_path / "signatures.npy", signatures)
    mapped = np.load(tmp_path / "signatures.npy", mmap_mode="r")
    assert near_duplicates(mapped, np.ones(40), THRESHOLD).tolist() == [*range(20), *range(20)]


def test_a_template_gives_many_documents_one_band():
    """Nothing is dropped that is unlike, copies are, and not all pairs are compared (they would be 200 million)."""
    signatures = np.random.default_rng(0).integers(0, 2**32, (20_000, PERMUTATIONS), dtype=np.uint32)
    signatures[:, :4] = 7
    signatures[-1] = signatures[-2]
    found = near_duplicates(signatures, np.full(20_000, 100))
    assert np.flatnonzero(found != np.arange(20_000)).tolist() == [19_999]
