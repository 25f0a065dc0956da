"""One agent for two games: an MLP learns CartPole, then Acrobot, by its own play (Gymnasium, MIT licence).

    python examples/two_games.py                        # the games come with Gymnasium

A reinforcement-learning module of the plain kind: in each epoch the policy plays some games to their end and learns
from what came of them, by PPO's clipped loss without a critic (Schulman et al. 2017). There are no labels, so the
callback is told what to hold the policy to: states that it has met, and in each the action that it likes best. A
sub-network will do if it chooses the same but for the tolerance. What is tabled is the mean return of new games, as a
share of the best that there is: 500 steps with the pole up, or the tip of the Acrobot above the bar at once (a return
of 0; -500 if it never is).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import torch
from experiment import Experiment
from images import Data
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_rnf import MultiHead, RelevanceFreezing
from lightning_rnf.streams import TaskDataModule, TrainerFactory

STATE = 6
"""So many numbers go in; a game that shows fewer has zeros behind them."""


@dataclass(frozen=True)
class Game:
    """A game of Gymnasium's: a return of ``worst`` is 0 here, one of ``best`` is 1."""

    name: str
    actions: int
    worst: float
    best: float


GAMES = {"pole": Game("CartPole-v1", 2, 0.0, 500.0), "acrobot": Game("Acrobot-v1", 3, -500.0, 0.0)}


class Policy(LightningModule):
    """Two hidden layers of ReLUs, a head a game; Adam.

    Args:
        width: of the hidden layers.
        learning_rate: of Adam.
        entropy: how much it is worth to be undecided.
        clip: how far the odds of an action may move on what was played with other weights.
    """

    def __init__(self, *, width: int, learning_rate: float, entropy: float = 0.01, clip: float = 0.2) -> None:
        super().__init__()
        self.learning_rate, self.entropy, self.clip = learning_rate, entropy, clip
        self.body = nn.Sequential(nn.Linear(STATE, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.heads = MultiHead(width)

    def forward(self, states: Tensor) -> Tensor:
        return self.heads(self.body(states))

    def training_step(self, batch: Sequence[Tensor]) -> Tensor:
        states, actions, advantages, before = batch
        odds = self(states).log_softmax(1)
        ratio = (odds.gather(1, actions[:, None])[:, 0] - before).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        undecided = -(odds.exp() * odds).sum(1).mean()
        return -torch.minimum(ratio * advantages, clipped * advantages).mean() - self.entropy * undecided

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


@torch.no_grad()
def play(policy: Policy, game: Game, games: int, seed: int) -> tuple[Tensor, ...]:
    """Play some games at once, each to its end.

    Returns:
        Of all steps: states ``(N, 6)``, actions, how much better it went from there on than in the mean of all games at
        that step, in deviations, and the logarithm of the odds of each action; and of each game its return.
    """
    was_training = policy.training
    policy.eval()
    generator = torch.Generator().manual_seed(seed)
    table = gymnasium.make_vec(game.name, num_envs=games, vectorization_mode="sync")
    seen, _ = table.reset(seed=seed)
    steps: list[tuple[Tensor, ...]] = []
    still = torch.ones(games, dtype=torch.bool)
    while still.any():
        states = torch.zeros(games, STATE)
        states[:, : seen.shape[1]] = torch.from_numpy(seen)
        odds = policy(states.to(policy.device)).log_softmax(1).cpu()
        actions = torch.multinomial(odds.exp(), 1, generator=generator)[:, 0]
        seen, rewards, terminated, truncated, _ = table.step(actions.numpy())
        taken = odds.gather(1, actions[:, None])[:, 0]
        steps.append((states, actions, torch.from_numpy(rewards).float() * still, taken, still))
        still = still & ~torch.from_numpy(terminated | truncated)
    table.close()
    policy.train(was_training)
    states, actions, rewards, taken, played = map(torch.stack, zip(*steps, strict=True))
    to_come = rewards.flip(0).cumsum(0).flip(0)
    advantages = to_come - to_come.sum(1, keepdim=True) / games
    advantages = advantages[played] / (advantages[played].std() + 1e-6)
    return states[played], actions[played], advantages, taken[played], rewards.sum(0)


class Played(IterableDataset):
    """What the policy plays in an epoch, in batches, several times over."""

    def __init__(self, game: Game, games: int, passes: int, seed: int) -> None:
        self.game, self.games, self.passes, self.seed = game, games, passes, seed
        self.policy: Policy | None = None
        self.batch_size = 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        assert self.policy is not None
        seed = self.seed + self.policy.current_epoch
        *steps, _ = play(self.policy, self.game, self.games, seed)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.passes):
            for rows in torch.randperm(len(steps[0]), generator=generator).split(self.batch_size):
                if len(rows) > 1:
                    yield tuple(part[rows] for part in steps)


class Playing(TaskDataModule):
    """A game to learn: the policy is given to it before a fit."""

    def __init__(self, name: str, games: int, passes: int, seed: int) -> None:
        played = Played(GAMES[name], games, passes, 1000 * seed)
        super().__init__(name, GAMES[name].actions, played, played, played)

    @property
    def game(self) -> Game:
        return GAMES[self.task]

    def train_dataloader(self) -> DataLoader[Any]:
        assert isinstance(self.train, Played)
        self.train.batch_size = self.batch_size
        return DataLoader(self.train, batch_size=None)

    def met(self, policy: Policy, games: int, seed: int) -> TensorDataset:
        """States of games, and of each the action that the policy likes best."""
        states, *_ = play(policy, self.game, games, seed)
        with torch.no_grad():
            return TensorDataset(states, policy(states.to(policy.device)).argmax(1).cpu())

    def score(self, policy: Policy, games: int, seed: int) -> float:
        """The mean return of new games, in [0, 1]."""
        returns = play(policy, self.game, games, seed)[-1]
        return float((returns.mean() - self.game.worst) / (self.game.best - self.game.worst))


def stream(data: Data, seed: int, *, games: int, passes: int) -> list[TaskDataModule]:
    """A task a game.

    Args:
        data: how many samples; the games' own length says that.
        seed: of what is played.
        games: played at once in an epoch.
        passes: over what was played.
    """
    return [Playing(name, games, passes, seed) for name in GAMES]


TESTED = 50
"""Games in a test."""


def fit(
    model: Any,
    stream: list[TaskDataModule],
    callback: RelevanceFreezing | None,
    trainer_factory: TrainerFactory,
    *,
    folder: Path,
) -> Tensor:
    """Learn one game after the other; after each, all that were learned are played, the policy in recall."""
    matrix = torch.full((len(stream), len(stream)), torch.nan, dtype=torch.float64)
    for row, task in enumerate(stream):
        assert isinstance(task, Playing)
        assert isinstance(task.train, Played)
        model.heads.activate(task.task)
        task.train.policy = model
        trainer = trainer_factory(callbacks=[callback] if callback else [], default_root_dir=folder / task.task)
        trainer.fit(model, datamodule=task)
        for column, other in enumerate(stream[: row + 1]):
            assert isinstance(other, Playing)
            if callback is not None:
                with callback.recall(other.task, model):
                    matrix[row, column] = other.score(model, TESTED, 10_000)
            else:
                with model.heads.running(other.task):
                    matrix[row, column] = other.score(model, TESTED, 10_000)
    return matrix


def chosen(module: Any, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of the actions, and the action that was taken."""
    return module(batch[0]), batch[1]


def met(trainer: Trainer, policy: Any, seed: int) -> DataLoader[Any]:
    """States of the game that is learned, with what the policy does there: to be held to, and to fit its head to."""
    game: Any = trainer.datamodule
    return DataLoader(game.met(policy, 8, seed), batch_size=500)


OWN = {"predict": chosen, "reference": partial(met, seed=1), "fit_data": partial(met, seed=2)}
EXPERIMENT = Experiment(stream, Policy, fit=fit, freezing=OWN, is_packaged=True)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
