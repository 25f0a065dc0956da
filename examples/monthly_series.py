"""Forecasts of three monthly series: CO₂ on Mauna Loa, the sea off Peru (El Niño), and electrical equipment of the EU.

    python examples/monthly_series.py                             # the series come with statsmodels

A regression: 36 months go in, the 6 that follow come out, and "accuracy" is R², the share of the variance that is
explained, mean over the 6. It is below 0 where a forecast is worse than the mean. An MLP, Adam. Each series is cut in
time: the first 55 % of its months are for training, the next 25 % for reference data (a tolerance of 2 % needs 50
windows, and the shortest series has 257 months), and the last 20 % for the report; no month that is forecast belongs to
two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from experiment import Experiment
from images import Data
from lightning.pytorch import LightningModule
from statsmodels.datasets import co2, elec_equip, elnino
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_rnf import MultiHead
from lightning_rnf.streams import TaskDataModule


class Forecaster(LightningModule):
    """An MLP of two hidden layers with a head for each series; least squares."""

    def __init__(self, *, inputs: int, width: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.hidden = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.heads = MultiHead(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.hidden(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


def co2_monthly() -> Tensor:
    """CO₂ in the air of Mauna Loa, parts per million, 1958 to 2001; means of the weeks, gaps filled linearly."""
    weekly = co2.load_pandas().data["co2"]
    return torch.tensor(weekly.resample("MS").mean().interpolate().to_numpy())


def el_nino() -> Tensor:
    """Temperature of the sea's surface off Peru (region Niño 1+2), °C, 1950 to 2010."""
    years = elnino.load_pandas().data.drop(columns="YEAR")
    return torch.tensor(years.to_numpy().flatten())


def equipment() -> Tensor:
    """Turnover of those who make electrical equipment in the EU, an index, 1995 to 2016."""
    return torch.tensor(elec_equip.load_pandas().data.iloc[:, 0].to_numpy())


SERIES: dict[str, Callable[[], Tensor]] = {"CO2": co2_monthly, "El Niño": el_nino, "equipment": equipment}


def windows(series: Tensor, past: int, ahead: int, samples: int | None = None) -> list[TensorDataset]:
    """Training, validation and test data: windows ``(N, past)`` and what follows ``(N, ahead)``.

    Each window is seen from its own mean, so that a trend does not lead out of what was trained; and everything is
    divided by the deviations of the training data.

    Args:
        series: ``(months,)``.
        past: months that go in.
        ahead: months to forecast.
        samples: only the last so many windows of each.
    """
    months = len(series)
    starts = [past, round(0.55 * months), round(0.8 * months), months]  # of what is forecast
    whole = series.unfold(0, past + ahead, 1)
    whole = whole - whole[:, :past].mean(dim=1, keepdim=True)
    parts = [whole[first - past : last - past - ahead + 1] for first, last in pairwise(starts)]
    x, y = parts[0][:, :past], parts[0][:, past:]
    spread, middle, deviation = x.std(), y.mean(dim=0), y.std(dim=0)
    kept = [part[-(samples or len(part)) :] for part in parts]
    return [
        TensorDataset((part[:, :past] / spread).float(), ((part[:, past:] - middle) / deviation).float())
        for part in kept
    ]


def stream(data: Data, seed: int, *, past: int, ahead: int) -> list[TaskDataModule]:
    """One task a series; the seed decides nothing here, only the weights at the start and the batches' order."""
    return [TaskDataModule(name, ahead, *windows(read(), past, ahead, data.samples)) for name, read in SERIES.items()]


EXPERIMENT = Experiment(stream, Forecaster, is_packaged=True, is_of_numbers=True)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
