"""Networks of transformers with adapters of peft, where both are installed: tiny, with random weights."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import Classifier, frozen_entries, trainer

from lightning_rnf import FreeCapacity, MultiHead, RelevanceFreezing, UnitMap

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

WIDTH = 16
OPTIONS = {"criterion": FreeCapacity(0.1), "ration": 0.4, "fit_head": False}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.LlamaModel(config)


def gpt2() -> nn.Module:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=20, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16, **ids)
    )


def lora(*targets: str, **options: object) -> object:
    return peft.LoraConfig(r=4, target_modules=list(targets), **options)


NETS = {
    "BERT": (bert, lambda: lora("query", "value", "intermediate.dense", "output.dense"), 20),
    "Llama": (llama, lambda: lora("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 24),
    "GPT-2": (gpt2, lambda: lora("c_attn", "c_fc", "mlp.c_proj", fan_in_fan_out=True), 12),
}


class OfTokens(Classifier):
    """Six tokens; the heads read the last one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.body, self.heads = net, MultiHead(WIDTH, dict.fromkeys("abc", 3))

    def forward(self, x):
        return self.heads(self.body(input_ids=x).last_hidden_state[:, -1])

    def configure_optimizers(self):
        return torch.optim.AdamW((one for one in self.parameters() if one.requires_grad), 1e-2)


def data(task: str, samples: int = 128) -> TensorDataset:
    generator = torch.Generator().manual_seed(ord(task))
    x = torch.randint(0, 20, (samples, 6), generator=generator)
    return TensorDataset(x, (x == ord(task) % 20).sum(1).add(x[:, 0] > 9).clamp(max=2))


def fit(model, rnf, task):
    model.heads.activate(task)
    trainer(rnf, max_epochs=2).fit(model, *(DataLoader(data(task), 32) for _ in range(2)))


def recalled(rnf, model, task):
    with rnf.recall(task, model), torch.no_grad():
        return model(data("c").tensors[0])


def callback(**options):
    return RelevanceFreezing(task=lambda trainer, module: module.heads.active, **OPTIONS | options)


def made(kind):
    torch.manual_seed(0)
    build, config, count = NETS[kind]
    return OfTokens(peft.get_peft_model(build(), config())), count


@pytest.mark.parametrize("kind", NETS)
def test_low_rank_adapters_are_the_units_and_recall_is_exact(kind):
    model, count = made(kind)
    rnf = callback()
    base = {name: value.detach().clone() for name, value in model.body.named_parameters() if "lora_" not in name}
    logits = {}
    for task in "ab":
        fit(model, rnf, task)
        logits[task] = recalled(rnf, model, task)
    assert len(rnf.state.layers) == count
    assert all(".lora_A." in layer.name or ".lora_B." in layer.name for layer in rnf.state.layers)
    for name, value in base.items():
        assert torch.equal(model.body.get_parameter(name), value), name
    assert not any(rnf.report(model).audit.changed.values())
    with torch.no_grad():
        for name, mask in frozen_entries(rnf, model).items():
            model.get_parameter(name)[~mask] = math.nan
    for task, expected in logits.items():
        assert torch.equal(recalled(rnf, model, task), expected)


def test_all_relevance_arrives_past_adapters():
    """Nothing of this Llama has a bias but its heads."""
    model, _ = made("Llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        for head in model.heads.tasks.values():
            head.bias.zero_()
    rnf = callback()
    rnf.protect(model, DataLoader(data("a"), 32), name="a")
    assert rnf.state.tasks["a"].conservation["<input>"] == pytest.approx(1, abs=0.01)


def test_heads_among_the_modules_to_save_are_heads():
    class WithHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert, self.classifier = bert(), MultiHead(WIDTH, dict.fromkeys("abc", 3))

        def forward(self, input_ids):
            return self.classifier(self.bert(input_ids=input_ids).last_hidden_state[:, -1])

    class Saved(OfTokens):
        def __init__(self, net):
            super().__init__(net)
            self.heads = net.base_model.model.classifier.modules_to_save["default"]

        def forward(self, x):
            return self.body(input_ids=x)

    torch.manual_seed(0)
    model = Saved(peft.get_peft_model(WithHeads(), lora("query", "value", modules_to_save=["classifier"])))
    rnf = callback()
    fit(model, rnf, "a")
    before = recalled(rnf, model, "a")
    fit(model, rnf, "b")
    assert torch.equal(recalled(rnf, model, "a"), before)


def test_an_adapter_of_its_own_for_each_task_is_recalled_when_it_is_set():
    torch.manual_seed(0)
    net = peft.get_peft_model(bert(), lora("query", "value"), adapter_name="first")
    net.add_adapter("second", lora("query", "value"))
    model, rnf = OfTokens(net), callback()
    logits = {}
    for task, adapter in (("a", "first"), ("b", "second")):
        net.set_adapter(adapter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the first one's logits differ while the second one is set
            fit(model, rnf, task)
        logits[task] = recalled(rnf, model, task)
    for task, adapter in (("a", "first"), ("b", "second")):
        net.set_adapter(adapter)
        assert torch.equal(recalled(rnf, model, task), logits[task])


def test_a_merged_adapter_is_refused_and_an_exported_network_has_less_of_it():
    model, _ = made("BERT")
    rnf = callback()
    fit(model, rnf, "a")
    x = data("c").tensors[0]
    small = rnf.export(model, "a", example=x[:4])
    assert torch.allclose(small(x), recalled(rnf, model, "a"), atol=1e-5)
    assert sum(one.numel() for one in small.parameters()) < sum(one.numel() for one in model.parameters())
    model.body.merge_adapter()
    with pytest.raises(ValueError, match="weights are not those in which the finished tasks ended"):
        fit(model, rnf, "b")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: lora("query", "value", use_dora=True), "can't be made of units and will be frozen whole"),
        (
            lambda: peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[]),
            "100% of the parameters outside of heads belong to no unit",
        ),
    ],
    ids=["DoRA", "IA3"],
)
@pytest.mark.filterwarnings("ignore:.*(belong to no unit|made of units)")
def test_adapters_that_are_not_made_of_rows_are_frozen_whole_with_a_word(config, said):
    torch.manual_seed(0)
    model, rnf = OfTokens(peft.get_peft_model(bert(), config())), callback()
    with pytest.warns(UserWarning, match=said):
        fit(model, rnf, "a")
    before = recalled(rnf, model, "a")
    adapter = {name: value.detach().clone() for name, value in model.body.named_parameters() if value.requires_grad}
    fit(model, rnf, "b")
    assert torch.equal(recalled(rnf, model, "a"), before)
    for name, value in adapter.items():
        assert torch.equal(model.body.get_parameter(name), value)


def test_the_map_of_a_network_with_adapters_is_short():
    model, count = made("BERT")
    said = str(UnitMap.of(model, tuple(data("a", 8).tensors)))
    assert "base_layer" not in said
    assert "kept from training (requires_grad is False)" in said
    assert f"units in {count} layers" in said
