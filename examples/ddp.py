"""Five tasks of two handwritten digits each (scikit-learn's, nothing to fetch), trained by several processes.

    python examples/ddp.py --accelerator cpu --devices 2            # Lightning starts the second process itself
    python examples/ddp.py                                          # as many as there are GPUs
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/ddp.py --nodes 2 …
    srun --nodes 2 --ntasks-per-node 4 python examples/ddp.py --nodes 2 --devices 4      # within a SLURM allocation

The last two are Lightning's own ways to more than one machine: nothing here is about them but ``num_nodes``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_info

from lightning_rnf import RelevanceFreezing
from lightning_rnf.commands.demo import MLP, digits


def main(arguments: Sequence[str] | None = None) -> RelevanceFreezing:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto", help="processes on each machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args(arguments)

    seed_everything(0)  # the same initial weights in all processes; DDP would see to that, too
    stream = digits()
    model, rnf = MLP(64, 256, learning_rate=2e-2), RelevanceFreezing()
    for task in stream:
        model.heads.add(task.task, 2)
    for task in stream:
        model.heads.activate(task.task)
        Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.nodes,
            strategy="ddp",  # without find_unused_parameters: waiting heads and frozen ones don't train
            max_epochs=options.epochs,
            callbacks=[rnf],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, datamodule=task)
    for name, record in rnf.state.tasks.items():
        rank_zero_info(f"{name}: accuracy {record.accuracy:.3f}, of its sub-network {record.subnetwork_accuracy:.3f}")
    rank_zero_info(f"{rnf.free_capacity:.0%} of the units are free")
    return rnf


if __name__ == "__main__":
    main()
