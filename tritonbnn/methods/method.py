"""How a stage learns: the interface, with the plain case of everything but the loss."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tritonbnn.data.batches import MicroBatch
from tritonbnn.methods.scores import Evaluation, evaluate
from tritonbnn.methods.stage import Task
from tritonbnn.models import build_model
from tritonbnn.optim import build_optimizer


class Losses(NamedTuple):
    """What a method says about a batch.

    Attributes:
        each: the loss of each image, (N,). It is averaged over the whole optimiser step: over its
            parts and over all processes.
        logits: (N, classes) for the count of right answers; None where nothing is classified.
        extra: a penalty that knows no images. It counts once in an optimiser step.
    """

    each: Tensor
    logits: Tensor | None = None
    extra: Tensor | float = 0.0


@dataclass(frozen=True)
class NoSettings:
    """Of a method that has none."""


class Method:
    """How a stage learns. A method of a paper overrides what that paper changes.

    The trainer makes one for each stage and calls, in this order: :meth:`build`,
    :meth:`optimizer`, :meth:`begin` or :meth:`load_state_dict`, :meth:`prepare`. Then for every
    optimiser step, inside :meth:`passes`, :meth:`losses` once for each part of the batch; after
    that :meth:`before_update`, the optimiser's step, :meth:`after_update`. After each epoch
    :meth:`evaluate`.

    Args:
        settings: an instance of ``Settings``.
        task: the stage, its images, the device.
    """

    Settings: ClassVar[type] = NoSettings
    """The method's own settings: a frozen dataclass whose fields are made by ``setting``."""

    capturable: ClassVar[bool] = False
    """Whether ``losses`` does the same to tensors in every step, so that ``--graph`` may repeat it.

    Numbers on the host that change, as a step's count, would stay what they were when it was
    recorded. A subclass does not inherit this. The other methods are called in each step.
    """

    def __init__(self, settings: Any, task: Task) -> None:
        self.settings, self.task = settings, task

    @classmethod
    def build(cls, settings: Any, network: Mapping[str, Any]) -> nn.Module:
        """The network, on the CPU, with weights drawn from torch's global generator.

        It must depend on its arguments alone, as commands that read a checkpoint call it too.

        Args:
            settings: of the method.
            network: the arguments of ``build_model``.

        Raises:
            ValueError: the arguments make no network.
        """
        return build_model(**network)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The optimiser, over the network as it is trained."""
        stage = self.task.stage
        return build_optimizer(stage.optimizer, model, stage.lr, stage.weight_decay)

    def begin(self, model: nn.Module) -> None:
        """Called once in a stage, when the weights that it starts from are in place."""

    def prepare(self) -> None:
        """Called before the first pass, in a run that goes on too: get what training needs."""

    def losses(self, network: nn.Module, batch: MicroBatch) -> Losses:
        """The losses of a part of a batch, which is on the device.

        Args:
            network: the model, wrapped where several processes train it.
            batch: images (N, C, H, W) and labels (N,).
        """
        raise NotImplementedError

    def passes(self, model: nn.Module, optimizer: Optimizer) -> AbstractContextManager:
        """Around the forward and backward passes of an optimiser step.

        An optimiser that trains at other weights than it keeps, as IVON or weight prediction do,
        says so by a method ``passes`` of its own, which gives a context too.
        """
        own: Callable[[], AbstractContextManager] = getattr(optimizer, "passes", nullcontext)
        return own()

    def before_update(self, model: nn.Module) -> None:
        """Between the backward passes and the optimiser's step: gradients are whole, unscaled."""

    def after_update(self, model: nn.Module) -> None:
        """After the optimiser's step."""

    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
        """Score the model on batches that, over all processes, hold every image once."""
        return evaluate(model, batches, self.task.compute, self.task.world)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict that the best checkpoint holds: of the network that was scored."""
        return model.state_dict()

    def state_dict(self) -> dict[str, Tensor]:
        """What the method remembers from one optimiser step to the next."""
        return {}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave, now on the device; the model has its weights."""

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """The network's answers in the run's precision, as float32 at least."""
        with self.task.compute.autocast():
            logits = network(images)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
