"""One stage of a run, from where it was left to its end."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritonbnn.analysis import PROBE_IMAGES, Probe, Recorder
from tritonbnn.cli import UserError
from tritonbnn.compute import Compute
from tritonbnn.data.ahead import ahead
from tritonbnn.data.batches import train_batches, train_steps, val_batches
from tritonbnn.data.sources import Source
from tritonbnn.distributed import World, exchanging_gradients
from tritonbnn.methods import Method, Stage, Task, make_method
from tritonbnn.optim import describe_groups, set_learning_rate
from tritonbnn.stop import StopSignals
from tritonbnn.train.captured import CapturedStep
from tritonbnn.train.checkpoint import BEST, State, has_begun, history, read, stage_folder
from tritonbnn.train.config import SCRATCH, Config, to_toml
from tritonbnn.train.engine import FirstBad, Step, check_parts, take_step, train_one_epoch
from tritonbnn.train.graphs import Graphs
from tritonbnn.train.keeper import Keeper, other_data, read_latest
from tritonbnn.train.log import Bar, Board, Line, describe, write_analysis, write_log
from tritonbnn.train.weights import build, check_same_network, initialise_from, load_strictly

logger = logging.getLogger(__name__)

_FEW_EPOCHS = 3


@dataclass(frozen=True, eq=False)
class Run:
    """What all stages of a run share.

    Attributes:
        config: of the run.
        source: of its images.
        images: which ones they are, see :meth:`Source.identity`.
        folder: of the run.
        compute: device and precision.
        world: the processes of the job.
        signals: requests to stop.
    """

    config: Config
    source: Source
    images: dict[str, Any]
    folder: Path
    compute: Compute
    world: World
    signals: StopSignals


def train_stage(stage: Stage, run: Run) -> list[Line]:
    """Train a stage to its end; the log lines of the run so far."""
    config, world, place = run.config, run.world, stage_folder(run.folder, stage.name)
    source = run.source.of_step(config.number(stage))
    task = Task(stage, _network(config, source, stage), config.plan, source, run.compute, world)
    method = make_method(task)
    model = _build(method, run)
    state = _new_state(method, model, run)
    keeper = Keeper(
        place,
        state,
        _identity(task, run),
        FirstBad(run.compute.device),
        world=world,
        signals=run.signals,
        save_minutes=config.save_minutes,
        log_interval=config.log_interval,
    )
    before = keeper.resume(stage.epochs)
    if before is None:
        _begin(state, task, run)
    elif world.leads and state.epoch < stage.epochs:
        logger.info(
            "%s goes on in epoch %d after %d of %d optimiser steps",
            *(stage.name, state.epoch + 1, state.batch),
            train_steps(len(source.train), config.batch_size),
        )
    earlier, later = _other_lines(stage, run)

    def write() -> list[Line]:
        """Make the run's log and the stage's analysis say what the checkpoint says."""
        lines = [*earlier, *state.history, *later]
        world.lead(lambda: write_log(run.folder, lines))
        world.lead(lambda: write_analysis(place, state.analysis.rows()))
        return lines

    lines = write()  # a run that was killed may have saved an epoch and not told
    if state.epoch >= stage.epochs:
        return lines

    method.prepare()
    network = exchanging_gradients(model) if world.size > 1 else model
    take = _step(state, run)
    board = Board(run.folder, stage.name, state.epoch) if world.leads else None
    # what an optimiser keeps in its groups goes on within an epoch; format 1 did not save groups
    keeps_rate = before is not None and "optimizer" in before.facts
    while state.epoch < stage.epochs:
        lr = stage.lr * stage.schedule.settings(state.epoch, stage.epochs)
        if state.batch == 0 or not keeps_rate:
            set_learning_rate(state.optimizer, lr)
        _train_epoch(state, network, keeper, source, run, take)
        line = _measure(state, keeper, lr, source, run)
        _end_epoch(state, keeper, line)
        lines = write()
        if board:
            board.add(line)
            logger.info("%s", describe(line, stage.epochs))
    if board:
        board.close()
    return lines


def _network(config: Config, source: Source, stage: Stage) -> dict[str, Any]:
    return {
        "name": config.model,
        "num_classes": len(source.classes),
        "binary_weights": stage.binary_weights,
        "width": config.width,
        "in_channels": source.channels,
        "small_images": config.small_images,
    }


def _identity(task: Task, run: Run) -> dict[str, Any]:
    """What tells of a checkpoint how its network was built, and what it was shown."""
    return {
        "network": dict(task.network),
        "method": task.stage.method.table(),
        "data": run.source.facts,
        "images": run.images,
        "config": to_toml(run.config),
    }


def _build(method: Method, run: Run) -> nn.Module:
    """The stage's network on its device, with weights that the seed decides."""
    config, task = run.config, method.task
    torch.manual_seed(config.seed)
    model = build({**task.network, "plan": task.plan}, type(method), method.settings)
    multiple = getattr(model, "size_multiple", 1)  # a method's own network may take any size
    if config.image_size % multiple:
        raise UserError(
            f"--image-size {config.image_size} does not suit the network:"
            f" use a multiple of {multiple}"
        )
    if config.sync_bn and run.world.size > 1:
        if run.compute.device.type != "cuda":
            raise UserError("--sync-bn needs CUDA: leave it out")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    check_parts(model, run.source, config, run.world)
    run.compute.place(model)
    return model


def _new_state(method: Method, model: nn.Module, run: Run) -> State:
    optimizer = method.optimizer(model)
    recorder = Recorder(
        model,
        optimizer,
        level=run.config.analysis,
        interval=run.config.analysis_interval,
        probe=_probe(run),
    )
    return State.new(method, model, optimizer, recorder)


def _probe(run: Run) -> Probe | None:
    """The first validation images, alike in all processes and all runs."""
    if run.config.analysis == "off":
        return None
    images, labels = next(val_batches(run.source.val, batch_size=PROBE_IMAGES))
    return Probe(run.compute.to_device(images, labels)[0], run.compute.autocast)


def _begin(state: State, task: Task, run: Run) -> None:
    """The weights that a stage starts from."""
    stage, config = task.stage, run.config
    earlier = config.names[: config.number(stage) - 1]
    # only the first stage of this command starts from somewhere else than the recipe says
    other = config.init_from if stage == config.chosen[0] else ""
    if stage.start in earlier and has_begun(stage_folder(run.folder, stage.start)):
        _take_over(state, config.stage(stage.start), task, run)
    elif other == SCRATCH:
        pass  # where the network was built, its weights were drawn
    elif other:
        initialise_from(state.model, dict(task.network), Path(other), run.source.classes)
    elif stage.start in earlier:
        raise UserError(
            f"{stage.name} starts from the weights of {stage.start}:"
            f" run --stage {stage.start} first, or give --init-from"
        )
    elif stage.start:
        initialise_from(state.model, dict(task.network), Path(stage.start), run.source.classes)
    state.method.begin(state.model)
    state.analysis.begin_step()
    if run.world.leads:
        logger.info("%s: %s", stage.name, describe_groups(state.optimizer))
        _warn_of_few_epochs(stage)


def _take_over(state: State, before: Stage, task: Task, run: Run) -> None:
    """Start from the best of an earlier stage: its weights alone, with optimiser and rate anew."""
    folder = stage_folder(run.folder, before.name)
    last = read_latest(folder)
    done = last.facts["epoch"] if last else 0
    if last is None or done < before.epochs:
        raise UserError(
            f"{before.name} has done {done} of {before.epochs} epochs:"
            f" run --stage {before.name} first"
        )
    best = read(folder / BEST)
    if changes := other_data(best, _identity(task, run)):
        told = "; ".join(changes.values())
        logger.warning("%s takes over weights of other data: %s", task.stage.name, told)
    check_same_network(best, dict(task.network))
    load_strictly(state.model, best)


def _other_lines(stage: Stage, run: Run) -> tuple[list[Line], list[Line]]:
    """The log of the stages before this one, and of those after it, as far as they have got."""
    lines = {name: history(stage_folder(run.folder, name), name) for name in run.config.names}
    number = run.config.number(stage)
    before, after = run.config.names[: number - 1], run.config.names[number:]
    return [x for name in before for x in lines[name]], [x for name in after for x in lines[name]]


def _warn_of_few_epochs(stage: Stage) -> None:
    """A schedule's last epoch may be at learning rate 0, which short runs notice."""
    epochs = stage.epochs
    if epochs < _FEW_EPOCHS and stage.schedule.settings(epochs - 1, epochs) == 0:
        logger.warning(
            "%s has %d epoch%s, and no weight moves in the last one (its learning rate is 0,"
            " as published): give it at least %d",
            stage.name,
            epochs,
            "" if epochs == 1 else "s",
            _FEW_EPOCHS,
        )


def _step(state: State, run: Run) -> Step:
    """What takes the optimiser steps of a stage."""
    if not run.config.graph:
        return take_step
    full = min(run.config.batch_size, len(run.source.train))
    return CapturedStep(state, full, Graphs(run.compute.device))


def _train_epoch(
    state: State, network: nn.Module, keeper: Keeper, source: Source, run: Run, take: Step
) -> None:
    """Train the rest of an epoch, with a bar for whoever watches."""
    config, stage, world = run.config, state.method.task.stage, run.world
    batches = train_batches(
        source.train,
        seed=config.seed,
        step=config.number(stage),
        epoch=state.epoch,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        start_batch=state.batch,
        rank=world.rank,
        world_size=world.size,
        workers=config.workers,
        pin_memory=run.compute.on_gpu,
        levels=run.compute.on_gpu,
    )
    steps = train_steps(len(source.train), config.batch_size)
    title = f"{stage.name} epoch {state.epoch + 1}/{stage.epochs}"
    bar = Bar(title, steps, state.batch, show=world.leads, minutes=config.log_minutes)
    after_step = _after_step(state, keeper, bar, run)
    try:
        train_one_epoch(
            state,
            network,
            ahead(batches, run.compute.device),
            keeper.bad,
            after_step=after_step,
            watch=keeper.watch,
            take=take,
        )
    finally:
        bar.close()


def _after_step(state: State, keeper: Keeper, bar: Bar, run: Run) -> Callable[[], None]:
    """What comes after each optimiser step: the clock, the bar, and perhaps a save or a stop."""
    before, began = state.seconds, time.monotonic()

    def after_step() -> None:
        state.seconds = before + time.monotonic() - began
        bar.advance()
        if state.batch % run.config.log_interval == 0 and bar.due:
            sums = state.meter.sums * run.world.size  # about; the others have as many images
            bar.tell(state.batch, state.seconds, sums.tolist())
        keeper.after_step()

    return after_step


def _measure(state: State, keeper: Keeper, lr: float, source: Source, run: Run) -> Line:
    """The epoch's log line."""
    world = run.world
    loss, right, images = world.total(state.meter.sums.cpu().clone()).tolist()
    world.share_buffers(state.model)
    batches = val_batches(
        source.val,
        batch_size=run.config.batch_size,
        rank=world.rank,
        world_size=world.size,
        workers=run.config.workers,
        pin_memory=run.compute.on_gpu,
        levels=run.compute.on_gpu,
    )
    coming = keeper.watch(ahead(batches, run.compute.device))
    score = state.method.evaluate(state.model, (run.compute.to_device(*each) for each in coming))
    line = {
        "stage": state.stage,
        "epoch": state.epoch + 1,
        "lr": lr,
        "train_loss": loss / images,
        "train_top1": None if math.isnan(right) else 100 * right / images,
        "val_loss": score.loss,
        "val_top1": score.top1,
        "val_top5": score.top5,
        "flips": state.analysis.flipped(),
        "images_per_second": images / state.seconds,
        "seconds": state.seconds,
    }
    record = state.analysis.record(state.epoch + 1)
    return line if record is None else {**line, "analysis": record}


def _end_epoch(state: State, keeper: Keeper, line: Line) -> None:
    """Save what the epoch made, and the best of all in a file of its own."""
    keeper.check_loss()
    # a method that classifies nothing has no top-1: its least loss is best
    what = "loss" if line["val_top1"] is None else "top1"
    merit = line[f"val_{what}"]
    better = state.best is None or (
        merit < state.best[what] if what == "loss" else merit > state.best[what]
    )
    if better:
        state.best = {"epoch": line["epoch"], what: merit}
        keeper.save_best()
    state.history.append(line)
    state.begin_epoch(state.epoch + 1)
    keeper.save()
