"""In which language is this name? A small BERT reads the names of countries, languages and currencies letter by letter.

    python examples/languages_of_names.py               # the names come with Babel: Unicode's CLDR

Text in three tasks of five languages: Romance, Germanic, Slavic. A transformer encoder with a [CLS] token, positions
and post-norm layers, as BERT, trained from scratch. What has the same name in two languages of a task is left out. A
fifth of the things named are test data, in all languages: «Allemagne» is not tested where «Alemania» was trained. A
tenth of the training data is held out at random for reference data. A peer of another kind is `lora`: the first task
trains the network, which stays as it is from then on, and each later task has an adapter of low rank of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from babel import Locale
from experiment import Experiment
from images import Data, balanced
from lightning.pytorch import LightningModule
from low_rank import adapt, adapter
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_rnf import MultiHead
from lightning_rnf.streams import TaskDataModule, split_by_class

LANGUAGES = {
    "Romance": ("es", "fr", "it", "pt", "ro"),
    "Germanic": ("da", "de", "en", "nl", "sv"),
    "Slavic": ("cs", "hr", "pl", "sk", "sl"),
}
PADDING, CLS, UNKNOWN = range(3)


class Layer(nn.Module):
    """A post-norm layer: attention whose projections are a `Linear` each, as in BERT, and two layers with GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.attention_norm, self.output_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, is_read: Tensor) -> Tensor:
        """``(N, T, width)`` to the same; what is read of it, ``(N, T)``."""
        split = [
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        ]
        attended = nn.functional.scaled_dot_product_attention(*split, attn_mask=is_read[:, None, None])
        x = self.attention_norm(x + self.out(attended.transpose(1, 2).flatten(2)))
        return self.output_norm(x + self.feed_forward(x))


class SmallBert(LightningModule):
    """BERT in small: two layers; a head a task reads the [CLS] token; AdamW.

    Args:
        letters: how many there are, with the special tokens.
        length: letters that are read at most.
        width: of the tokens.
        learning_rate: of AdamW.
        rank: of an adapter for each task after the first, which alone learns then, with its head; 0: there are none.
    """

    def __init__(self, *, letters: int, length: int, width: int, learning_rate: float, rank: int = 0) -> None:
        super().__init__()
        self.learning_rate, self.rank = learning_rate, rank
        self.letters, self.positions = nn.Embedding(letters, width), nn.Embedding(1 + length, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList([Layer(width, heads=4) for _ in range(2)])
        self.heads = MultiHead(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.heads(self.features(tokens))

    def features(self, tokens: Tensor) -> Tensor:
        """``(N, 1 + letters)`` to what the network says at [CLS], ``(N, width)``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.letters(tokens) + self.positions(places))
        for layer in self.layers:
            x = layer(x, tokens != PADDING)
        return x[:, 0]

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        name = self.own_adapter()
        own = self.parameters() if name is None else [*adapter(self, name), *self.heads.tasks[name].parameters()]
        return torch.optim.AdamW(own, self.learning_rate)

    def own_adapter(self) -> str | None:
        """The adapter of the active task; None: it has none."""
        return self.heads.active if self.rank and self.heads.active != next(iter(self.heads.tasks)) else None

    def add_adapters(self) -> None:
        """An adapter for each task after the first, if there are any."""
        if self.rank:
            adapt(self.layers, self.rank, list(self.heads.tasks)[1:], self.own_adapter)


def names(languages: Sequence[str]) -> list[tuple[str, str, str]]:
    """Of each thing in each language: what it is (``territories-DE``), language, name in small letters."""
    found = []
    for language in languages:
        locale = Locale(language)
        for kind in ("territories", "languages", "currencies"):
            found += [(f"{kind}-{code}", language, name.lower()) for code, name in getattr(locale, kind).items()]
    times = Counter((name, language) for _, language, name in found)
    shared = Counter(name for name, _ in times)
    return [(thing, language, name) for thing, language, name in found if shared[name] == 1]


def tokens(names: Sequence[str], letters: Sequence[str], length: int) -> Tensor:
    """[CLS] and the first letters of each name: ``(N, 1 + length)``."""
    number = {letter: 3 + index for index, letter in enumerate(letters)}
    rows = torch.full((len(names), 1 + length), PADDING)
    rows[:, 0] = CLS
    for row, name in zip(rows, names, strict=True):
        read = torch.tensor([number.get(letter, UNKNOWN) for letter in name[:length]])
        row[1 : 1 + len(read)] = read
    return rows


def drawn(known: Sequence[tuple[str, str, str]], seed: int, letters: int) -> tuple[set[str], list[str]]:
    """Which things are tested, and the most frequent letters of the others, in order of how frequent they are."""
    things = sorted({thing for thing, _, _ in known})
    order = torch.randperm(len(things), generator=torch.Generator().manual_seed(seed)).tolist()
    tested = {things[index] for index in order[: len(things) // 5]}
    frequent = Counter("".join(name for thing, _, name in known if thing not in tested)).most_common(letters - 3)
    return tested, [letter for letter, _ in frequent]


def stream(data: Data, seed: int, *, letters: int, length: int) -> list[TaskDataModule]:
    """The tasks; the seed says which things are tested.

    Args:
        data: how many samples.
        seed: of what is tested and what is held out.
        letters: only so many, with the three special tokens: the most frequent; any other is unknown.
        length: letters that are read of a name.
    """
    known = [entry for family in LANGUAGES.values() for entry in names(family)]
    tested, alphabet = drawn(known, seed, letters)
    classes = [language for family in LANGUAGES.values() for language in family]
    parts = []
    for is_test in (False, True):
        own = [entry for entry in known if (entry[0] in tested) == is_test]
        labels = torch.tensor([classes.index(language) for _, language, _ in own])
        read = tokens([name for _, _, name in own], alphabet, length)
        kept = balanced(labels, data.samples)
        parts.append(TensorDataset(read[kept], labels[kept]))
    groups = [[classes.index(language) for language in family] for family in LANGUAGES.values()]
    return split_by_class(*parts, groups, name=list(LANGUAGES), seed=seed)


EXPERIMENT = Experiment(stream, SmallBert, pretrained=lambda model, data: model.add_adapters(), is_packaged=True)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
