"""What a training run says about its binary weights, epoch by epoch.

An epoch's record is what its line in ``log.jsonl`` holds under ``analysis``. What could not be
measured is absent. N is the number of binary weights. Signs are compared at every update of the
optimiser. A *look* at gradients and steps is taken at one update out of every ``interval``, the
first of an epoch among them.

    updates      that flip_flop is the mean over: all of the epoch, or all since the analysis was
                 turned on within it
    flip_flop    flips by an update / N, mean over these updates
    c2i_full     share p of signs equal to those that the step started from; c2i_half is 2 p - 1
    saturation   share of the probe batch's activations with abs(x + shift) > 1, at the epoch's end
    dead         share of weights whose abs(gradient) stayed below 1e-12 at all looks, and whose
                 sign no update changed. A gradient that is infinite or NaN tells nothing: a weight
                 that has no other at the looks is not dead
    revived      share of all weights that were dead in the epoch before, and whose gradient reached
                 1e-12 or whose sign changed in this one
    layers       by the weight's name in the state dict, the same for each, and
      saturated_channels  share of input channels whose saturation exceeds 0.99
      gradient     mean abs(gradient of the loss), mean over the looks
      adam_step    mean abs(lr m_hat / (sqrt(v_hat) + eps)), mean over the looks; with Adam alone
      weight       mean abs(latent weight), at the epoch's end

At level "full", ``stepN/analysis.safetensors`` has a row for the start and one for each epoch:
``histogram.edges`` (B + 1,) float32, ``histogram.NAME`` (epochs + 1, B) int64 and
``saturation.NAME`` (epochs + 1, C) float32. Where "full" was turned on later, the rows before are
zeros and NaN: a histogram without counts was not measured.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from tritonbnn.analysis.histogram import EDGES, histogram
from tritonbnn.analysis.saturation import Probe, Saturation, pooled
from tritonbnn.analysis.signs import SignLayout
from tritonbnn.analysis.window import Window, mean_magnitude
from tritonbnn.nn import binary_weights

LEVELS = ("off", "light", "full")

Record = dict[str, Any]


class Recorder:
    """Follows the binary weights of a network; in step 1, those that step 2 binarises.

    Args:
        model: where it is trained.
        optimizer: over its parameters.
        level: "off" knows the signs that the step and the epoch began with, and no more.
        interval: optimiser steps from one look at gradients to the next.
        probe: what saturation is measured on; None leaves it out.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        level: str = "off",
        interval: int = 10,
        probe: Probe | None = None,
    ) -> None:
        self._model, self._level, self._interval, self._probe = model, level, interval, probe
        named = binary_weights(model)
        self._names, self._weights = list(named), list(named.values())
        self._layout = SignLayout(self._weights)
        self._window = Window(self._layout, self._weights, optimizer) if level != "off" else None
        self._dead: Tensor | None = None  # in the epoch before, if that is known
        self._rows: dict[str, Tensor] = {}
        self._start = self._layout.signs(self._weights)
        self._epoch = self._start.clone()

    def begin_step(self) -> None:
        """Take the weights of now as those that the step starts from."""
        self._start = self._layout.signs(self._weights)
        self._epoch = self._start.clone()
        self._dead, self._rows = None, {}
        if self._window:
            self._window.begin()
        if self._level == "full":
            self._add_rows(0, self._probe.measure(self._model) if self._probe else {})

    def begin_epoch(self) -> None:
        """Remember the signs of now, and which weights were dead in the epoch that has ended."""
        self._epoch = self._layout.signs(self._weights)
        if self._window:
            self._dead = self._window.known & ~self._window.moved if self._window.looks else None
            self._window.begin()

    def due(self, batch: int) -> bool:
        """Whether to look at the gradients of optimiser step ``batch`` of the epoch, from 0."""
        return self._window is not None and batch % self._interval == 0

    def before_update(self) -> None:
        """Call before an update that is due, when the gradients are there and not scaled."""
        assert self._window
        self._window.before_update()

    def after_update(self, *, looked: bool) -> None:
        """Call after every update.

        Args:
            looked: whether :meth:`before_update` was called for it.
        """
        if self._window:
            self._window.after_update(looked=looked)

    def flipped(self) -> float | None:
        """The share of all binary weights whose sign is not the one the epoch began with.

        None where there are no binary weights.
        """
        if not self._names:
            return None
        now = self._layout.signs(self._weights)
        return self._shares(self._layout.differing(now, self._epoch))[-1].item()

    @torch.no_grad()
    def record(self, epoch: int) -> Record | None:
        """The record of an epoch, before the next one begins; None at level "off".

        Args:
            epoch: counted from 1.
        """
        if self._window is None:
            return None
        probed = self._probe.measure(self._model) if self._probe else {}
        if self._level == "full":
            self._add_rows(epoch, probed)
        record: Record = {"updates": self._window.updates} if self._window.updates else {}
        layers: dict[str, dict[str, float]] = {name: {} for name in self._names}
        for key, shares in self._sign_shares(self._window).items():
            *of_layers, total = shares.tolist()
            _enter(record, key, total)
            for layer, share in zip(layers.values(), of_layers, strict=True):
                _enter(layer, key, share)
        for key, means in self._means(self._window).items():
            for layer, mean in zip(layers.values(), means.tolist(), strict=True):
                _enter(layer, key, mean)
        for name, saturation in probed.items():
            layers[name]["saturation"] = saturation.share
            layers[name]["saturated_channels"] = saturation.saturated_channels
        if probed:
            record["saturation"] = pooled(probed.values())
        return {**record, "layers": layers}

    def _sign_shares(self, window: Window) -> dict[str, Tensor]:
        """Shares of weights by layer and, last, of all of them, float64 (L + 1,)."""
        layout = self._layout
        now = layout.signs(self._weights)
        agreement = 1 - self._shares(layout.differing(now, self._start))
        shares = {"c2i_full": agreement, "c2i_half": 2 * agreement - 1}
        if window.updates:
            shares["flip_flop"] = self._shares(window.flips) / window.updates
        if window.looks:
            shares["dead"] = 1 - self._shares(layout.count(window.moved | ~window.known))
            if self._dead is not None:
                shares["revived"] = self._shares(layout.count(self._dead & window.moved))
        return shares

    def _shares(self, counts: Tensor) -> Tensor:
        """Of the weights of each layer and of all, from counts (L,). NaN where there are none."""
        counts, sizes = (torch.cat((x, x.sum()[None])) for x in (counts, self._layout.sizes))
        return counts.double() / sizes

    def _means(self, window: Window) -> dict[str, Tensor]:
        """Means by layer, float64 (L,); NaN where none was finite."""
        weights = [mean_magnitude(weight) for weight in self._weights]
        return {
            "gradient": window.gradients[0] / window.gradients[1],
            "adam_step": window.adam_steps[0] / window.adam_steps[1],
            "weight": torch.stack(weights) if weights else torch.zeros(0),
        }

    def _add_rows(self, epoch: int, probed: dict[str, Saturation]) -> None:
        for name, weight in zip(self._names, self._weights, strict=True):
            self._add_row(f"histogram.{name}", epoch, histogram(weight).cpu(), 0)
            if name in probed:
                self._add_row(f"saturation.{name}", epoch, probed[name].shares.float(), math.nan)

    def _add_row(self, name: str, epoch: int, row: Tensor, unmeasured: float) -> None:
        rows = self._rows.get(name, row.new_empty((0, *row.shape)))
        gap = row.new_full((epoch - len(rows), *row.shape), unmeasured)
        self._rows[name] = torch.cat((rows, gap, row[None]))

    def rows(self) -> dict[str, Tensor]:
        """What ``analysis.safetensors`` holds; nothing below level "full"."""
        full = self._level == "full" and self._rows
        return {"histogram.edges": EDGES, **self._rows} if full else {}

    def tensors(self) -> dict[str, Tensor]:
        """All that a run needs to go on."""
        tensors = {"start": self._start, "epoch": self._epoch, **self._rows}
        if self._dead is not None:
            tensors["dead"] = self._dead
        return tensors | (self._window.tensors() if self._window else {})

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Become what was saved, after the model has. What was not followed then begins now.

        Raises:
            KeyError: not even the signs were saved.
        """
        device = self._start.device
        self._start, self._epoch = (saved[name].to(device) for name in ("start", "epoch"))
        self._rows = {n: t for n, t in saved.items() if n.startswith(("histogram.", "saturation."))}
        if self._window is None:
            return
        self._dead = saved["dead"].to(device) if "dead" in saved else None
        if "updates" in saved:  # not in what was saved when only some updates were counted
            self._window.restore(saved)
        else:
            self._window.begin()


def _enter(record: dict[str, float], key: str, value: float) -> None:
    """Leave out what could not be measured: JSON has no NaN."""
    if math.isfinite(value):
        record[key] = value
