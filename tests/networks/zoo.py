"""Tiny forms of networks that people have, from timm and transformers, with random weights; and two toy tasks.

Not part of the test environment: `arrives.py` says what to install.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, SIDE, TOKENS, VOCABULARY = 4, 32, 16, 64


def images(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gratings of a direction for each class, under noise: ``(N, 3, SIDE, SIDE)``, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    across = torch.linspace(0, 12, SIDE)
    angle = labels * torch.pi / CLASSES
    along = across[None, :, None] * angle.cos()[:, None, None] + across[None, None] * angle.sin()[:, None, None]
    phase = 6.28 * torch.rand(samples, 1, 1, generator=generator)
    noise = torch.randn(samples, 3, SIDE, SIDE, generator=generator)
    return (along + phase).sin()[:, None] + 0.5 * noise, labels


def tokens(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Half of the tokens are of the class's own quarter of the vocabulary: ``(N, TOKENS)``, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    own = VOCABULARY // CLASSES
    any_token = torch.randint(2, VOCABULARY, (samples, TOKENS), generator=generator)
    of_class = (labels * own)[:, None] + torch.randint(2, own, (samples, TOKENS), generator=generator)
    return torch.where(torch.rand(samples, TOKENS, generator=generator) < 0.5, of_class, any_token), labels


class OfLogits(nn.Module):
    """A model of transformers with its logits alone."""

    def __init__(self, model: nn.Module, name: str = "input_ids", **options: Any) -> None:
        super().__init__()
        self.model, self.name, self.options = model, name, options

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{self.name: x}, **self.options).logits


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    """``"swin_tiny_patch4_window7_224"``, or a class: ``"mlp_mixer.MlpMixer"``."""

    def build() -> nn.Module:
        import timm

        if "." in name:
            place, _, kind = name.partition(".")
            return getattr(getattr(timm.models, place), kind)(num_classes=CLASSES, **options)
        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)

    return build


def of_transformers(
    kind: str, model: str = "ForSequenceClassification", name: str = "input_ids", **options: Any
) -> Any:
    def build() -> nn.Module:
        import transformers

        sizes: dict[str, Any] = {
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
        }  # fmt: skip
        text = {
            "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 1,
        }  # fmt: skip
        if name == "input_ids":
            sizes |= text
        if kind == "Swin":  # a size and a number of heads for each stage
            sizes = {}
        config = getattr(transformers, f"{kind}Config")(**sizes | {"num_labels": CLASSES} | options)
        return OfLogits(getattr(transformers, f"{kind}{model}")(config), name)

    return build


_VIT = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
_SHORT = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}

IMAGES: dict[str, Callable[[], nn.Module]] = {
    "resnet18": of_timm("resnet18"),
    "resnet18d": of_timm("resnet18d"),
    "seresnet18": of_timm("seresnet18"),
    "regnety_002": of_timm("regnety_002"),
    "resnetv2_50": of_timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(32, 64, 96, 128)),
    "densenet121": of_timm("densenet121", block_config=(2, 2, 2, 2)),
    "dla34": of_timm("dla34"),
    "efficientnet_b0": of_timm("efficientnet_b0"),
    "mobilenetv3": of_timm("mobilenetv3_small_100"),
    "ghostnet": of_timm("ghostnet_050"),
    "repvgg_a0": of_timm("repvgg_a0"),
    "convnext": of_timm("convnext_atto", **_SHORT, patch_size=2),
    "convnextv2": of_timm("convnextv2_atto", **_SHORT, patch_size=2),
    "fastvit_t8": of_timm("fastvit_t8", layers=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128)),
    "edgenext": of_timm("edgenext_xx_small", depths=(1, 1, 1, 1), dims=(16, 24, 32, 48), heads=(4, 4, 4, 4)),
    "poolformer": of_timm("metaformer.MetaFormer", **_SHORT, layer_scale_init_values=1e-5, mlp_bias=True),
    "mixer": of_timm("mlp_mixer.MlpMixer", img_size=SIDE, patch_size=8, embed_dim=48, num_blocks=3),
    "maxvit": of_timm("maxvit_rmlp_pico_rw_256", img_size=64, depths=(1, 1), embed_dim=(32, 64), stem_width=16),
    "vit": of_timm("vit_tiny_patch16_224", **_VIT),
    "deit": of_timm("deit3_small_patch16_224", **_VIT),
    "swin": of_timm(
        "swin_tiny_patch4_window7_224", img_size=SIDE, patch_size=2, window_size=4, embed_dim=16,
        depths=(1, 2, 1), num_heads=(2, 2, 4), strict_img_size=False,
    ),
    "hiera": of_timm("hiera_tiny_224", img_size=(64, 64), embed_dim=24, stages=(1, 1, 2, 1)),
    "eva02": of_timm("eva02_tiny_patch14_224", **_VIT),
}  # fmt: skip

TEXTS: dict[str, Callable[[], nn.Module]] = {
    "BERT": of_transformers("Bert"),
    "RoBERTa": of_transformers("Roberta"),
    "ELECTRA": of_transformers("Electra", embedding_size=32),
    "ModernBERT": of_transformers("ModernBert", cls_token_id=1, sep_token_id=1, reference_compile=False),
    "DistilBERT": of_transformers("DistilBert", dim=32, n_layers=3, n_heads=4, hidden_dim=64),
    "Llama": of_transformers("Llama", num_key_value_heads=2),
    "Qwen3": of_transformers("Qwen3", num_key_value_heads=2, head_dim=8),
}

_PATCHES = {"model": "ForImageClassification", "name": "pixel_values", "image_size": SIDE}
OF_PIXELS: dict[str, Callable[[], nn.Module]] = {
    "HF ViT": of_transformers("ViT", **_PATCHES, patch_size=8),
    "HF Swin": of_transformers(
        "Swin", **_PATCHES, patch_size=2, embed_dim=16, depths=[1, 2, 1], num_heads=[2, 2, 4], window_size=4
    ),
    "HF DINOv2": of_transformers("Dinov2", **_PATCHES, patch_size=8, mlp_ratio=2),
}


class AtEmbeddings(nn.Module):
    """GPT-2, whose ``Conv1D`` is no unit layer, behind one that is: relevance at its embeddings can be seen there."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4, num_labels=CLASSES, pad_token_id=0
        )
        self.model = transformers.GPT2ForSequenceClassification(config)
        self.same = nn.Linear(32, 32, bias=False)
        nn.init.eye_(self.same.weight)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.same(self.model.transformer.wte(x).detach())
        hidden = self.model.transformer(inputs_embeds=embedded).last_hidden_state
        return self.model.score(hidden[:, -1])


TEXTS["GPT-2"] = AtEmbeddings

DATA: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    **dict.fromkeys((*IMAGES, *OF_PIXELS), images),
    **dict.fromkeys(TEXTS, tokens),
}
BUILD = {**IMAGES, **OF_PIXELS, **TEXTS}


def batch_of(name: str, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Data of a network's kind and size."""
    x, y = DATA[name](samples, seed)
    larger = name in {"maxvit", "hiera"}
    return (nn.functional.interpolate(x, scale_factor=2) if larger else x), y


def built(name: str, seed: int = 0) -> nn.Module:
    """With weights of this seed."""
    torch.manual_seed(seed)
    return BUILD[name]()


@torch.no_grad()
def without_biases(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """In eval mode, whatever is added to the stream is 0: biases, position embeddings, tokens of the model's own.

    Layer scales and norms that start at 0 are 1, and running statistics are those of the batch, of mean 0, or
    activations vanish.
    """
    net, batch = built(name, seed), batch_of(name, 16, seed)
    added = ("bias", "pos_embed", "position_embedding", "cls_token", "dist_token", "reg_token", "mask_token")
    for full_name, parameter in net.named_parameters():
        if any(part in full_name for part in added) or full_name.endswith("wpe.weight"):
            parameter.zero_()
        elif parameter.ndim < 2 or "gamma" in full_name or "layer_scale" in full_name:
            parameter.fill_(1.0)
        elif not parameter.any():
            nn.init.normal_(parameter, std=0.1)  # heads that start at 0
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
    if norms:
        net.train()(batch[0])
    for norm in norms:
        norm.running_mean.zero_()
    return net.eval(), batch


cached = functools.lru_cache(maxsize=None)(without_biases)
