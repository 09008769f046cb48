"""Random runs on the disk, in the format that training writes, for what reads them."""

import json

import numpy as np
from safetensors.numpy import save_file

LAYERS = ("blocks.0.weight", "blocks.2.weight", "blocks.10.weight")
OF_LAYER = ("flip_flop", "c2i_full", "saturation", "dead", "revived")
ALL_OF_LAYER = (*OF_LAYER, "gradient", "adam_step", "weight")


def write_record(folder, *, epochs=(3, 2), layers=LAYERS, seed=0, full=True, **settings):
    """A run's folder without checkpoints; returns its log lines.

    Args:
        folder: to be made.
        epochs: of step 1 and 2; 0 leaves a step out.
        layers: names.
        seed: of the random values.
        full: with histograms and channels.
        settings: of ``config.toml``.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    settings = {"recipe": "digits", "model": "reactnet_a", "width": 0.25, **settings}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (folder / "config.toml").write_text(text)
    lines = []
    for step, count in enumerate(epochs, start=1):
        lines += [_line(random, step, epoch, layers) for epoch in range(1, count + 1)]
        if count and full:
            (folder / f"step{step}").mkdir()
            _write_tensors(random, folder / f"step{step}", count, layers)
    write_lines(folder, lines)
    return lines


def write_lines(folder, lines):
    """Make these the log of a run."""
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _line(random, step, epoch, layers):
    of_layers = {name: {key: random.uniform(1e-4, 1) for key in ALL_OF_LAYER} for name in layers}
    keys = ("lr", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "seconds")
    return {
        "stage": f"step{step}",
        "epoch": epoch,
        **{key: 100 * random.uniform() for key in keys},
        "analysis": {
            "updates": 3,
            **{key: random.uniform() for key in OF_LAYER},
            "layers": of_layers,
        },
    }


def _write_tensors(random, folder, epochs, layers):
    tensors = {"histogram.edges": np.linspace(-1, 1, 21, dtype=np.float32)}
    for name in layers:
        tensors[f"histogram.{name}"] = random.integers(0, 99, (epochs + 1, 20))
        tensors[f"saturation.{name}"] = random.random((epochs + 1, 7), dtype=np.float32)
    save_file(tensors, folder / "analysis.safetensors")
