"""Where images come from: data sets by name, and what a network sees of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from tritonbnn.cli import UserError
from tritonbnn.data.cifar import Cifar10, Cifar100
from tritonbnn.data.digits import Digits
from tritonbnn.data.fashion import Fashion
from tritonbnn.data.folder import Tree
from tritonbnn.data.images import Decoding, load_image
from tritonbnn.data.splits import Images, Normalisation, Opener, Picture, Splits
from tritonbnn.data.views import (
    AUGMENTATIONS,
    LIGHTING,
    Fit,
    TrainView,
    eval_view,
    sample_seed,
    seeded,
)

# Each is a dataclass of the settings that it takes. Those of a tree are all there are.
SOURCES: dict[str, type[Opener]] = {
    "digits": Digits,
    "fashion": Fashion,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "images": Tree,
}
SETTINGS = tuple(field.name for field in fields(Tree))
_DEFAULTS = {field.name: field.default for field in fields(Tree)}
_OLD_NAMES = {"folder": "images"}  # in what runs have saved


@dataclass(frozen=True, slots=True)
class SampleKey:
    """What a data set is indexed with. The epoch matters to training images only."""

    epoch: int
    index: int


class _Viewed(Dataset):
    """Views of images: what is common to random and fixed ones."""

    images: Images
    normalisation: Normalisation

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        views, labels = self.batch([key])
        return views[0], int(labels[0])

    def batch(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        """Several images at once: (N, C, H, W) float32, normalised, and labels (N,) int64."""
        views, labels = self._views(keys)
        return self.normalisation(views), labels

    def levels(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        """The same before it is normalised, (N, C, H, W) uint8. What has no 8 bits, is normalised.

        A GPU normalises faster, and a quarter of the bytes goes to it.
        """
        views, labels = self._views(keys)
        return views if views.dtype == torch.uint8 else self.normalisation(views), labels

    def _views(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        views = torch.stack([self._view(key) for key in keys])
        return views, torch.from_numpy(self.images.labels[[key.index for key in keys]])

    def _view(self, key: SampleKey) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TrainSet(_Viewed):
    """Random views of the training images; a view depends on seed, step, epoch and index only."""

    images: Images
    normalisation: Normalisation
    transform: TrainView
    seed: int
    step: int

    def _view(self, key: SampleKey) -> Tensor:
        image = self.images.image(key.index)
        with seeded(sample_seed(self.seed, self.step, key.epoch, key.index)):
            return self.transform(image)


@dataclass(frozen=True, eq=False)
class EvalSet(_Viewed):
    """The fixed view of every image."""

    images: Images
    normalisation: Normalisation
    transform: Fit

    def _view(self, key: SampleKey) -> Tensor:
        return self.transform(self.images.image(key.index))


@dataclass(frozen=True)
class Source:
    """A data set for training. ``train[SampleKey]`` and ``val[SampleKey]`` are (image, label).

    Attributes:
        name: of :data:`SOURCES`.
        classes: their names; a label is a place in this list.
        channels: of the images.
        train: random views of the training images.
        val: the fixed view of the validation images.
        facts: what a checkpoint keeps of it, in JSON's types, see :func:`open_again`.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    train: TrainSet
    val: EvalSet
    facts: dict[str, Any]

    def of_step(self, step: int) -> "Source":
        """The same images with the training views of another step; nothing is read again."""
        return replace(self, train=replace(self.train, step=step))

    def identity(self) -> dict[str, Any]:
        """Which images these are, in JSON's types: of each split how many, and a digest."""
        splits = {"train": self.train.images, "val": self.val.images}
        return {k: {"images": len(v.labels), "digest": v.digest()} for k, v in splits.items()}

    def load(self) -> None:
        """Decode both splits into memory where they are small: reading a file takes longer."""
        self.train.images.load()
        self.val.images.load()


def canonical(name: str) -> str:
    """A data set's name of today, which differs from an older one that a run has saved."""
    return _OLD_NAMES.get(name, name)


def make_opener(name: str, settings: Mapping[str, Any]) -> Opener:
    """What opens a data set with some settings. No file is looked at.

    Args:
        name: of :data:`SOURCES`.
        settings: of :data:`SETTINGS`. What is left out, empty or at its default is not set.

    Raises:
        UserError: There is no such set, it has no such setting, or a value is impossible.
    """
    name = canonical(name)
    check_choice("data set", name, SOURCES)
    kind = SOURCES[name]
    given = {k: v for k, v in settings.items() if v not in (None, "", _DEFAULTS[k])}
    if "data_dir" in given:
        given["data_dir"] = Path(given["data_dir"])
    own = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in own:
            raise UserError(
                f"--{key.replace('_', '-')} is not for {kind.title}:"
                " for a folder of your own images, use the recipe images"
                + (f' (dataset = "images", not "{name}")' if name == "digits" else "")
            )
    return kind(**given)


def open_source(
    name: str,
    *,
    image_size: int,
    augment: str,
    lighting: str = "none",
    seed: int = 0,
    step: int = 1,
    **settings: Any,
) -> Source:
    """Open a data set by name.

    Args:
        name: of :data:`SOURCES`.
        image_size: height and width of the images handed out.
        augment: of :data:`~tritonbnn.data.views.AUGMENTATIONS`.
        lighting: of :data:`~tritonbnn.data.views.LIGHTING`; needs colour images.
        seed: the run's seed.
        step: the training step, 1 or 2.
        settings: of the data set, see :class:`~tritonbnn.data.folder.Tree`.

    Raises:
        UserError: The data are missing or damaged, or an option does not fit them.
    """
    name = canonical(name)
    check_choice("augment", augment, AUGMENTATIONS)
    check_choice("lighting", lighting, LIGHTING)
    opener = make_opener(name, settings)
    if opener.channels == 1 and lighting != "none":
        raise UserError(
            f"lighting {lighting!r} needs colour images, and {name} has grey ones: use 'none'"
        )
    try:
        opened = opener.open()
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    train_view = TrainView(augment, lighting, image_size)
    normalisation = opener.normalisation
    return Source(
        name,
        opened.classes,
        opener.channels,
        TrainSet(opened.train, normalisation, train_view, seed, step),
        EvalSet(opened.val, normalisation, eval_view(augment, image_size)),
        _facts(name, opener, opened, image_size, augment),
    )


def _facts(
    name: str, opener: Opener, opened: Splits, image_size: int, augment: str
) -> dict[str, Any]:
    facts = {
        "name": name,
        "dir": str(getattr(opener, "data_dir", None) or ""),
        "classes": list(opened.classes),
        "channels": opener.channels,
        "image_size": image_size,
        "augment": augment,
    }
    return {**facts, **asdict(opened.decoding)} if isinstance(opener, Tree) else facts


def open_again(
    facts: Mapping[str, Any], data_dir: Path | None = None, class_order: str | None = None
) -> Source:
    """Open the data that a checkpoint was trained on, to evaluate.

    Classes that the checkpoint names get its order, whatever the order of the folders is.

    Args:
        facts: :attr:`Source.facts`, as the checkpoint has them.
        data_dir: where the data are now; None for where they were.
        class_order: of the folders, for a checkpoint that names no classes.

    Raises:
        UserError: see :func:`open_source`.
    """
    source = open_source(
        facts["name"],
        image_size=facts["image_size"],
        augment=facts["augment"],
        data_dir=data_dir or facts["dir"],
        class_order=class_order,
        **_decoding(facts),
    )
    names = facts["classes"]
    if names is None or sorted(names) != sorted(source.classes):
        return source
    return _in_order(source, tuple(names))


def _decoding(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`Decoding` that a checkpoint has; none, in an old one."""
    return {field.name: facts[field.name] for field in fields(Decoding) if field.name in facts}


def _in_order(source: Source, classes: tuple[str, ...]) -> Source:
    """The same data whose labels count other ``classes``, which are its own in another order."""
    if classes == source.classes:
        return source
    place = np.array([classes.index(name) for name in source.classes])
    for split in (source.train, source.val):
        split.images.labels[:] = place[split.images.labels]
    facts = {**source.facts, "classes": list(classes)}
    return replace(source, classes=classes, facts=facts)


def eval_reader(facts: Mapping[str, Any]) -> Callable[[Path], Tensor]:
    """A function from an image file to the network input that a data set makes of it.

    An image of Fashion-MNIST's own size gets the border that the data set's images have.

    Args:
        facts: :attr:`Source.facts`, as a checkpoint has them.
    """
    kind: Any = SOURCES[canonical(facts["name"])]
    transform = eval_view(facts["augment"], facts["image_size"])
    decoding = Decoding(**_decoding(facts))

    def read(path: Path) -> Tensor:
        image: Picture = load_image(path, facts["channels"], decoding)
        if kind.border and image.size == (kind.side, kind.side):
            image = F.pad(image, [kind.border])
        return kind.normalisation(transform(image)[None])[0]

    return read


def check_choice(what: str, value: str, choices: Mapping[str, Any]) -> None:
    """Refuse what is none of the choices, by a line that names them."""
    if value not in choices:
        raise UserError(f"unknown {what} {value!r}: choose from {', '.join(choices)}")
