"""In which language is this name? The names of `languages_of_names.py`, read letter by letter by an LSTM.

    python examples/names_by_lstm.py                    # the names come with Babel: Unicode's CLDR

A recurrent network of the plain kind: an embedding, an LSTM that reads in both directions over packed sequences of
unequal length, and a head a task on the largest that each hidden unit has said. What is frozen and recalled are hidden
units of `nn.LSTM` and rows of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from experiment import Experiment
from languages_of_names import PADDING, stream
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_rnf import MultiHead


class Reader(LightningModule):
    """Embedding, LSTM in both directions, heads; AdamW.

    Args:
        letters: how many there are, with the special tokens.
        embedding: size of a letter.
        width: hidden units of each direction.
        learning_rate: of AdamW.
    """

    def __init__(self, *, letters: int, embedding: int, width: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.letters = nn.Embedding(letters, embedding)
        self.lstm = nn.LSTM(embedding, width, batch_first=True, bidirectional=True)
        self.heads = MultiHead(2 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != PADDING).sum(1).cpu()
        packed = pack_padded_sequence(self.letters(tokens), lengths, batch_first=True, enforce_sorted=False)
        said, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, padding_value=-1.0)
        return self.heads(said.amax(1))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.learning_rate)


EXPERIMENT = Experiment(stream, Reader, is_packaged=True)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
