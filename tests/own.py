"""What a user writes beside her recipe: methods and an optimiser of her own, as docs tell her.

Tests copy this file into the folder of a run, where commands find it as ``own``.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from tritonbnn.methods import Evaluation, Losses, Method
from tritonbnn.methods.plain import Plain
from tritonbnn.settings import setting


class Clip(Plain):
    """Labels, with the gradient's norm held below a limit."""

    @dataclass(frozen=True)
    class Settings(Plain.Settings):
        limit: float = setting(1.0, "largest norm of the gradient", above=0)

    def before_update(self, model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), self.settings.limit)


class Averaged(Plain):
    """Scored by a running mean of its weights, and trained at drawn ones near them."""

    def begin(self, model: nn.Module) -> None:
        self.mean = {name: p.detach().clone() for name, p in model.named_parameters()}

    @contextmanager
    def passes(self, model: nn.Module, optimizer: Optimizer):
        kept = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1e-4 * torch.randn(p.shape))
        yield
        with torch.no_grad():
            for p, before in zip(model.parameters(), kept, strict=True):
                p.copy_(before)

    def after_update(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            self.mean[name].lerp_(p.detach(), 0.1)

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {**model.state_dict(), **self.mean}

    def evaluate(self, model: nn.Module, batches) -> Evaluation:
        averaged = copy.deepcopy(model)
        averaged.load_state_dict(self.weights(model))
        return super().evaluate(averaged, batches)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.mean

    def load_state_dict(self, saved: dict[str, torch.Tensor]) -> None:
        self.mean = saved


class Reconstruct(Method):
    """Knows no classes: the logits are to be the image's mean brightness, and small."""

    def losses(self, network: nn.Module, batch) -> Losses:
        wanted = batch.images.mean(dim=(1, 2, 3))
        answers = self.logits(network, batch.images)
        penalty = 1e-3 * sum(p.square().sum() for p in network.parameters())
        return Losses((answers.mean(dim=1) - wanted).square(), extra=penalty)

    def evaluate(self, model: nn.Module, batches) -> Evaluation:
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for images, _ in batches:
                wanted = images.mean(dim=(1, 2, 3))
                errors = (self.logits(model, images).mean(dim=1) - wanted).square()
                sums += torch.stack((errors.double().sum(), torch.tensor(float(len(images)))))
        loss, images_seen = self.task.world.total(sums).tolist()
        return Evaluation(loss / images_seen, None, None, int(images_seen))


class Lion(Optimizer):
    """Sign of an interpolated momentum (2302.06675), with a count and noise of its own."""

    def __init__(self, params, lr: float, beta: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                    state["updates"] = 0
                state["updates"] += 1
                update = state["momentum"].lerp(p.grad, 0.1).sign()
                noise = torch.rand(p.shape) / state["updates"]
                p.sub_(group["lr"] * 0.1 * (update + 0.1 * noise))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["momentum"].lerp_(p.grad, 1 - group["beta"])


class Lists(Lion):
    """Keeps what no checkpoint can hold."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["seen"] = [1]


class NoMethod:
    """Named like one."""
