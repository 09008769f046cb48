"""What is timed against what: a network, and how it is run, in one word.

``expert+bf16+channels_last+compile`` is the expert's network under bf16 autocast, in channels_last
memory, through torch.compile. With ``graph`` the whole step is repeated from a CUDA graph. Options
come after the network, in any order.

The expert's is the rival that counts: a dozen lines more than the obvious code, and no kernels. The
obvious network is there as what the public code does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.baseline import ObviousReActNetA
from benchmarks.expert import ExpertReActNetA
from benchmarks.twin import FloatReActNetA
from tritonbnn import cli
from tritonbnn.models import build_model

OWN = ("ours", "ours-recompute", "ours-unfused")
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "obvious": ObviousReActNetA,
    "expert": ExpertReActNetA,
    "twin": FloatReActNetA,
}
"""Networks that there are of ReActNet-A only; those of ``OWN`` there are of every model."""

COMPILE_MODES = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}
OPTIONS = ("bf16", "channels_last", "graph", *COMPILE_MODES)

DEFAULTS = {
    "cuda": (
        "ours+bf16",
        "ours",
        "ours-recompute+bf16",
        "ours-unfused+bf16",
        "expert",
        "expert+bf16+channels_last",
        "expert+bf16+channels_last+compile",
        "expert+bf16+channels_last+max-autotune",
        "twin+bf16+channels_last+compile",
        "obvious",
        "obvious+bf16+channels_last",
        "obvious+bf16+channels_last+compile",
    ),
    "cpu": (
        "ours",
        "ours-recompute",
        "expert",
        "expert+compile",
        "twin",
        "twin+compile",
        "obvious",
    ),
}
"""By device. Most CPUs multiply bf16 slowly or not at all. There torch's own layout is at least as
fast as channels_last."""


@dataclass(frozen=True)
class Rival:
    """A network and how it is run.

    Attributes:
        network: "ours", "ours-recompute" (which saves least), "ours-unfused", or one of
            ``NETWORKS``.
        options: some of ``OPTIONS``, at most one of ``COMPILE_MODES``.
    """

    network: str
    options: frozenset[str]

    @property
    def bf16(self) -> bool:
        """Whether it runs under bf16 autocast."""
        return "bf16" in self.options

    @property
    def graph(self) -> bool:
        """Whether its step is recorded as a CUDA graph and repeated."""
        return "graph" in self.options

    @property
    def memory_format(self) -> torch.memory_format:
        """Of its images and weights: ours know only one."""
        if "channels_last" in self.options or self.network in OWN:
            return torch.channels_last
        return torch.contiguous_format

    @property
    def mode(self) -> str | None:
        """torch.compile's mode, or None."""
        return next((COMPILE_MODES[o] for o in COMPILE_MODES if o in self.options), None)

    def build(self, model: str, step: int, **options: Any) -> nn.Module:
        """The network of a step, in torch's own memory layout.

        Args:
            model: a name that ``build_model`` knows.
            step: of the schedule; in step 1 weights are real.
            options: ``num_classes``, ``width``, ``in_channels`` and ``small_images``, as
                ``build_model`` takes them.
        """
        options["binary_weights"] = step == 2
        if self.network in OWN:
            plan = "recompute" if self.network == "ours-recompute" else "auto"
            return build_model(model, fused=self.network != "ours-unfused", plan=plan, **options)
        return NETWORKS[self.network](**options)


def parse(word: str) -> Rival:
    """The rival that a word of the command line names.

    Raises:
        cli.UserError: an unknown network or option, or two ways to compile.
    """
    network, *options = word.split("+")
    known = (*OWN, *NETWORKS)
    if network not in known:
        raise cli.UserError(f"unknown rival {word!r}: {network!r} is none of {', '.join(known)}")
    unknown = [option for option in options if option not in OPTIONS]
    if unknown:
        raise cli.UserError(
            f"unknown rival {word!r}: {unknown[0]!r} is none of {', '.join(OPTIONS)}"
        )
    if len(set(COMPILE_MODES) & set(options)) > 1:
        raise cli.UserError(
            f"rival {word!r} compiles twice: leave one of {', '.join(COMPILE_MODES)}"
        )
    return Rival(network, frozenset(options))


def chosen(words: str | None, device: torch.device, model: str) -> dict[str, Rival]:
    """Rivals by the words that name them.

    Args:
        words: parted by commas; None for the device's default.
        device: where they run.
        model: of our networks.

    Raises:
        cli.UserError: a rival is unknown, named twice, cannot run there, or has no such model.
    """
    only_a = model != "reactnet_a"
    names = words.split(",") if words else DEFAULTS[device.type]
    if only_a and not words:
        names = [name for name in names if parse(name).network in OWN]
    rivals = {name: parse(name) for name in names}
    if len(rivals) != len(names):
        raise cli.UserError("--rivals names one twice: leave it out once")
    for name, rival in rivals.items():
        if rival.graph and device.type != "cuda":
            raise cli.UserError(f"{name} is a CUDA graph, and this is a CPU: leave +graph out")
    foreign = [name for name, rival in rivals.items() if rival.network not in OWN]
    if only_a and foreign:
        raise cli.UserError(f"there is no {foreign[0]} of {model}: it is of reactnet_a only")
    return rivals
