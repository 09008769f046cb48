"""A recipe trained from several seeds: the spread that one run cannot show.

    python -m benchmarks.seeds digits --seeds 5
    python -m benchmarks.seeds fashion --seeds 1 --epochs 3
    python -m benchmarks.seeds digits --seeds 5 --expert
    python -m benchmarks.seeds digits --seeds 5 --obvious

Each run is the command that a user would type, in a folder of its own under --out; a run that is
already there is resumed, or read if it is finished. With --expert or --obvious it is that
network's, which starts over.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import torch

from tritonbnn import cli
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.provenance import header
from tritonbnn.train.checkpoint import with_stage

TRAINERS = {
    "ours": ["tritonbnn.train"],
    "expert": ["benchmarks.train_obvious", "--expert"],
    "obvious": ["benchmarks.train_obvious"],
}
"""By network: the module to run, and its first arguments."""


def train(network: str, recipe: str, seed: int, out: Path, flags: list[str]) -> list[dict]:
    """Train one seed to its end; its log, a dictionary per epoch.

    Args:
        network: one of ``TRAINERS``.
        recipe: of the trainer.
        seed: of the run.
        out: where the run's folder goes.
        flags: more arguments of the trainer.

    Raises:
        cli.UserError: the run failed; it has said why.
    """
    folder = out / f"{network}-{recipe}-seed{seed}"
    command = [sys.executable, "-m", *TRAINERS[network], recipe, "--seed", str(seed)]
    done = subprocess.run([*command, "--out", str(folder), *flags], check=False)
    if done.returncode:
        raise cli.UserError(f"seed {seed} ended with exit code {done.returncode}")
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [with_stage(json.loads(line)) for line in lines]


def summary(logs: dict[int, list[dict]]) -> dict:
    """Accuracy of the last epoch of each step by seed, and its mean and range."""
    result = {}
    for stage in ("step1", "step2"):
        epochs = {seed: [e for e in log if e["stage"] == stage] for seed, log in logs.items()}
        last = {seed: round(e[-1]["val_top1"], 2) for seed, e in epochs.items()}
        result[stage] = {
            "epochs": max(len(e) for e in epochs.values()),
            "last_top1_by_seed": last,
            "mean": round(mean(last.values()), 2),
            "lowest": min(last.values()),
            "highest": max(last.values()),
            "training_minutes": {
                seed: round(sum(line["seconds"] for line in e) / 60, 2)
                for seed, e in epochs.items()
            },
        }
    return result


def main(argv: list[str]) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.seeds",
        description=__doc__.split("\n")[0],
        epilog="Any other flag goes to the trainer.",
    )
    parser.add_argument("recipe", help="a recipe's name")
    parser.add_argument("--seeds", type=cli.at_least(1), default=5, help="how many, from 0")
    rivals = parser.add_mutually_exclusive_group()
    rivals.add_argument("--expert", action="store_true", help="train the expert's network")
    rivals.add_argument("--obvious", action="store_true", help="train the obvious network")
    parser.add_argument(
        "--threads", type=cli.at_least(1), default=torch.get_num_threads(), help="of each run"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="write the result here")
    args, flags = parser.parse_known_args(argv)
    path = writable(args.json)
    network = "expert" if args.expert else "obvious" if args.obvious else "ours"
    torch.set_num_threads(args.threads)  # for the header
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the runs
    logs = {seed: train(network, args.recipe, seed, args.out, flags) for seed in range(args.seeds)}
    said = [args.recipe, "--seeds", str(args.seeds)]
    said += [f"--{network}"] * (network != "ours") + flags
    result = header("python -m benchmarks.seeds " + " ".join(said)) | summary(logs)
    print(json.dumps(result, indent=2))
    if path:
        write_json(path, result)
    return 0


if __name__ == "__main__":
    cli.run(main)
