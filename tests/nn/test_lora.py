import pytest
import torch

from k2mini.config import LoraSection
from k2mini.nn.lora import attach, dropped, lora_modules, merged_weight
from tests.conftest import SHAPES, tiny_config, tiny_llama
from tests.helpers import ALL, TOKENS, adapted
from tests.reference import to_peft


@pytest.mark.parametrize(
    ("name", "targets"),
    [("grouped", ALL), ("grouped", ["q_proj", "k_proj", "v_proj"]), ("mistral", ALL), ("qwen2", ALL), ("qwen3", ALL)],
)
def test_forward_and_gradients_equal_peft(name, targets):
    model = adapted(tiny_config(**SHAPES[name]), targets)
    reference = to_peft(model, targets).eval()
    logits = model(TOKENS)
    torch.testing.assert_close(logits, reference(TOKENS).logits, rtol=0, atol=1e-5)
    labels = TOKENS[:, 1:]
    (model.loss(TOKENS[:, :-1], None, labels) / labels.numel()).backward()
    reference(TOKENS, labels=TOKENS).loss.backward()
    for name, module in lora_modules(model).items():
        theirs = reference.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(module.lora_A.grad, theirs.lora_A["default"].weight.grad, rtol=0, atol=1e-5)
        torch.testing.assert_close(module.lora_B.grad, theirs.lora_B["default"].weight.grad, rtol=0, atol=1e-5)
        assert module.weight.grad is None
        assert module.bias is None or module.bias.grad is None


def test_a_fresh_adapter_changes_nothing_and_keeps_names():
    plain, model = tiny_llama(), adapted(fill=False)
    assert torch.equal(plain(TOKENS), model(TOKENS))
    names = set(model.state_dict())
    assert set(plain.state_dict()) < names
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * 3
    assert all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in trained)


def test_initialisation_follows_the_seed_and_pefts_law():
    one, same = adapted(fill=False), adapted(fill=False)
    module = one.requires_grad_(False).model.layers[0].self_attn.q_proj
    assert torch.equal(module.lora_A, same.model.layers[0].self_attn.q_proj.lora_A)
    bound = 64**-0.5  # Kaiming-uniform with a = sqrt(5): variance 1 / (3 in)
    assert module.lora_A.abs().max() <= bound
    assert module.lora_A.var() == pytest.approx(bound**2 / 3, rel=0.2)
    assert not torch.equal(module.lora_A, one.model.layers[1].self_attn.q_proj.lora_A)


def test_dropout_acts_in_training_only():
    model = adapted(dropout=0.5)
    assert torch.equal(model(TOKENS), model(TOKENS))
    model.train()
    torch.manual_seed(0)
    first = model(TOKENS)
    assert not torch.equal(first, model(TOKENS))
    torch.manual_seed(0)
    assert torch.equal(first, model(TOKENS))


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_dropout_keeps_values_at_random_and_the_gradient_takes_the_same(dropout):
    """As often as `dropout` says, whatever the place of a value and whether its neighbours are kept."""
    torch.manual_seed(0)
    x = torch.full((500, 403), 2.0, requires_grad=True)
    draws = [dropped(x, dropout, x) for _ in range(3)]
    assert all(keep == pytest.approx(1 - dropout, abs=2**-17) for _, keep in draws)
    masks = [(y / 2).detach() for y, _ in draws]
    assert all(set(mask.unique().tolist()) == {0.0, 1.0} for mask in masks)
    draws[0][0].sum().backward()
    assert torch.equal(x.grad, masks[0])
    pairs = [(masks[0].flatten()[:-n], masks[0].flatten()[n:]) for n in (1, 2, 3, 4)]
    keep, number = draws[0][1], masks[0].numel()
    deviation = (keep * (1 - keep) / number) ** 0.5
    assert all(mask.mean().item() == pytest.approx(keep, abs=5 * deviation) for mask in masks)
    for one, other in (*pairs, (masks[0], masks[1]), (masks[1], masks[2])):
        assert abs(((one - keep) * (other - keep)).mean().item()) < 5 * deviation**2 * number**0.5


def test_dropout_does_not_change_the_mean():
    module = adapted(dropout=0.3, dtype=torch.float64).model.layers[0].self_attn.q_proj
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(40_000, -1)
    with torch.no_grad():
        expected, draws = module(x[:1])[0], module.train()(x)
    torch.testing.assert_close(draws.mean(dim=0), expected, rtol=0, atol=6 * draws.std(dim=0).max().item() / 200)
    assert draws.std(dim=0).min() > 0


def test_recomputed_blocks_drop_the_same():
    found = []
    for every in (0, 1):
        model = adapted(dropout=0.5).train()
        model.model.recompute_every = every
        torch.manual_seed(3)
        model.loss(TOKENS, None, TOKENS).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_adapters_stay_fp32_over_bf16():
    model = adapted(dtype=torch.bfloat16)
    module = model.model.layers[0].self_attn.q_proj
    assert (module.weight.dtype, module.lora_A.dtype) == (torch.bfloat16, torch.float32)
    assert model(TOKENS).dtype == torch.bfloat16


@pytest.mark.parametrize("targets", [["q_prj"], ["embed_tokens"], ["q_proj", "nothing"]])
def test_a_target_that_matches_nothing_is_refused(targets):
    with pytest.raises(ValueError, match=f"lora.target_modules: the model has no '{targets[-1]}'"):
        attach(tiny_llama(), LoraSection(target_modules=targets))


def test_merging_rounds_once_and_checks():
    torch.manual_seed(0)
    weight = torch.randn(60, 50).bfloat16()
    a, b = torch.randn(2, 50), torch.randn(60, 2)
    expected = (weight.double() + 0.5 * b.double() @ a.double()).float().bfloat16()
    assert torch.equal(merged_weight(weight, (a, b, 0.5)), expected)
    with pytest.raises(ValueError, match=r"not finite in torch.float16"):
        merged_weight(weight.half(), (a * 1e6, b, 0.5))
