"""What is compared: configurations, the orders that the paper found, and its numbers.

The paper's table of decays is of ImageNet and a network of ResNet-18's kind, trained with Adam, as
a later study quotes it; the window that its flip-flop ratio is averaged over is not known.
"""

from dataclasses import dataclass

from tritonbnn.train.config import SCRATCH, Config

STAGES = ("step1", "step2")
"""What the recipe's stages must be called: those of AdamBNN."""

VARIED = (
    *("--stage", "--method", "--schedule"),
    *("--seed", "--optimizer", "--step", "--init-from"),
    *("--weight-decay", "--step1.weight-decay", "--step2.weight-decay"),
)
"""Flags of training that a variant sets."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A row of a table: one way to train.

    Attributes:
        name: its runs' folders begin with it.
        title: for people.
        optimizer: "adam" or "sgd".
        decay: L2 in step 1, or in the only step.
        two_step: whether step 1 comes first; in step 2 there is no L2 then.
        published: the paper's values on ImageNet, by quantity.
    """

    name: str
    title: str
    optimizer: str
    decay: float
    two_step: bool
    published: dict[str, float]

    def flags(self, config: Config, sgd_lr: float) -> list[str]:
        """What makes a training command train this way.

        Args:
            config: that of the two steps; one step gets the epochs of both.
            sgd_lr: learning rate of SGD.
        """
        flags = ["--optimizer", self.optimizer]
        if self.optimizer == "sgd":
            flags += ["--step1.lr", str(sgd_lr), "--step2.lr", str(sgd_lr)]
        first, second = (config.stage(name).epochs for name in STAGES)
        if self.two_step:
            flags += ["--step", "0", "--step1.epochs", str(first), "--step2.epochs", str(second)]
            return [*flags, "--step1.weight-decay", str(self.decay), "--step2.weight-decay", "0"]
        flags += ["--step", "2", "--init-from", SCRATCH, "--step2.epochs", str(first + second)]
        return [*flags, "--step2.weight-decay", str(self.decay)]


def _two_step(optimizer: str, name: str, published: dict[str, float]) -> Variant:
    title = f"two steps, {name}, decay 5e-6 then 0"
    return Variant(f"two-step-{optimizer}", title, optimizer, 5e-6, True, published)


def _one_step(decay: float, published: dict[str, float]) -> Variant:
    title = f"one step, Adam, decay {decay:g}"
    return Variant(f"one-step-decay-{decay:g}", title, "adam", decay, False, published)


TWO_STEP = _two_step("adam", "Adam", {"flip_flop": 4.50e-4, "top1": 63.23})
TWO_STEP_SGD = _two_step("sgd", "SGD", {})
NO_DECAY = _one_step(0.0, {"flip_flop": 2.86e-4, "top1": 61.49})
MEDIUM = _one_step(5e-6, {"flip_flop": 1.62e-3, "top1": 61.89})
HIGH = _one_step(1e-5, {"flip_flop": 2.33e-3, "top1": 61.73})


@dataclass(frozen=True)
class Claim:
    """An order that the paper found.

    Attributes:
        text: what it says.
        quantity: that is compared.
        rising: the variants, the least first.
    """

    text: str
    quantity: str
    rising: tuple[Variant, ...]


@dataclass(frozen=True)
class Comparison:
    """A study: the rows of its table, and what they should show."""

    title: str
    variants: tuple[Variant, ...]
    claims: tuple[Claim, ...]


STUDIES = {
    "optimizers": Comparison(
        "SGD and Adam",
        (TWO_STEP_SGD, TWO_STEP),
        (Claim("Adam is more accurate than SGD", "top1", (TWO_STEP_SGD, TWO_STEP)),),
    ),
    "decay": Comparison(
        "Weight decay",
        (NO_DECAY, MEDIUM, HIGH, TWO_STEP),
        (
            Claim("weight decay raises the flip-flop ratio", "flip_flop", (NO_DECAY, MEDIUM, HIGH)),
            Claim(
                "the flip-flop ratio of two steps lies between no decay and decay 5e-6",
                "flip_flop",
                (NO_DECAY, TWO_STEP, MEDIUM),
            ),
            Claim("weight decay lowers C2I", "c2i_half", (HIGH, MEDIUM, NO_DECAY)),
        ),
    ),
    "steps": Comparison(
        "One step and two",
        (MEDIUM, TWO_STEP),
        (
            Claim("two steps are more accurate than one", "top1", (MEDIUM, TWO_STEP)),
            Claim("two steps flip less than one", "flip_flop", (TWO_STEP, MEDIUM)),
        ),
    ),
}
