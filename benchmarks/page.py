"""A page with ReActNet-A in headless Chromium, against the eager float twin outside of it.

    python -m benchmarks.page

One image of 224 x 224 at a time, one thread each. They take turns, after two untimed calls of each,
and each number is a median.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.browser import Browser, NoBrowserError, open_browser
from benchmarks.output import command
from benchmarks.twin import FloatReActNetA
from tritonbnn import cli, deploy
from tritonbnn.cli import UserError
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.commands import positive
from tritonbnn.kernels.provenance import header
from tritonbnn.models import build_model

SIZE, ROUNDS = 224, 15
_TRANSFORM = {"mean": [0.5] * 3, "std": [0.25] * 3, "image_size": SIZE}
_READY = "document.querySelector('#said')?.textContent.startsWith('Ready')"
_CALL = f"network.run(new Uint8Array({3 * SIZE**2})).milliseconds"


@torch.no_grad()
def turns(browser: Browser, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every turn, by rival."""
    twin, images = FloatReActNetA().eval(), torch.randn(1, 3, SIZE, SIZE)
    taken: dict[str, list[float]] = {"page": [], "twin": []}
    for turn in range(rounds + 2):
        start = time.perf_counter()
        twin(images)
        seconds = time.perf_counter() - start
        milliseconds = browser.run(_CALL)
        if turn >= 2:
            taken["twin"].append(1e3 * seconds)
            taken["page"].append(milliseconds)
    return taken


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m benchmarks.page", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=positive, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    path = writable(args.json)
    torch.set_num_threads(1)
    result: dict[str, Any] = header(command("page", argv), torch.device("cpu"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder) / "net.html"
        model = build_model("reactnet_a").eval()
        result["bytes"] = deploy.export(model, page, transform=_TRANSFORM, format="html")
        try:
            with open_browser(Path(folder) / "browser") as browser:
                browser.open(page, _READY)
                result["browser"] = browser.version
                result["milliseconds"] = taken = turns(browser, args.rounds)
        except NoBrowserError as error:
            raise UserError(f"{error}: install it") from error
    middle = {name: median(times) for name, times in taken.items()}
    for name, times in taken.items():
        spread = (max(times) - min(times)) / 2 / middle[name]
        print(f"  {name:6} {middle[name]:8.2f} ms an image ± {spread:4.0%}")
    print(f"  the page takes {middle['page'] / middle['twin']:.3f} of the twin's time")
    print(f"  {result['bytes'] / 1e6:.2f} MB of page, {result['browser']}")
    if path:
        write_json(path, result)
    return 0


if __name__ == "__main__":
    cli.run(main)
