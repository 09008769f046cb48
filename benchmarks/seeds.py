"""A recipe trained from several seeds: the spread that one run cannot show.

    python -m benchmarks.seeds digits --seeds 5
    python -m benchmarks.seeds fashion --seeds 1 --epochs 3

Each run is the command that a user would type, in a folder of its own under --out; a run that is
already there is resumed, or read if it is finished.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from benchmarks.machine import header
from tritonbnn import cli


def train(recipe: str, seed: int, out: Path, flags: list[str]) -> list[dict]:
    """Train one seed to its end; its log, a dictionary per epoch.

    Raises:
        cli.UserError: the run failed; it has said why.
    """
    folder = out / f"{recipe}-seed{seed}"
    command = [sys.executable, "-m", "tritonbnn.train", recipe, "--seed", str(seed)]
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
        epilog="Any other flag goes to python -m tritonbnn.train.",
    )
    parser.add_argument("recipe", help="a recipe's name")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="write the result here")
    args, flags = parser.parse_known_args(argv)
    if args.seeds < 1:
        raise cli.UserError(f"--seeds must be at least 1, not {args.seeds}")
    logs = {seed: train(args.recipe, seed, args.out, flags) for seed in range(args.seeds)}
    said = [args.recipe, "--seeds", str(args.seeds), *flags]
    result = header("python -m benchmarks.seeds " + " ".join(said)) | summary(logs)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
