"""Text as it comes: stop strings over token boundaries, whole characters."""

from random import Random

import pytest

from k2mini.inference.text import TextStream

TEXT = "granite is a rock. Response: émigré 岩石 made of quartz and the volcano erodes"


def streamed(tokenizer, text, stop):
    stream = TextStream(tokenizer, stop)
    given = []
    for token in tokenizer.encode(text, bos=False, eos=False):
        given.append(stream.push(token))
        if stream.stopped:
            break
    given.append(stream.flush())
    assert stream.text == "".join(given)
    return stream, given


@pytest.mark.parametrize("seed", range(30))
def test_the_first_stop_string_ends_the_text(tiny_tokenizer, seed):
    """Stop strings cut anywhere out of the text, and some that are not in it."""
    random = Random(seed)
    whole = streamed(tiny_tokenizer, TEXT, ())[0].text
    stops = ["zzz", "rockk"]
    for _ in range(random.randint(0, 2)):
        start = random.randrange(1, len(whole) - 8)
        stops.append(whole[start : start + random.randint(1, 8)])
    places = [whole.find(stop) for stop in stops if stop in whole]
    stream, given = streamed(tiny_tokenizer, TEXT, stops)
    assert stream.text == (whole[: min(places)] if places else whole)
    assert stream.stopped == bool(places)
    assert all("\ufffd" not in piece for piece in given)


def test_what_could_be_a_beginning_is_given_at_the_end(tiny_tokenizer):
    stream, _ = streamed(tiny_tokenizer, "granite quar", ("quartz",))
    assert stream.text.strip() == "granite quar"


def test_an_empty_stop_string_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(tiny_tokenizer, [""])
