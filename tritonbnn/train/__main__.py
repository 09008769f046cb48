"""``python -m tritonbnn.train [RECIPE] [--key value ...]``: parse, run, report."""

from tritonbnn import cli
from tritonbnn.cli import printable
from tritonbnn.stop import Stopped
from tritonbnn.train.arguments import parse
from tritonbnn.train.config import tuned_shapes
from tritonbnn.train.job import train
from tritonbnn.train.log import is_published, table
from tritonbnn.tuning import tune


def main(argv: list[str]) -> int:
    """Train, or go on training. Returns the exit code."""
    arguments = parse(argv)
    if arguments.tune is not None:
        tune(arguments.config.device, **tuned_shapes(arguments.config), minutes=arguments.tune)
    try:
        trained = train(arguments.config, arguments.out, fresh=arguments.fresh)
    except Stopped as stopped:
        return stopped.code
    if trained.leads:
        config = trained.config
        published = is_published(config, len(trained.classes))
        print(table(trained.history, config.stages, published=published))
        print(f"best weights: {printable(trained.best)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
