"""Learning from one teacher, as AdamBNN and ReActNet do."""

from dataclasses import dataclass

import torch
from torch import nn

from tritonbnn.cli import UserError
from tritonbnn.compute import searching_convolutions
from tritonbnn.data.batches import MicroBatch
from tritonbnn.methods.method import Losses, Method
from tritonbnn.methods.teacher import load_teacher
from tritonbnn.settings import setting


class Distill(Method):
    """Cross-entropy of each image with the teacher's answer: -sum softmax(t) log_softmax(s).

    Temperature 1; labels have no part in it (2106.11309, the published code).
    """

    capturable = True

    @dataclass(frozen=True)
    class Settings:
        """Of learning from a teacher."""

        teacher: str = setting(
            "resnet34", "resnet34, or a file with its weights", path=("resnet34", "none")
        )

    teacher: nn.Module

    def prepare(self) -> None:
        source, compute = self.task.source, self.task.compute
        assert source
        teacher = load_teacher(
            self.settings.teacher,
            num_classes=len(source.classes),
            device=compute.device,
            channels=source.channels,
        )
        if teacher is None:
            raise UserError("method distill needs a teacher: name one, or use method plain")
        compute.place_frozen(teacher)
        self.teacher = teacher

    def losses(self, network: nn.Module, batch: MicroBatch) -> Losses:
        logits = self.logits(network, batch.images)
        with torch.no_grad(), searching_convolutions(self.task.compute.device):
            target = self.logits(self.teacher, batch.images).softmax(dim=1)
        return Losses(-(target * logits.log_softmax(dim=1)).sum(dim=1), logits)
