"""The trainer, where the process with RANK 1 has an older version of something installed."""

import os

import torch

import tritonbnn
from tritonbnn import cli
from tritonbnn.train.__main__ import main as train


def main(argv: list[str]) -> int:
    """The first argument is what is older."""
    if os.environ["RANK"] == "1":
        {"torch": torch, "tritonbnn": tritonbnn}[argv[0]].__version__ = "0.0.9"
    return train(argv[1:])


if __name__ == "__main__":
    cli.run(main)
