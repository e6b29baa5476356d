"""SmolLM2-135M-Instruct with its own tokenizer: byte-level BPE in a tokenizer.json, ChatML, no BOS before texts.

    python tests/make_smollm2_json.py MODEL [MAKE]

MODEL is what `make_smollm2.py` has made, MAKE that script (by default in $K2MINI_ASSETS/assets). Its tokenizer.model is
a rebuild; the original's tokens, merges and template stand in the GGUF that the script fetches. Writes MODEL-json.
"""

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

EMBEDDING = "model.embed_tokens.weight"


def write_tokenizer(fields, out: Path) -> None:
    """tokenizer.json and its companions, of the fields of a GGUF, as the hub's copy of the model has them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "bos_token": "<|im_start|>",
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 8192,
        "pad_token": "<|im_end|>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")


def main(model: Path, script: Path) -> None:
    import gguf

    out = model.with_name(f"{model.name}-json")
    out.mkdir(exist_ok=True)
    spec = importlib.util.spec_from_file_location("make_smollm2", script)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    with tempfile.TemporaryDirectory() as folder:
        reader = gguf.GGUFReader(make.fetch(folder))
        fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
        write_tokenizer(fields, out)
    config = json.loads((model / "config.json").read_text())
    config["vocab_size"] = len(fields["tokenizer.ggml.tokens"])
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = load_file(model / "model.safetensors")
    tensors[EMBEDDING] = tensors[EMBEDDING][: config["vocab_size"]].clone()  # without the rebuild's bytes
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    print(out)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    assets = Path(os.environ.get("K2MINI_ASSETS", "../shared")) / "assets" / "make_smollm2.py"
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else assets)
