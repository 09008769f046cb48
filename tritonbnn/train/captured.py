"""``--graph``: an optimiser step that the host starts with two launches.

One graph has the passes: normalisation, forward, loss, backward, and all counts. The other has the
optimiser's update. What a method or the analysis does between gradients and update, or after it, is
done by the host as in any other step, on the gradients and weights of that step.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from tritonbnn.cli import UserError
from tritonbnn.data.batches import MicroBatch
from tritonbnn.methods import method_class
from tritonbnn.optim import CAPTURABLE, make_capturable
from tritonbnn.train.checkpoint import State
from tritonbnn.train.config import Config
from tritonbnn.train.engine import FirstBad, forward_and_backward, take_step, update
from tritonbnn.train.graphs import Graphs

WARM_UP = 3
"""Full batches that are trained on before a step is recorded."""


def check_capture(config: Config, device: torch.device, processes: int) -> None:
    """Refuse ``--graph`` where a step cannot be captured, before anything is written.

    Args:
        config: of the run.
        device: of this process.
        processes: of the job.

    Raises:
        UserError: it cannot.
    """

    def refuse(why: str, remedy: str = "leave it out") -> None:
        raise UserError(f"--graph {why}: {remedy}")

    if device.type != "cuda":
        refuse("captures what a GPU does, and this run is on the CPU")
    if processes > 1:
        refuse(f"captures the step of a process alone, and there are {processes}")
    if config.accumulation > 1:
        refuse("captures a batch in one part", "leave it out, or --accumulation")
    if config.precision == "fp16":
        refuse(
            "cannot capture --precision fp16, whose loss scale the host decides in each step",
            "use --precision bf16, or leave --graph out",
        )
    for stage in config.chosen:
        if type(stage.optimizer.settings) not in CAPTURABLE:
            refuse(
                f"captures the optimizers adam and adamw, and {stage.name} has"
                f" {stage.optimizer.name}",
                "choose one of these, or leave --graph out",
            )
        method, _ = method_class(stage.method)
        # A subclass has losses of its own, so it does not inherit the promise.
        if not vars(method).get("capturable", False):
            refuse(
                f"needs a method that says it can be captured, and {stage.name} has"
                f" {stage.method.name}",
                "set capturable = True in that class if its losses are the same operators in each"
                " step, or leave --graph out",
            )


class CapturedStep:
    """Takes optimiser steps: :func:`~tritonbnn.train.engine.take_step`, captured where it can be.

    Steps of full batches are repeated from a recording, after the first :data:`WARM_UP` of them.
    These are ordinary steps, and so are those of any other batch, such as an epoch's odd last one.
    The optimiser is the same in all of them.

    Args:
        state: its optimiser is made capturable.
        batch_size: images of a full batch.
        graphs: what records.
    """

    def __init__(self, state: State, batch_size: int, graphs: Graphs) -> None:
        make_capturable(state.optimizer)
        self._batch_size, self._graphs = batch_size, graphs
        self._warm = 0
        self._recorded: _Recorded | None = None

    def __call__(
        self, state: State, network: nn.Module, parts: list[MicroBatch], bad: FirstBad
    ) -> None:
        [part] = parts
        if part.count != self._batch_size:
            state.optimizer.zero_grad()  # lets go of the recording's, which keeps them
            take_step(state, network, parts, bad)
        elif self._warm < WARM_UP:
            self._warm += 1
            with self._graphs.aside():
                take_step(state, network, parts, bad)
        else:
            if self._recorded is None:
                self._recorded = _Recorded(state, network, part, bad, self._graphs)
            self._recorded.take(state, part)


class _Recorded:
    """A step of a full batch, in a recording, and the tensors that lead into it."""

    def __init__(
        self, state: State, network: nn.Module, part: MicroBatch, bad: FirstBad, graphs: Graphs
    ) -> None:
        device, self._graphs = state.method.task.compute.device, graphs
        self._part = replace(
            part,
            images=part.images.to(device, copy=True),
            labels=part.labels.to(device, copy=True),
        )
        self._index = torch.zeros((), dtype=torch.int64, device=device)
        self._work = lambda: forward_and_backward(state, network, self._part, bad, self._index)
        self._passes: Callable[[], None] | None = None
        self._update: Callable[[], None] | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def take(self, state: State, part: MicroBatch) -> None:
        """Take the step, with another batch."""
        self._part.images.copy_(part.images, non_blocking=True)
        self._part.labels.copy_(part.labels, non_blocking=True)
        self._index.fill_(state.batch)
        with state.method.passes(state.model, state.optimizer):
            if self._passes is None:  # inside, as the passes may depend on their context
                self._passes = self._record(state)
            self._passes()
        for weight, gradient in self._gradients:
            weight.grad = gradient
        update(state, self._update_weights)

    def _record(self, state: State) -> Callable[[], None]:
        """Record the passes, which are given back, and the update."""
        # The last step has left no gradient. So backward makes one in the recording's memory, and
        # writes it anew in each repetition.
        passes = self._graphs.record(self._work)
        self._gradients = [
            (weight, weight.grad)
            for group in state.optimizer.param_groups
            for weight in group["params"]
            if weight.grad is not None
        ]
        self._update = self._graphs.record(state.optimizer.step)
        return passes

    def _update_weights(self) -> None:
        for weight, gradient in self._gradients:
            if weight.grad is None:
                raise UserError("the method takes a gradient away: leave --graph out")
            if weight.grad is not gradient:  # it has put another one in its place
                gradient.copy_(weight.grad)
        assert self._update
        self._update()
