"""What the model has to agree with: transformers' models, peft over them, and a naive one of a few lines."""

import torch
import torch.nn.functional as F

from k2mini.architectures import LinearRopeScaling
from k2mini.model_config import hf_config
from k2mini.nn.llama import Llama
from k2mini.nn.lora import lora_modules
from tests.conftest import tiny_llama


def to_transformers(model: Llama):
    """The same weights in transformers' LlamaForCausalLM, or its Mistral or Qwen."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = hf_config(model.config, "float32", bos_id=1, eos_id=2)
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw)).eval()
    assert [type(reference).__name__] == raw["architectures"]
    for parameter in reference.parameters():  # `.to(dtype)` would round its rotary buffer as well
        parameter.data = parameter.data.to(model.dtype)
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.config.tie_embeddings else [])
    reference.tie_weights()
    return reference


def to_peft(model: Llama, targets):
    """The same weights and adapters (of rank 4, alpha 6, over `tiny_llama`) in peft over transformers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, target_modules=list(targets), task_type="CAUSAL_LM")
    reference = get_peft_model(to_transformers(tiny_llama(model.config)), config)
    with torch.no_grad():
        for name, module in lora_modules(model).items():
            theirs = reference.get_submodule(f"base_model.model.{name}")
            theirs.lora_A["default"].weight.copy_(module.lora_A)
            theirs.lora_B["default"].weight.copy_(module.lora_B)
    return reference


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A q or k projection from rotate-half rows to Meta's, where the two numbers of a rotary pair are neighbours."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def naive_logits(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """The model after the papers: complex rotary over interleaved pairs, explicit softmax, head by head, no cache.

    tokens (T,) -> logits (T, V), in the model's dtype; it reads the weights and none of the code.
    """
    c, w = model.config, model.state_dict()
    length, dtype = len(tokens), model.dtype
    theta = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    if isinstance(c.rope_scaling, LinearRopeScaling):
        theta /= c.rope_scaling.factor
    elif c.rope_scaling is not None:
        s = c.rope_scaling
        for i, f in enumerate(theta.tolist()):
            wavelength = 2 * torch.pi / f
            if wavelength > s.original_max_seq_len / s.low_freq_factor:
                theta[i] = f / s.factor
            elif wavelength >= s.original_max_seq_len / s.high_freq_factor:
                smooth = (s.original_max_seq_len / wavelength - s.low_freq_factor) / (
                    s.high_freq_factor - s.low_freq_factor
                )
                theta[i] = (1 - smooth) * f / s.factor + smooth * f
    turns = torch.exp(1j * torch.outer(torch.arange(length, dtype=torch.float64), theta))  # (T, E/2)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def turned(x):  # (T, E), pairs interleaved
        return (
            torch.view_as_real(torch.view_as_complex(x.reshape(length, -1, 2).contiguous()) * turns)
            .flatten(1)
            .to(dtype)
        )

    x = w["model.embed_tokens.weight"][tokens]
    ahead = torch.arange(length)[:, None] - torch.arange(length)  # of the key, which the query follows
    unseen = (ahead < 0) | (ahead >= (c.sliding_window or length))
    for layer in range(c.num_layers):
        p = f"model.layers.{layer}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (h @ w[f"{p}self_attn.{name}_proj.weight"].T for name in "qkv")
        if c.attention_bias:
            q, k, v = (x + w[f"{p}self_attn.{name}_proj.bias"] for x, name in ((q, "q"), (k, "k"), (v, "v")))
        if c.qk_norm:
            heads = (length, -1, c.head_dim)
            q = norm(q.view(heads), w[p + "self_attn.q_norm.weight"]).flatten(1)
            k = norm(k.view(heads), w[p + "self_attn.k_norm.weight"]).flatten(1)
        q, k = interleave(q.T, c.num_heads).T, interleave(k.T, c.num_kv_heads).T
        out = []
        for head in range(c.num_heads):
            group = head // (c.num_heads // c.num_kv_heads)
            q_head = turned(q[:, head * c.head_dim : (head + 1) * c.head_dim])
            k_head = turned(k[:, group * c.head_dim : (group + 1) * c.head_dim])
            score = (q_head @ k_head.T / c.head_dim**0.5).masked_fill(unseen, -torch.inf)
            weights = score.exp() / score.exp().sum(-1, keepdim=True)
            out.append(weights @ v[:, group * c.head_dim : (group + 1) * c.head_dim])
        x = x + torch.cat(out, dim=-1) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        x = x + (gate * F.sigmoid(gate) * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"]) @ head.T
