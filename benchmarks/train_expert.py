"""The expert's network, trained as :mod:`benchmarks.train_obvious` trains the obvious one.

python -m benchmarks.train_expert digits --seed 0 --out runs/expert
"""

from benchmarks.expert import ExpertReActNetA
from benchmarks.train_obvious import train
from tritonbnn import cli


def main(argv: list[str]) -> int:
    return train(argv, ExpertReActNetA)


if __name__ == "__main__":
    cli.run(main)
