"""The networks in timm: ``import tritonbnn.timm`` registers them, ``python -m tritonbnn.timm`` too.

Each of ``MODELS`` is in timm's registry as ``tritonbnn_`` and its name, so that
``timm.create_model("tritonbnn_reactnet_a", num_classes=10)`` builds it. timm's own scripts import
no foreign module. They run with the networks registered as
``python -m tritonbnn.timm train.py --model tritonbnn_reactnet_a ...``. timm is not installed with
the package, but with its extra: ``pip install 'tritonbnn[timm]'``.
"""

import argparse
import importlib
import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tritonbnn import cli
from tritonbnn.models import MODELS, build_model

PREFIX = "tritonbnn_"
_FACTS = ("input_size", "min_input_size", "pool_size")  # that follow from the size of images

_SMALL = ("binarynet",)  # is for small images alone

default_cfgs: dict[str, dict[str, Any]] = {}  # where timm looks for them


def main(argv: list[str]) -> int:
    """Run a script with the networks registered; the exit code.

    Raises:
        UserError: there is no such script, or timm is not installed.
    """
    parser = cli.Parser(prog="python -m tritonbnn.timm", description=__doc__.splitlines()[0])
    parser.add_argument("script", type=cli.path, help="a script that uses timm, as timm's train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script is given")
    given = parser.parse_args(argv)
    if not given.script.is_file():
        raise cli.UserError(f"there is no script {given.script}: name timm's train.py, or another")
    try:
        importlib.import_module("tritonbnn.timm")  # this file, which has another name as a program
    except ImportError as error:
        raise cli.UserError(error) from error
    sys.argv = [str(given.script), *given.arguments]
    sys.path[0] = str(given.script.parent.resolve())  # as Python has it for a script
    runpy.run_path(str(given.script), run_name="__main__")
    return 0


def _built(
    name: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> nn.Module:
    """A network from timm's words, which its scripts give to every network."""
    for what, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if rate:
            raise ValueError(
                f"the networks of tritonbnn drop nothing: {what} must be 0, not {rate}"
            )
    model = build_model(name, num_classes=num_classes or 2, in_channels=in_chans, **options)
    if not num_classes or global_pool != "avg":
        model.reset_classifier(num_classes, global_pool)
    return model


def _entry_point(name: str, build_model_with_cfg: Callable[..., nn.Module]) -> Callable[..., Any]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        features_only: bool = False,
        **options: Any,
    ) -> nn.Module:
        if name in _SMALL:
            options.setdefault("small_images", True)
        shapes = {key: options[key] for key in ("width", "small_images") if key in options}
        plan = _on_meta(name, **shapes)
        if pretrained_cfg is None:
            facts = {key: plan.default_cfg[key] for key in _FACTS}
            pretrained_cfg_overlay = {**facts, **(pretrained_cfg_overlay or {})}
        if features_only:
            if not plan.feature_info:
                raise ValueError(f"{PREFIX}{name} has no streams that features_only could return")
            options.setdefault("out_indices", tuple(range(len(plan.feature_info))))
        return build_model_with_cfg(
            lambda **given: _built(name, **given),
            PREFIX + name,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            feature_cfg={"feature_cls": "hook", "no_rewrite": True},
            features_only=features_only,
            **options,
        )

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__doc__ = (
        f"{name} of :func:`tritonbnn.models.build_model`, whose other options it takes too."
    )
    return create


def _on_meta(name: str, **shapes: Any) -> Any:
    """A network without numbers, to be asked for its facts."""
    with torch.device("meta"):
        return build_model(name, **shapes)


def _register() -> None:
    try:
        from timm.models import build_model_with_cfg, register_model
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "timm":
            raise
        raise ImportError(
            "tritonbnn.timm needs timm: pip install 'tritonbnn[timm]'", name="timm"
        ) from error
    for name in MODELS:
        facts = _on_meta(name, small_images=name in _SMALL).default_cfg
        default_cfgs[PREFIX + name] = facts
        register_model(_entry_point(name, build_model_with_cfg))


if __name__ == "__main__":
    cli.run(main)
else:
    _register()
