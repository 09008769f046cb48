"""``python -m tritonbnn.train [RECIPE] [--key value ...]``: parse, build, run, report."""

import logging

from tritonbnn import cli, distributed
from tritonbnn.cli import printable
from tritonbnn.compute import Compute, choose_device, keep_freed_memory
from tritonbnn.stop import Stopped, StopSignals
from tritonbnn.train.arguments import Arguments, parse
from tritonbnn.train.checkpoint import BEST
from tritonbnn.train.log import Line, is_published, table
from tritonbnn.train.rundir import RunFolder, stage_folder
from tritonbnn.train.stage import Run, open_images, train_stage

logger = logging.getLogger("tritonbnn.train")


def main(argv: list[str]) -> int:
    """Train, or go on training. Returns the exit code."""
    arguments = parse(argv)
    with StopSignals(patient=distributed.launched()) as signals:
        return _run(arguments, signals)


def _run(arguments: Arguments, signals: StopSignals) -> int:
    config = arguments.config
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    try:
        with signals.obeyed_at_once():
            world = distributed.join(device)
    except Stopped as stopped:
        logger.info("stopped by %s before all processes were there", stopped.signal.name)
        return stopped.code
    run: RunFolder | None = world.lead(
        lambda: RunFolder(arguments.out, config, fresh=arguments.fresh, device=device)
    )
    folder = world.share(run.path if run else arguments.out)
    compute = Compute(device, config.precision, config.channels_last, config.compile)
    if not world.leads:  # it would say the same of the same files
        logging.getLogger("tritonbnn").setLevel(logging.ERROR)
    if world.leads:
        logger.info("%s on %s, in %s", config.recipe, device, folder)
    history: list[Line] = []
    try:
        with signals.obeyed_at_once():  # a large tree takes minutes
            source = open_images(config)
        this = Run(config, source, folder, compute, world, signals)
        for stage in config.chosen:
            history = train_stage(stage, this)
    except Stopped as stopped:
        if world.leads:
            logger.info(
                "stopped by %s; all is saved in %s: run the same command again to go on",
                stopped.signal.name,
                folder,
            )
        return stopped.code
    if world.leads:
        published = is_published(config, len(source.classes))
        print(table(history, config.stages, published=published))
        print(f"best weights: {printable(stage_folder(folder, config.chosen[-1].name) / BEST)}")
    distributed.leave()
    return 0


if __name__ == "__main__":
    cli.run(main)
