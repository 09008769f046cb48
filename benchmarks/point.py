"""What is measured at: a network, a batch and a resolution; and a rival's training step there."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.rivals import Rival
from benchmarks.steps import CLASSES, Step, training_step
from tritonbnn.train.graphs import Graphs


@dataclass(frozen=True)
class Point:
    """What a training step works on.

    Attributes:
        model: a network's name.
        step: of the schedule.
        batch: images.
        size: their height and width.
        width: multiplies all channels.
        device: where.
        in_channels: of an image.
        small_images: a stem of stride 1, for images of about 32 x 32.
        classes: outputs of the head.
    """

    model: str
    step: int
    batch: int
    size: int
    width: float
    device: torch.device
    in_channels: int = 3
    small_images: bool = False
    classes: int = CLASSES

    def build(self, rival: Rival) -> nn.Module:
        """A rival's network, the same weights every time."""
        torch.manual_seed(0)
        return rival.build(
            self.model,
            self.step,
            width=self.width,
            num_classes=self.classes,
            in_channels=self.in_channels,
            small_images=self.small_images,
        )

    def step_of(self, rival: Rival, batch: int) -> Step:
        """A rival's training step on a fixed batch of its own."""
        model = self.build(rival).to(self.device).to(memory_format=rival.memory_format)
        images, labels = self.images(rival, batch), torch.arange(batch) % self.classes
        graphs = Graphs(self.device) if rival.graph else None
        options = {"bf16": rival.bf16, "mode": rival.mode, "graphs": graphs}
        return training_step(model, images, labels.to(self.device), **options)

    def images(self, rival: Rival, batch: int) -> Tensor:
        """Random images, in the rival's memory layout."""
        shape = (batch, self.in_channels, self.size, self.size)
        generator = torch.Generator().manual_seed(batch)
        images = torch.randn(shape, generator=generator).to(self.device)
        return images.to(memory_format=rival.memory_format)
