"""The obvious network trained by a recipe: what ours is to match in accuracy.

    python -m benchmarks.train_obvious digits --seed 0 --out runs/obvious

The same images in the same order, the same schedule and starting weights drawn the same way, fused
Adam and malloc as our trainer sets it. The network is :mod:`benchmarks.baseline`'s, or another with
its parameters, and the loop is as one writes it first: one device, no resuming.
"""

import time

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.baseline import ObviousReActNetA
from tritonbnn import cli
from tritonbnn.compute import Compute, choose_device, keep_freed_memory
from tritonbnn.data.batches import train_batches, val_batches
from tritonbnn.data.sources import Source
from tritonbnn.distributed import World
from tritonbnn.methods import evaluate
from tritonbnn.optim import set_learning_rate
from tritonbnn.train.arguments import parse
from tritonbnn.train.config import Config
from tritonbnn.train.job import open_images
from tritonbnn.train.log import Line, write_log
from tritonbnn.train.run_folder import RunFolder


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The published parameter groups: what has four dimensions is decayed."""
    decayed = [p for p in model.parameters() if p.dim() == 4]
    others = [p for p in model.parameters() if p.dim() != 4]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others}]


def train_step(
    step: int,
    config: Config,
    source: Source,
    compute: Compute,
    weights: dict | None,
    network: type[ObviousReActNetA] = ObviousReActNetA,
) -> tuple[list[Line], dict]:
    """Train one step of the schedule.

    Args:
        step: 1 or 2.
        config: of the recipe; its labels are used, as they are.
        source: of the images of both steps.
        compute: device and precision.
        weights: a state dict to start from, or None for the network's own.
        network: what is trained.

    Returns:
        Log lines, one an epoch, and the weights of the best one.
    """
    settings, source = config.stage(f"step{step}"), source.of_step(step)
    torch.manual_seed(config.seed)
    model = network(
        num_classes=len(source.classes),
        binary_weights=step == 2,
        width=config.width,
        in_channels=source.channels,
        small_images=config.small_images,
    )
    if weights:
        model.load_state_dict(weights)
    compute.place(model)
    optimizer = torch.optim.Adam(groups(model, settings.weight_decay), lr=settings.lr, fused=True)
    lines: list[Line] = []
    best: dict = {}
    for epoch in range(settings.epochs):
        lr = settings.lr * settings.schedule.settings(epoch, settings.epochs)
        set_learning_rate(optimizer, lr)
        began = time.monotonic()
        line = {"stage": settings.name, "epoch": epoch + 1, "lr": lr}
        line |= _train_epoch(model, optimizer, step, epoch, config, source, compute)
        line["seconds"] = time.monotonic() - began
        line["images_per_second"] = len(source.train) / line["seconds"]  # type: ignore[arg-type]
        batches = val_batches(source.val, batch_size=config.batch_size)
        score = evaluate(model, batches, compute, World())
        line |= {"val_loss": score.loss, "val_top1": score.top1, "val_top5": score.top5}
        if line["val_top1"] > max((before["val_top1"] for before in lines), default=-1):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        lines.append(line)
        print(f"step {step} epoch {epoch + 1}/{settings.epochs}: {score.top1:.2f} %", flush=True)
    return lines, best


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    epoch: int,
    config: Config,
    source: Source,
    compute: Compute,
) -> Line:
    order = {"seed": config.seed, "step": step, "epoch": epoch, "workers": config.workers}
    total = torch.zeros(3, device=compute.device)
    model.train()
    for batch in train_batches(source.train, batch_size=config.batch_size, **order):
        images, labels = compute.to_device(batch.images, batch.labels)
        with compute.autocast():
            logits = model(images).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        right = (logits.argmax(dim=1) == labels).sum()
        total += torch.stack([losses.detach().sum(), right, torch.tensor(len(labels)).to(right)])
    loss, right, images_seen = total.tolist()
    return {"train_loss": loss / images_seen, "train_top1": 100 * right / images_seen}


def main(argv: list[str]) -> int:
    return train(argv, ObviousReActNetA)


def train(argv: list[str], network: type[ObviousReActNetA]) -> int:
    """Train a network by the trainer's command line; its folder has a log, and no checkpoint."""
    arguments = parse(argv)
    config = arguments.config
    plain = all(stage.method.name == "plain" for stage in config.stages)
    if not plain or config.names != ("step1", "step2") or config.model != "reactnet_a":
        raise cli.UserError("the obvious code trains reactnet_a in two steps, on plain labels")
    compute = Compute(choose_device(config.device), config.precision, config.channels_last)
    if compute.device.type == "cpu":
        keep_freed_memory()
    source = open_images(config)
    folder = RunFolder(arguments.out, config, fresh=arguments.fresh, device=compute.device)
    history: list[Line] = []
    weights: dict | None = None
    for step in (config.number(stage) for stage in config.chosen):
        lines, weights = train_step(step, config, source, compute, weights, network)
        history += lines
        write_log(folder.path, history)
    return 0


if __name__ == "__main__":
    cli.run(main)
