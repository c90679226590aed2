"""Train a network of transformers with its `Trainer`, prune it meanwhile, and resume at a checkpoint, in either space.

On made-up images. What makes it interspace pruning is the flag::

    python examples/integrations/hf_trainer.py
    python examples/integrations/hf_trainer.py --interspace
"""

import argparse
import tempfile

from images import quarters
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from ip_plugin import bake, interspace, prunable, report
from ip_plugin.adapters.torch_prune import identity
from ip_plugin.methods import prune

IMAGES = [{"pixel_values": image, "labels": label} for image, label in zip(*quarters(96), strict=True)]


class Pruning(TrainerCallback):
    """Prune more after every epoch but the last."""

    def __init__(self, sparsity):
        self.sparsity = sparsity

    def on_epoch_end(self, args, state, control, model, **others):  # noqa: ARG002
        prune(model, sparsity=self.sparsity * min(1, state.epoch / (args.num_train_epochs - 1)))


def trainer(args, folder):
    set_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=4))
    if args.interspace:
        interspace(model)
    else:  # a plain model must have masks before a checkpoint with masks is loaded
        for module, name in prunable(model):
            identity(module, name)
    settings = TrainingArguments(
        folder, num_train_epochs=args.epochs, learning_rate=5e-3, per_device_train_batch_size=16, save_strategy="epoch",
        use_cpu=True, report_to="none",
    )  # fmt: skip
    return Trainer(model, settings, train_dataset=IMAGES, callbacks=[Pruning(args.sparsity)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interspace", action="store_true", help="prune coefficients of filters instead of weights")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(args, folder)
        whole.train()
        outputs, labels, _ = whole.predict(IMAGES)
        right = (outputs.argmax(1) == labels).mean()
        print(f"trained: {report(whole.model).prunable.sparsity:.1%} zeros, {right:.1%} right")

        resumed = trainer(args, folder)  # as in a new process
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{whole.state.max_steps // 2}")
        print("resumed: outputs equal:", (resumed.predict(IMAGES).predictions == outputs).all())

        bake(resumed.model).save_pretrained(folder)  # an ordinary network
        whole.model = ResNetForImageClassification.from_pretrained(folder)
        error = abs(whole.predict(IMAGES).predictions - outputs).max() / abs(outputs).max()
        print(f"shipped: outputs differ by {error:.0e}")


if __name__ == "__main__":
    main()
