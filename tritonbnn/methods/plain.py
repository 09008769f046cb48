"""Learning from labels."""

from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F

from tritonbnn.data.batches import MicroBatch
from tritonbnn.methods.method import Losses, Method
from tritonbnn.settings import setting


class Plain(Method):
    """Cross-entropy of each image with its label."""

    capturable = True

    @dataclass(frozen=True)
    class Settings:
        """Of learning from labels."""

        label_smoothing: float = setting(
            0.0, "share of the target that is spread over all classes", least=0, below=1
        )

    def losses(self, network: nn.Module, batch: MicroBatch) -> Losses:
        logits = self.logits(network, batch.images)
        smoothing = self.settings.label_smoothing
        each = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing, reduction="none")
        return Losses(each, logits)
