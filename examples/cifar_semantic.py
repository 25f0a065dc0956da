"""CIFAR-10, then CIFAR-100 in seven tasks of unequal size, grouped by what the classes mean (section 4.3).

    python examples/cifar_semantic.py --data FOLDER               # shards as in FOLDER/cifar10/train_00.avif
    python examples/cifar_semantic.py --data FOLDER --download    # or torchvision's layout: FOLDER/cifar-10-batches-py
    python examples/cifar_semantic.py --data FOLDER --settings examples/cifar_semantic_short.yaml     # for a CPU

Network and training are those of cifar_random.py. The paper names the groups and not what is in them: here people are
with the land animals, crustaceans with the fish, spiders, snails and worms with the insects, fruit with the objects,
and buildings and roads with the nature scenes, as outdoor scenes.
"""

from __future__ import annotations

from collections.abc import Sequence

from cifar_random import Zenke, cifar10_first
from experiment import Experiment
from images import Data

from lightning_rnf.streams import TaskDataModule

GROUPS = {
    "flowers and trees": """
        orchid poppy rose sunflower tulip maple_tree oak_tree palm_tree pine_tree willow_tree""",
    "land animals": """
        bear leopard lion tiger wolf camel cattle chimpanzee elephant kangaroo fox porcupine possum raccoon skunk
        hamster mouse rabbit shrew squirrel crocodile dinosaur lizard snake turtle baby boy girl man woman""",
    "aquatic mammals and fish": """
        beaver dolphin otter seal whale aquarium_fish flatfish ray shark trout crab lobster""",
    "objects": """
        bottle bowl can cup plate apple mushroom orange pear sweet_pepper clock keyboard lamp telephone television
        bed chair couch table wardrobe""",
    "small insects": """
        bee beetle butterfly caterpillar cockroach snail spider worm""",
    "nature scenes": """
        cloud forest mountain plain sea bridge castle house road skyscraper""",
    "vehicles": """
        bicycle bus motorcycle pickup_truck train lawn_mower rocket streetcar tank tractor""",
}


def groups() -> list[list[int]]:
    """The classes of each group by their number: CIFAR-100 counts its names in alphabetical order."""
    named = [names.split() for names in GROUPS.values()]
    numbers = {name: number for number, name in enumerate(sorted(name for names in named for name in names))}
    return [[numbers[name] for name in names] for names in named]


def stream(data: Data, seed: int) -> list[TaskDataModule]:
    return cifar10_first(data, groups(), list(GROUPS), seed)


EXPERIMENT = Experiment(stream, Zenke)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
