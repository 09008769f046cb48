"""Lightning: fit, save, resume, freeze."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.clients import client
from tests.helpers import gradient
from tritonbnn.models import build_model

lightning = client("lightning")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Job(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = build_model("reactnet_a", width=0.25, num_classes=3, small_images=True)

    def training_step(self, batch, index):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.Adam(
            [p for p in self.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4
        )


def batches():
    labels = torch.arange(16) % 3
    return DataLoader(TensorDataset(gradient(16, 3, 32, 32), labels), batch_size=8)


def fitted(job, folder, epochs, resume=None, callbacks=()):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, lightning.pytorch.callbacks.ModelCheckpoint(folder, save_last=True)],
    )
    trainer.fit(job, batches(), ckpt_path=resume)
    return job


def test_a_run_that_goes_on_ends_as_one_that_did_not_stop(tmp_path):
    whole = fitted(Job(), tmp_path / "whole", 2)
    fitted(Job(), tmp_path / "parts", 1)
    again = fitted(Job(), tmp_path / "parts", 2, resume=tmp_path / "parts" / "last.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_what_is_frozen_stands_still(tmp_path):
    """Without train_bn Lightning stops the averages of norms too."""
    from lightning.pytorch.callbacks import BaseFinetuning

    class Freezing(BaseFinetuning):
        def freeze_before_training(self, job):
            self.freeze([job.net.stem, job.net.blocks], train_bn=False)

        def finetune_function(self, job, epoch, optimizer):
            pass

    job = Job()
    before = copy.deepcopy(job.state_dict())
    fitted(job, tmp_path, 1, callbacks=[Freezing()])
    moved = {
        name for name, value in job.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {"net.fc.weight", "net.fc.bias"}
