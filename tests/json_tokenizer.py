"""A tiny byte-level BPE as a tokenizer.json, with what stands beside one on the hub."""

import json

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
ADDED = "<tool call>"  # an added token that is not special
CONFIG = {
    "bos_token": None,
    "chat_template": TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "model_max_length": 1024,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
GENERATION = {"do_sample": True, "eos_token_id": [2, 0], "temperature": 0.7}


def write_json_tokenizer(folder, *, config=CONFIG, generation=GENERATION, bos=None, pieces=(), **changes):
    """Write it, with `changes` of the fields of tokenizer.json. Returns the path of tokenizer.json.

    Args:
        config, generation: tokenizer_config.json and generation_config.json; None: not written.
        bos: the token that the post-processor puts first.
        pieces: more of the vocabulary, before the last token, which is `ADDED`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    words = "granite basalt quartz rock mineral is made of the a and that which plates crust mantle volcano erodes"
    tokenizer.train_from_iterator([f"{a} {b}." for a in words.split() for b in words.split()], trainer)
    tokenizer.add_tokens([AddedToken(ADDED, normalized=False)])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, tokenizer.token_to_id(bos))])
    folder.mkdir(exist_ok=True)
    content = json.loads(tokenizer.to_str())
    vocab, added = content["model"]["vocab"], content["added_tokens"][-1]
    vocab |= {piece: len(vocab) + place for place, piece in enumerate(pieces)}
    added["id"] = len(vocab)
    (folder / "tokenizer.json").write_text(json.dumps({**content, **changes}), encoding="utf-8")
    for name, fields in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        if fields is not None:
            (folder / name).write_text(json.dumps(fields), encoding="utf-8")
    return folder / "tokenizer.json"
