"""``python -m tritonbnn.export``, and packed files where a run may stand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.commands import EVALUATE, PREDICT, ROOT, TRAIN, run, write_tiny, write_tree
from tests.test_bad_input import assert_one_line
from tritonbnn import deploy
from tritonbnn.cli import UserError
from tritonbnn.compiled import build, loader
from tritonbnn.deploy import file
from tritonbnn.deploy.fold import fold
from tritonbnn.deploy.packed import PackedError
from tritonbnn.models import build_model

EXPORT = "tritonbnn.export"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and its packed file."""
    folder = tmp_path_factory.mktemp("export")
    write_tiny(folder)
    result = run(TRAIN, "tiny.toml", "--out", "run", cwd=folder)
    assert result.code == 0, result.output
    result = run(EXPORT, "run", "--out", "net.tbnn", cwd=folder)
    assert result.code == 0, result.output
    return folder


def test_the_report_is_of_the_file(place: Path, tmp_path: Path):
    result = run(EXPORT, place / "run", "--out", "again.tbnn", cwd=tmp_path)
    size = (tmp_path / "again.tbnn").stat().st_size
    assert f"again.tbnn: {size / 1e3:.2f} kB" in result.output
    model = build_model("birealnet_18", width=0.125, small_images=True, num_classes=2)
    ends = 4 * (sum(p.numel() for p in (*model.stem.parameters(), *model.fc.parameters())))
    [stated] = re.findall(r"stem and head +([\d.]+) kB", result.output)
    norm = 4 * model.stem[1].weight.numel()  # its weight is folded into the convolution's
    assert float(stated) == pytest.approx((ends - norm) / 1e3, abs=0.006)


def test_a_packed_file_scores_as_its_run(place: Path):
    run_says = run(EVALUATE, "run", "--engine", "torch", cwd=place)
    packed_says = run(EVALUATE, "net.tbnn", "--batch-size", 4, cwd=place)
    assert packed_says.code == 0, packed_says.output
    assert packed_says.output.split(":", 1)[1] == run_says.output.split(":", 1)[1]


def test_a_packed_file_predicts_as_its_run(place: Path):
    expected = run(PREDICT, "run", "images/val", "--engine", "torch", cwd=place)
    for flags in ((), ("--batch-size", 4, "--workers", 2)):
        found = run(PREDICT, "net.tbnn", "images/val", *flags, cwd=place)
        assert found.code == 0, found.output
        assert found.output == expected.output


def test_predict_goes_on_past_a_bad_file(place: Path, tmp_path: Path):
    images = write_tree(tmp_path / "images", train=0, val=3)
    (images / "val" / "a" / "1.png").write_bytes(b"no image")
    result = run(PREDICT, place / "net.tbnn", "images/val", "--workers", 2, cwd=tmp_path)
    assert result.code == 2
    assert len(re.findall(r"\.png: [ab] \d", result.output)) == 5
    assert len(re.findall(r"1\.png cannot be read as an image", result.output)) == 1


def test_step_1_is_refused_with_the_reason(place: Path):
    result = run(EXPORT, "run/step1", "--out", "one.tbnn", cwd=place)
    assert_one_line(result, "has real weights, as step 1 trains them")
    assert not (place / "one.tbnn").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((EVALUATE, "net.tbnn", "--engine", "torch"), "torch does not run: leave --engine out"),
        ((EVALUATE, "net.tbnn", "--precision", "bf16"), "runs on a CPU in float32"),
        (
            (EVALUATE, "net.tbnn", "--step", "2"),
            "--step and --recipe are for weights from elsewhere",
        ),
        ((EVALUATE, "run/step1", "--engine", "packed"), "real weights"),
        ((PREDICT, "none.tbnn", "images"), "none.tbnn does not exist"),
        ((EXPORT, "net.tbnn", "--out", "b.tbnn"), "net.tbnn is a packed file already"),
        ((EXPORT, "run"), "required: --out"),
        ((EXPORT, "net.tbnn", "--out", "b.c", "--step", "2"), "net.tbnn is packed: leave them out"),
        ((EXPORT, "run", "--out", "images"), "--out images is a folder: name a file in it"),
        ((EXPORT, "run", "--out", "images/"), "--out images is a folder: name a file in it"),
        ((EXPORT, "run", "--out", "pipe"), "cannot write pipe: it is a device or a pipe"),
        ((EXPORT, "pipe", "--out", "b.tbnn"), "pipe is a device or a pipe: name a checkpoint file"),
        ((EVALUATE, "net.tbnn", "--samples", "2"), "of a run, and net.tbnn is packed"),
    ],
)
def test_mistakes_are_one_line(place: Path, argv, message):
    if not (place / "pipe").exists():
        os.mkfifo(place / "pipe")
    before = set(place.iterdir())
    module, *rest = argv
    assert_one_line(run(module, *rest, cwd=place), message)
    assert set(place.iterdir()) <= {*before, place / "output.txt"}


@pytest.fixture(scope="module")
def content() -> bytes:
    """A packed file."""
    torch.manual_seed(0)
    model = build_model("birealnet_18", width=0.125, small_images=True, num_classes=3).eval()
    transform = {"mean": [0.5] * 3, "std": [0.5] * 3}
    return file.encode(fold(model, classes="abc", transform=transform))


def facts_of(content: bytes) -> tuple[dict, dict, bytes]:
    """The header, the facts in it, and the rest of a file."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    return header, json.loads(header["__metadata__"][file._FACTS]), content[end:]


def with_facts(header: dict, facts: dict, rest: bytes) -> bytes:
    header = {**header, "__metadata__": {file._FACTS: json.dumps(facts)}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def test_a_newer_format_is_named(content: bytes, tmp_path: Path):
    header, facts, rest = facts_of(content)
    (tmp_path / "new.tbnn").write_bytes(with_facts(header, {**facts, "format": 2}, rest))
    with pytest.raises(UserError, match=r"new\.tbnn: format 2 is newer .* upgrade"):
        deploy.load(tmp_path / "new.tbnn")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: b"", "it is empty"),
        (lambda c: c[:5], "truncated"),
        (lambda c: c[:-1], "damaged"),
        (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "checksum is wrong"),
        (lambda c: b"PK\x03\x04" + bytes(100), "truncated, or no packed network"),
        (lambda c: (1 << 62).to_bytes(8, "little") + c[8:], "truncated"),
    ],
)
def test_damage_is_one_line(content: bytes, tmp_path: Path, spoil, message):
    (tmp_path / "net.tbnn").write_bytes(spoil(content))
    with pytest.raises(UserError, match=message) as caught:
        deploy.load(tmp_path / "net.tbnn")
    assert "\n" not in str(caught.value)


ASTRAY = """
import json, sys
import numpy as np
from safetensors.numpy import load
from tritonbnn.deploy import Engine, file
from tritonbnn.deploy.packed import PackedError

hostile = [0, 1, 2, 3, -1, 7, 16, 2**31, 2**63 - 1, 2**64, 1.5, None, "x", [], {}, True]
shortcuts = ["identity", "repeat", "pool", "project"]
content = open(sys.argv[1], "rb").read()
end = 8 + int.from_bytes(content[:8], "little")
header, rest = json.loads(content[8:end]), content[end:]
facts = header["__metadata__"]["tritonbnn-packed"]
arrays = load(content)
random = np.random.default_rng(0)
images = np.zeros((2, 3, 16, 16), np.uint8)

def pick(values):
    return values[random.integers(len(values))]

refused = ran = 0
for _ in range(500):
    own = json.loads(facts)
    places = [own, own, *own["units"]]
    for _ in range(random.integers(1, 3)):
        place = pick(places)
        key = pick(list(place))
        place[key] = pick([*shortcuts, *hostile] if key == "shortcut" else hostile)
    own["checksum"] = file._checksum(own, arrays)
    text = json.dumps({**header, "__metadata__": {"tritonbnn-packed": json.dumps(own)}}).encode()
    try:
        packed = file.decode(len(text).to_bytes(8, "little") + text + rest)
    except PackedError as error:
        refused += 1
        assert "\\n" not in str(error)
        continue
    for shape in ((2, 3, 16, 16), (1, 3, 24, 40)):
        try:
            Engine(packed, 2)(np.zeros(shape, np.uint8))
            ran += 1
        except (ValueError, TypeError) as error:
            assert "\\n" not in str(error)

engine = Engine(file.decode(content), 2)
native = engine._network
for name, *_ in (*native._network._fields_, *native._units[0]._fields_):
    for struct in (native._network, native._units[1]):
        before = getattr(struct, name, None)
        if type(before) is not int or name in ("weight", "unit_count"):  # vouched for
            continue
        for value in [0, 1, 2, 3, 5, 8, 9, 15, 17, 1 << 20, 1 << 40, 1 << 62, (1 << 63) - 1, -1]:
            setattr(struct, name, value)
            try:
                native.logits(np.zeros((2, 3, 16, 16), np.float32), None, 2)
            except (RuntimeError, ValueError):
                refused += 1
        setattr(struct, name, before)
print(refused > 300, ran > 10, native.name, end="")
"""


@pytest.mark.compile
@pytest.mark.parametrize("isa", [isa for isa in build.ISAS if build.compilers()])
def test_hostile_files_with_right_checksums_never_run_astray(
    content: bytes, tmp_path: Path, isa: str
):
    """Each is refused in words, or is a network that runs; the sanitizers see each access."""
    if list(build.ISAS).index(isa) > list(build.ISAS).index(loader.best_isa()):
        pytest.skip(f"this CPU does not run {isa}")
    (tmp_path / "net.tbnn").write_bytes(content)
    compiler = build.compilers()[0]
    libraries = [
        subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environ = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TRITONBNN_SANITIZE": "1",
        "TRITONBNN_CACHE": str(tmp_path),
        "TRITONBNN_ISA": isa,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", ASTRAY, str(tmp_path / "net.tbnn")],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"True True C, {isa}"


def test_mutated_files_are_refused_in_one_line(content: bytes):
    random = np.random.default_rng(1)
    for number in range(5000):
        mutated = bytearray(content)
        end = len(content) if number % 2 else 8 + int.from_bytes(content[:8], "little")
        for _ in range(random.integers(1, 4)):
            mutated[random.integers(end)] = random.integers(256)
        if number % 5 == 0:
            del mutated[random.integers(len(mutated)) :]
        if bytes(mutated) == content:
            continue
        try:
            file.decode(bytes(mutated))
        except PackedError as error:
            assert "\n" not in str(error)  # noqa: PT017 - a spare byte of the header may change
