"""A recipe trained from several seeds: the spread that one run cannot show.

    python -m benchmarks.seeds digits --seeds 5
    python -m benchmarks.seeds fashion --seeds 1 --epochs 3
    python -m benchmarks.seeds digits --seeds 5 --obvious

Each run is the command that a user would type, in a folder of its own under --out; a run that is
already there is resumed, or read if it is finished. With --obvious it is the obvious network's,
which starts over.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from tritonbnn import cli
from tritonbnn.kernels.provenance import header
from tritonbnn.train.files import writable, write_json


def train(trainer: str, recipe: str, seed: int, out: Path, flags: list[str]) -> list[dict]:
    """Train one seed to its end; its log, a dictionary per epoch.

    Args:
        trainer: the module to run.
        recipe: its first argument.
        seed: of the run.
        out: where the run's folder goes.
        flags: more arguments of the trainer.

    Raises:
        cli.UserError: the run failed; it has said why.
    """
    folder = out / f"{trainer.rpartition('.')[2]}-{recipe}-seed{seed}"
    command = [sys.executable, "-m", trainer, recipe, "--seed", str(seed)]
    done = subprocess.run([*command, "--out", str(folder), *flags], check=False)
    if done.returncode:
        raise cli.UserError(f"seed {seed} ended with exit code {done.returncode}")
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def summary(logs: dict[int, list[dict]]) -> dict:
    """Accuracy of the last epoch of each step by seed, and its mean and range."""
    result = {}
    for step in (1, 2):
        epochs = {seed: [e for e in log if e["step"] == step] for seed, log in logs.items()}
        last = {seed: round(e[-1]["val_top1"], 2) for seed, e in epochs.items()}
        result[f"step{step}"] = {
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
    parser.add_argument("--obvious", action="store_true", help="train the obvious network")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="write the result here")
    args, flags = parser.parse_known_args(argv)
    path = writable(args.json)
    trainer = "benchmarks.train_obvious" if args.obvious else "tritonbnn.train"
    logs = {seed: train(trainer, args.recipe, seed, args.out, flags) for seed in range(args.seeds)}
    said = [args.recipe, "--seeds", str(args.seeds), *["--obvious"] * args.obvious, *flags]
    result = header("python -m benchmarks.seeds " + " ".join(said)) | summary(logs)
    print(json.dumps(result, indent=2))
    if path:
        write_json(path, result)
    return 0


if __name__ == "__main__":
    cli.run(main)
