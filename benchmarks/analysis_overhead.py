"""What ``--analysis light`` adds to a training step, as a share of it, in one run.

    python -m benchmarks.analysis_overhead --recipe digits --images 1437

A round trains one interval of steps. Then it counts the flips of an update, which a run does after
every one, takes one look, and makes one epoch's record. Each is timed by itself: as the difference
of two step times, one percent would drown in the machine's noise. They alternate, so that a change
in its load hits all of them. On a GPU each is waited for, which a run does not do: the share is an
upper bound there.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.output import command
from tritonbnn import cli
from tritonbnn.analysis import PROBE_IMAGES, Probe, Recorder
from tritonbnn.compute import Compute
from tritonbnn.data.batches import MicroBatch, train_steps
from tritonbnn.data.sources import SOURCES
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.provenance import header, own_device
from tritonbnn.methods import lone_task
from tritonbnn.methods.plain import Plain
from tritonbnn.models import build_model
from tritonbnn.optim import build_optimizer
from tritonbnn.train.arguments import parse
from tritonbnn.train.checkpoint import State
from tritonbnn.train.config import Config
from tritonbnn.train.engine import FirstBad, train_one_epoch
from tritonbnn.train.log import Board

CLASSES = 10


class Rig:
    """A network in training on random images, and a recorder of its own beside it."""

    def __init__(self, config: Config, device: torch.device, folder: Path) -> None:
        torch.manual_seed(0)
        self.compute = Compute(device, config.precision, config.channels_last)
        channels = SOURCES[config.dataset].channels
        model = build_model(
            config.model,
            num_classes=CLASSES,
            width=config.width,
            in_channels=channels,
            small_images=config.small_images,
        )
        self.compute.place(model)
        optimizer = build_optimizer("adam", model, config.stages[-1].lr)
        size = (config.image_size, config.image_size)
        images = torch.randn(config.batch_size, channels, *size)
        labels = torch.randint(CLASSES, (config.batch_size,))
        batch = MicroBatch(images, labels, len(images), len(images), last=True)
        self.batches = [batch] * config.analysis_interval
        method = Plain(Plain.Settings(), lone_task(self.compute))
        self.state = State.new(method, model, optimizer)
        probe = Probe(torch.randn(PROBE_IMAGES, channels, *size, device=device))
        self.recorder = Recorder(model, optimizer, level="light", probe=probe)
        self.recorder.begin_step()
        self.board = Board(folder, "step2", 0)

    def train(self) -> None:
        """One interval of optimiser steps, none of them looked at."""
        train_one_epoch(
            self.state,
            self.state.model,
            self.batches,
            FirstBad(self.compute.device),
            after_step=lambda: None,
        )

    def backward(self) -> None:
        """Gradients to look at."""
        images, labels = self.compute.to_device(self.batches[0].images, self.batches[0].labels)
        with self.compute.autocast():
            logits = self.state.model(images)
        torch.nn.functional.cross_entropy(logits, labels).backward()

    def record(self) -> None:
        """What an epoch ends with, the drawing included."""
        self.board.add({"epoch": 1, "analysis": self.recorder.record(1)})
        self.recorder.begin_epoch()

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of a call, the device's work for it included."""
        start = time.perf_counter()
        call()
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def round(self) -> dict[str, float]:
        """Seconds of a step, of counting flips, of the rest of a look, and of a record."""
        step = self.timed(self.train) / len(self.batches)
        self.backward()
        look = self.timed(self.recorder.before_update)
        self.state.optimizer.step()
        count = self.timed(lambda: self.recorder.after_update(looked=False))
        look += self.timed(lambda: self.recorder.after_update(looked=True)) - count
        self.state.optimizer.zero_grad()
        record = self.timed(self.record)
        return {"step": step, "count": count, "look": look, "record": record}


def measure(config: Config, images: int, rounds: int, device: torch.device) -> dict:
    """Medians, and what they come to as a share of a step."""
    with TemporaryDirectory() as folder:
        rig = Rig(config, device, Path(folder))
        rig.round()
        times = [rig.round() for _ in range(rounds)]
        rig.board.close()
    middle = {name: median(each[name] for each in times) for name in times[0]}
    steps = train_steps(images, config.batch_size)
    looks = -(-steps // config.analysis_interval)
    added = middle["count"] + (looks * middle["look"] + middle["record"]) / steps
    return {
        "network": f"{config.model}, width {config.width:g}, {config.image_size}x"
        f"{config.image_size}, batch {config.batch_size}",
        "interval": config.analysis_interval,
        "steps_per_epoch": steps,
        "rounds": rounds,
        "median_seconds": {name: round(value, 5) for name, value in middle.items()},
        "share_of_step": round(added / middle["step"], 5),
    }


def main(argv: list[str]) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.analysis_overhead",
        description=__doc__.split("\n")[0],
        epilog="Any other flag goes to python -m tritonbnn.train.",
    )
    parser.add_argument("--recipe", default="digits", help="gives network, images and batch")
    parser.add_argument(
        "--images", type=cli.at_least(1), default=1437, help="in an epoch, with its one record"
    )
    parser.add_argument("--rounds", type=cli.at_least(1), default=7, help="of turns")
    parser.add_argument("--device", default=own_device(), help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the result here")
    args, flags = parser.parse_known_args(argv)
    path = writable(args.json)
    config = parse([args.recipe, *flags]).config
    result = measure(config, args.images, args.rounds, torch.device(args.device))
    result = header(command("analysis_overhead", argv)) | result
    print(json.dumps(result, indent=2))
    if path:
        write_json(path, result)
    return 0


if __name__ == "__main__":
    cli.run(main)
