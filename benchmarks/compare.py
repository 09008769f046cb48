"""``python -m tritonbnn.compare`` with what it ran on, and with rivals that no recipe names.

    python -m benchmarks.compare digits --seeds 5 --json digits.json
    python -m benchmarks.compare digits --seeds 5 --rivals bf16,expert,obvious --json digits.json
    python -m benchmarks.compare optimisers decay steps --json paper_digits.json

A rival is a row more for each recipe: the recipe in bf16, or the same training of the expert's or
the obvious network. Those two start a run over where it was stopped. Finished runs are kept.
"""

import os

import torch

from benchmarks.output import command
from tritonbnn import cli
from tritonbnn.cli import UserError
from tritonbnn.compare.__main__ import main as compare
from tritonbnn.compare.__main__ import parse
from tritonbnn.compare.sets import Row
from tritonbnn.kernels.provenance import header

RIVALS = {
    "bf16": {"title": "activations in bf16", "flags": ("--precision", "bf16")},
    "expert": {"title": "the expert's network", "module": "benchmarks.train_expert"},
    "obvious": {"title": "the obvious network", "module": "benchmarks.train_obvious"},
}
"""What is other in their rows."""


def main(argv: list[str]) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.compare",
        description=__doc__.split("\n")[0],
        epilog="Any other argument goes to python -m tritonbnn.compare.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--rivals", default="", help=f"of {', '.join(RIVALS)}, parted by commas")
    parser.add_argument(
        "--threads", type=cli.at_least(1), default=torch.get_num_threads(), help="of each run"
    )
    args, rest = parser.parse_known_args(argv)
    names = [name for name in args.rivals.split(",") if name]
    for name in names:
        if name not in RIVALS:
            raise UserError(f"--rivals {name}: choose from {', '.join(RIVALS)}")
    torch.set_num_threads(args.threads)  # for the header
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the runs
    recipes = parse(rest)[0].recipes
    more = [Row(f"{r}-{name}", r, **RIVALS[name]) for r in recipes for name in names]
    return compare(rest, more, header(command("compare", argv)))


if __name__ == "__main__":
    cli.run(main)
