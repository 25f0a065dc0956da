"""MNIST's digits laid on CIFAR-10's photographs: a U-Net says of each pixel whether it is of a digit, and of which.

    python examples/digits_on_photographs.py --data FOLDER              # MNIST and CIFAR-10 as elsewhere
    python examples/digits_on_photographs.py --data FOLDER --download

A segmentation in two tasks: the background and the digits 0 to 4, then the background and 5 to 9. A digit is white and
somewhere in the photograph, as the seed says. Its pixels count, and as many of the background, drawn at random: nine
tenths of all pixels are background, where a network that sees no digit would be right. A tenth of the training data is
held out for reference data, the test set is only for the report.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from experiment import Experiment
from images import Data, cifar, mnist, normalised
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from lightning_rnf import MultiHead
from lightning_rnf.streams import TaskDataModule

IGNORED = -100  # torch's label of what does not count


class UNet(LightningModule):
    """Three sizes of 32, 16 and 8 pixels, two convolutions at each, joined by concatenation; a 1 × 1 head a task."""

    def __init__(self, *, width: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.down_32, self.down_16 = _block(3, width), _block(width, 2 * width)
        self.bottom = _block(2 * width, 4 * width)
        self.to_16, self.to_32 = (nn.ConvTranspose2d(size * width, size * width // 2, 2, 2) for size in (4, 2))
        self.up_16, self.up_32 = _block(4 * width, 2 * width), _block(2 * width, width)
        self.pool = nn.MaxPool2d(2)
        self.heads = MultiHead(width, make_head=lambda channels, classes: nn.Conv2d(channels, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        at_32 = self.down_32(x)
        at_16 = self.down_16(self.pool(at_32))
        at_8 = self.bottom(self.pool(at_16))
        at_16 = self.up_16(torch.cat([at_16, self.to_16(at_8)], dim=1))
        return self.heads(self.up_32(torch.cat([at_32, self.to_32(at_16)], dim=1)))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1], ignore_index=IGNORED)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


def _block(channels_in: int, channels: int) -> nn.Sequential:
    convolutions = [nn.Conv2d(channels_in, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)]
    return nn.Sequential(*[module for one in convolutions for module in (one, nn.BatchNorm2d(channels), nn.ReLU())])


def laid_on(photographs: Tensor, digits: Tensor, labels: Tensor, generator: torch.Generator) -> TensorDataset:
    """A digit on each photograph, and for each pixel 0 (background), 1 + the digit's label, or `IGNORED`.

    Args:
        photographs: ``(N, 3, 32, 32)`` in [0, 1].
        digits: ``(N, 28, 28)`` in [0, 1]: how much of the photograph they cover.
        labels: ``(N,)``.
        generator: of places, and of the background's pixels that count.
    """
    number = len(digits)
    cover = torch.zeros(number, 32, 32)
    top, left = torch.randint(5, (2, number, 1, 1), generator=generator)
    rows, columns = top + torch.arange(28).view(1, -1, 1), left + torch.arange(28).view(1, 1, -1)
    cover[torch.arange(number).view(-1, 1, 1), rows, columns] = digits
    shown = photographs * (1 - cover.unsqueeze(1)) + cover.unsqueeze(1)
    is_digit = cover > 0.5
    # As many as the digit has: those with the least of random numbers, of which the digit's own are out of the draw.
    drawn = torch.rand(cover.shape, generator=generator).masked_fill(is_digit, 2)
    order = drawn.flatten(1).argsort(dim=1).argsort(dim=1)
    counts = order.view_as(cover) < is_digit.sum(dim=(1, 2), keepdim=True)
    pixels = torch.full(cover.shape, IGNORED).masked_fill(counts, 0)
    return TensorDataset(shown, torch.where(is_digit, 1 + labels.view(-1, 1, 1), pixels))


def stream(data: Data, seed: int) -> list[TaskDataModule]:
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    sets = [(cifar(data, 10, is_train), mnist(data, is_train)) for is_train in (True, False)]
    for first in (0, 5):
        parts = []
        for photographs, digits in sets:
            images, labels = digits.tensors
            own = ((labels >= first) & (labels < first + 5)).nonzero().view(-1)
            on = torch.randint(len(photographs), (len(own),), generator=generator)
            laid = laid_on(photographs.tensors[0][on], images[own], labels[own] - first, generator)
            parts.append(TensorDataset(normalised(laid).tensors[0], laid.tensors[1]))
        train, test = parts
        order = torch.randperm(len(train), generator=generator).tolist()
        held_out = len(order) // 10
        kept, validation = Subset(train, order[held_out:]), Subset(train, order[:held_out])
        tasks.append(TaskDataModule(f"digits-{first}{first + 4}", 6, kept, validation, test))
    return tasks


EXPERIMENT = Experiment(stream, UNet)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
