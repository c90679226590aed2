"""Train a network with Lightning, prune it meanwhile, and load a checkpoint, in either space.

On made-up images. What makes it interspace pruning is the flag::

    python examples/integrations/lightning_checkpoint.py
    python examples/integrations/lightning_checkpoint.py --interspace
"""

import argparse
import tempfile

import torch
import torch.nn.functional as F
from images import quarters
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import accuracy

from ip_plugin import interspace, prunable, report
from ip_plugin.adapters.lightning import ModelPruning


class Classifier(LightningModule):
    def __init__(self, space):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 4),
        )  # fmt: skip
        if space == "interspace":
            interspace(self.net)

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("right", accuracy(self.net(batch[0]), batch[1], "multiclass", num_classes=4))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interspace", action="store_true", help="prune coefficients of filters instead of weights")
    parser.add_argument("--amount", type=float, default=0.5, help="of the remaining entries, pruned after an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    seed_everything(0)
    train = DataLoader(TensorDataset(*quarters(128)), batch_size=16, shuffle=True)
    test = DataLoader(TensorDataset(*quarters(64, seed=1)), batch_size=64)
    model = Classifier("interspace" if args.interspace else "spatial")
    with tempfile.TemporaryDirectory() as folder:
        pruning = ModelPruning(
            "l1_unstructured", prunable(model), amount=args.amount, use_global_unstructured=True,
            apply_pruning=lambda epoch: epoch < args.epochs - 1, use_lottery_ticket_hypothesis=False,
        )  # fmt: skip
        checkpoint = ModelCheckpoint(folder)  # of the last epoch
        trainer = Trainer(max_epochs=args.epochs, accelerator="cpu", logger=False, callbacks=[pruning, checkpoint])
        trainer.fit(model, train, test)
        right = trainer.callback_metrics["right"]
        print(f"trained: {report(model).prunable.sparsity:.1%} zeros, {right:.1%} right")

        loaded = Classifier.load_from_checkpoint(checkpoint.best_model_path).eval()
    images, _ = quarters(8, seed=1)
    print("loaded:  outputs equal:", torch.equal(loaded.net(images), model.eval().net(images)))


if __name__ == "__main__":
    main()
