"""A whole run: both steps, each from where it was left to its end."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tritonbnn.analysis import PROBE_IMAGES, Probe, Recorder
from tritonbnn.cli import UserError
from tritonbnn.compute import Compute
from tritonbnn.data.batches import (
    check_fits_memory,
    check_shared_memory,
    train_batches,
    train_steps,
    val_batches,
)
from tritonbnn.data.classes import warn_of_numbers
from tritonbnn.data.sources import Source, open_source
from tritonbnn.train.checkpoint import BEST, has_begun, read
from tritonbnn.train.config import SCRATCH, Config, data_settings, to_toml
from tritonbnn.train.distributed import World
from tritonbnn.train.engine import (
    Objective,
    evaluate,
    label_objective,
    teacher_objective,
    train_one_epoch,
)
from tritonbnn.train.keeper import Keeper, read_latest
from tritonbnn.train.log import Bar, Board, Line, describe, write_analysis, write_log
from tritonbnn.train.meters import FirstBad, TrainMeter
from tritonbnn.train.optim import (
    build_optimizer,
    describe_groups,
    learning_rate,
    warn_of_few_epochs,
)
from tritonbnn.train.rundir import step_folder
from tritonbnn.train.state import State
from tritonbnn.train.stop import StopSignals
from tritonbnn.train.teacher import load_teacher
from tritonbnn.train.weights import build, check_same_network, initialise_from, load_strictly

logger = logging.getLogger(__name__)


class StepRun:
    """One step of a run.

    Args:
        step: 1 or 2.
        config: of the run.
        source: of its images.
        folder: of the run.
        compute: device and precision.
        world: the processes of the job.
        signals: requests to stop.
    """

    def __init__(
        self,
        step: int,
        config: Config,
        source: Source,
        folder: Path,
        compute: Compute,
        world: World,
        signals: StopSignals,
    ) -> None:
        self.step, self.config, self.folder = step, config, folder
        self.compute, self.world = compute, world
        self.epochs = config.of_step(step).epochs
        self.source = source.of_step(step)
        self.network = _network(config, self.source, step)
        self.batches_per_epoch = train_steps(len(source.train), config.batch_size)
        self.state = self._new_state()
        self.bad = FirstBad(compute.device)
        self.keeper = Keeper(
            step_folder(folder, step),
            self.state,
            self._identity(),
            self.bad,
            world=world,
            signals=signals,
            save_minutes=config.save_minutes,
            log_interval=config.log_interval,
        )

    def train(self) -> list[Line]:
        """Train to the end of the step; the log lines of the run so far."""
        state = self.state
        if self.keeper.resume():
            self._tell_where()
        else:
            self._begin()
        if self.step == 2 or not has_begun(step_folder(self.folder, 2)):  # its log is longer
            self._write_log()
        self._write_analysis()
        if state.epoch >= self.epochs:
            return state.history
        objective, network = self._objective(), self._wrapped()
        board = Board(self.folder, self.step, state.epoch) if self.world.leads else None
        while state.epoch < self.epochs:
            line = self._epoch(network, objective)
            if board:
                board.add(line)
                logger.info("%s", describe(line, self.epochs))
        if board:
            board.close()
        return state.history

    def _new_state(self) -> State:
        config = self.config.of_step(self.step)
        torch.manual_seed(self.config.seed)
        model = build({**self.network, "plan": self.config.plan})
        if self.config.image_size % model.size_multiple:
            raise UserError(
                f"--image-size {self.config.image_size} does not suit the network:"
                f" use a multiple of {model.size_multiple}"
            )
        if self.config.sync_bn and self.world.size > 1:
            if self.compute.device.type != "cuda":
                raise UserError("--sync-bn needs CUDA: leave it out")
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.compute.place(model)
        optimizer = build_optimizer(self.config.optimizer, model, config.lr, config.weight_decay)
        return State(
            step=self.step,
            model=model,
            optimizer=optimizer,
            scaler=self.compute.scaler(),
            meter=TrainMeter(self.compute.device),
            analysis=Recorder(
                model,
                optimizer,
                level=self.config.analysis,
                interval=self.config.analysis_interval,
                probe=self._probe(),
            ),
        )

    def _probe(self) -> Probe | None:
        """The first validation images, alike in all processes and all runs."""
        if self.config.analysis == "off":
            return None
        images, labels = next(val_batches(self.source.val, batch_size=PROBE_IMAGES))
        return Probe(self.compute.to_device(images, labels)[0], self.compute.autocast)

    def _begin(self) -> None:
        """The weights that a step starts from, and the log that it goes on with."""
        state = self.state
        before = step_folder(self.folder, 1)
        if self.step == 2 and has_begun(before):
            self._take_over(before)
        elif self.config.init_from == SCRATCH:
            pass  # where the network was built, its weights were drawn
        elif self.config.init_from:
            place = Path(self.config.init_from)
            initialise_from(state.model, self.network, place, self.source.classes)
        elif self.step == 2:
            raise UserError(
                "step 2 starts from step 1's weights: run --step 1 first, or give --init-from"
            )
        state.analysis.begin_step()
        if self.world.leads:
            logger.info("step %d: %s", self.step, describe_groups(state.optimizer))
            warn_of_few_epochs(self.step, self.epochs)

    def _take_over(self, folder: Path) -> None:
        """Start from the best of step 1: its weights alone, with Adam and schedule anew."""
        last = read_latest(folder)
        done, wanted = last.facts["epoch"] if last else 0, self.config.step1.epochs
        if last is None or done < wanted:
            raise UserError(f"step 1 has done {done} of {wanted} epochs: run --step 1 first")
        best = read(folder / BEST)
        check_same_network(best, self.network)
        load_strictly(self.state.model, best)
        self.state.history = list(last.facts["history"])

    def _tell_where(self) -> None:
        if self.world.leads and self.state.epoch < self.epochs:
            logger.info(
                "step %d goes on in epoch %d after %d of %d optimiser steps",
                self.step,
                self.state.epoch + 1,
                self.state.batch,
                self.batches_per_epoch,
            )

    def _epoch(self, network: nn.Module, objective: Objective) -> Line:
        """Train, evaluate and save one epoch."""
        state, config = self.state, self.config.of_step(self.step)
        lr = learning_rate(config.lr, state.epoch, config.epochs)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        self._train_epoch(network, objective)
        line = self._measure(lr)
        self.keeper.check_loss()
        if state.best is None or line["val_top1"] > state.best["top1"]:
            state.best = {"epoch": line["epoch"], "top1": line["val_top1"]}
            self.keeper.save_best()
        state.history.append(line)
        state.epoch, state.batch, state.seconds = state.epoch + 1, 0, 0.0
        state.meter.clear()
        state.analysis.begin_epoch()
        self.keeper.save()
        self._write_log()
        self._write_analysis()
        return line

    def _train_epoch(self, network: nn.Module, objective: Objective) -> None:
        state, config, world = self.state, self.config, self.world
        batches = train_batches(
            self.source.train,
            seed=config.seed,
            step=self.step,
            epoch=state.epoch,
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            start_batch=state.batch,
            rank=world.rank,
            world_size=world.size,
            workers=config.workers,
            pin_memory=self.compute.device.type == "cuda",
        )
        title = f"step {self.step} epoch {state.epoch + 1}/{self.epochs}"
        bar = Bar(title, self.batches_per_epoch, state.batch, show=world.leads)
        before, began = state.seconds, time.monotonic()

        def after_step() -> None:
            state.seconds = before + time.monotonic() - began
            bar.advance()
            if bar.shown and state.batch % config.log_interval == 0:
                loss, right, images = state.meter.sums.tolist()
                speed = images * world.size / state.seconds
                bar.tell(loss / images, 100 * right / images, speed)
            self.keeper.after_step()

        try:
            train_one_epoch(
                state,
                network,
                batches,
                objective,
                self.compute,
                self.bad,
                world_size=world.size,
                after_step=after_step,
            )
        finally:
            bar.close()

    def _measure(self, lr: float) -> Line:
        """The epoch's log line."""
        state, world = self.state, self.world
        loss, right, images = world.total(state.meter.sums.cpu().clone()).tolist()
        world.share_buffers(state.model)
        batches = val_batches(
            self.source.val,
            batch_size=self.config.batch_size,
            rank=world.rank,
            world_size=world.size,
            workers=self.config.workers,
            pin_memory=self.compute.device.type == "cuda",
        )
        score = evaluate(state.model, self.keeper.watch(batches), self.compute, world)
        line = {
            "step": self.step,
            "epoch": state.epoch + 1,
            "lr": lr,
            "train_loss": loss / images,
            "train_top1": 100 * right / images,
            "val_loss": score.loss,
            "val_top1": score.top1,
            "val_top5": score.top5,
            "flips": state.analysis.flipped(),
            "images_per_second": images / state.seconds,
            "seconds": state.seconds,
        }
        record = state.analysis.record(state.epoch + 1)
        return line if record is None else {**line, "analysis": record}

    def _write_log(self) -> None:
        self.world.lead(lambda: write_log(self.folder, self.state.history))

    def _write_analysis(self) -> None:
        place = step_folder(self.folder, self.step)
        self.world.lead(lambda: write_analysis(place, self.state.analysis.rows()))

    def _objective(self) -> Objective:
        teacher = load_teacher(
            self.config.teacher,
            num_classes=len(self.source.classes),
            device=self.compute.device,
            channels=self.source.channels,
        )
        if teacher is None:
            return label_objective(self.config.label_smoothing)
        self.compute.place(teacher)
        return teacher_objective(teacher, self.compute)

    def _wrapped(self) -> nn.Module:
        """The model, or what exchanges its gradients with the other processes."""
        model = self.state.model
        if self.world.size == 1:
            return model
        # Each process feeds its own BatchNorm; the leading one's statistics are the model's.
        return DistributedDataParallel(model, broadcast_buffers=False)

    def _identity(self) -> dict[str, Any]:
        source, config = self.source, self.config
        return {
            "network": self.network,
            "data": source.facts,
            "config": to_toml(config),
        }


def open_images(config: Config) -> Source:
    """The run's data set; both steps use it."""
    source = open_source(
        config.dataset,
        image_size=config.image_size,
        augment=config.augment,
        lighting=config.lighting,
        seed=config.seed,
        step=config.steps[0],
        **data_settings(config),
    )
    check_fits_memory(source, config.batch_size // config.accumulation)
    check_shared_memory(source, config.batch_size, config.workers)
    if config.init_from not in ("", SCRATCH) or config.teacher != "none":
        warn_of_numbers(source.classes)
    source.load()
    return source


def _network(config: Config, source: Source, step: int) -> dict[str, Any]:
    return {
        "name": config.model,
        "num_classes": len(source.classes),
        "binary_weights": step == 2,
        "width": config.width,
        "in_channels": source.channels,
        "small_images": config.small_images,
    }
