"""Problem keys, tuning tables, and what a problem runs as."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from tests.helpers import assert_runs_silently
from tritonbnn.kernels import config

GPU = "NVIDIA Test 80GB"
KEY = config.ProblemKey("conv_real", "bfloat16", 256, 14, 14, 512, 512, 3, 1)
TILE = config.TileConfig(64, 128, 64, 4, 3)


def entry(key=KEY, formulation="dot", tile=TILE, **more):
    return {"key": asdict(key), "formulation": formulation, "tile": asdict(tile), **more}


def write(path, *entries, gpu=GPU):
    path.write_text(json.dumps({"gpu": gpu, "entries": list(entries)}))
    return path


@pytest.fixture
def table(tmp_path):
    small = config.TileConfig(16, 32, 32, 4, 2)
    entries = (entry(), entry(replace(KEY, batch=32), "library", small, time_us=3.5))
    return config.read_table(write(tmp_path / "table.json", *entries), GPU)


def test_lookup_takes_the_exact_key_then_the_nearest_bucket_then_the_default(table):
    assert config.look_up(KEY, table).tile == TILE
    assert config.look_up(replace(KEY, batch=200), table).tile == TILE
    assert config.look_up(replace(KEY, batch=4096), table).tile == TILE
    assert config.look_up(replace(KEY, batch=1), table).formulation == "library"
    other = replace(KEY, channels=256)
    assert config.look_up(other, table) == config.default(other)


def test_batches_fall_into_buckets():
    sizes = {0: 1, 1: 1, 2: 2, 3: 4, 256: 256, 257: 512}
    assert {size: replace(KEY, batch=size).bucketed().batch for size in sizes} == sizes
    assert KEY.distance(replace(KEY, batch=64)) == 2
    assert KEY.distance(replace(KEY, stride=2)) == math.inf


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("not an object", "expected an object, not 'not an object'"),
        ({"key": asdict(KEY), "tile": asdict(TILE)}, "misses formulation"),
        (entry(formulation="popcount"), "conv_real runs as dot or library, not as 'popcount'"),
        (entry(replace(KEY, op="conv")), "unknown op 'conv'"),
        (entry(replace(KEY, batch=3)), "batch must be a power of two, not 3"),
        (entry(replace(KEY, width=14.0)), "width must be int, not 14.0"),
        (entry(tile=replace(TILE, block_m=96)), "block_m must be a power of two, not 96"),
        (entry(tile=replace(TILE, num_stages=0)), "num_stages must be at least 1, not 0"),
        (entry(tile=replace(TILE, num_warps=True)), "num_warps must be int, not True"),
        ({**entry(), "tile": {"block_m": 1}}, "expected the fields block_m, block_n"),
        (entry(), "repeats the key"),
    ],
)
def test_a_malformed_entry_names_file_and_entry(tmp_path, bad, message):
    path = write(tmp_path / "table.json", entry(), bad)
    with pytest.raises(ValueError, match=r"table.json: entry 1: ") as caught:
        config.read_table(path, GPU)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "an object with a list of entries"),
        ('{"gpu": "NVIDIA Test 80GB"}', "an object with a list of entries"),
        ('{"gpu": "other", "entries": []}', "tuned for 'other', not for 'NVIDIA Test 80GB'"),
    ],
)
def test_a_malformed_or_foreign_table_is_named(tmp_path, text, message):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table.json: ") as caught:
        config.read_table(path, GPU)
    assert message in str(caught.value)


def test_an_unknown_gpu_gets_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path)
    config.shipped_table.cache_clear()
    assert config.shipped_table("NVIDIA Unknown") == {}
    write(tmp_path / "nvidia_test_80gb.json", entry())
    assert config.shipped_table(GPU)[KEY].tile == TILE
    config.shipped_table.cache_clear()


def test_shipped_tables_are_sound():
    for path in config.CONFIG_DIR.glob("*.json"):
        gpu = json.loads(path.read_text())["gpu"]
        assert path == config.table_path(gpu)
        config.read_table(path, gpu)


def test_a_forced_choice_ends_with_its_block():
    choice = config.Choice("library", TILE)
    before = config.choose(KEY, torch.device("cpu"))
    with config.using(choice):
        assert config.choose(KEY, torch.device("cpu")) == choice
    assert config.choose(KEY, torch.device("cpu")) == before != choice


def test_every_operation_has_a_default_for_the_smallest_and_the_widest_problem():
    for op in config.operations():
        formulations = config.known_formulations(op)
        for channels, outputs in ((1, 1), (33, 7), (1024, 1024)):
            outputs = outputs if op.startswith("conv") else 0
            key = config.ProblemKey(op, "bfloat16", 1, 1, 1, channels, outputs)
            for formulation in formulations:
                tile = config.default(key, formulation).tile
                assert all(
                    size == config.power_of_two(size)
                    for size in asdict(tile).values()
                    if size != tile.num_stages
                )


def test_importing_the_kernels_is_inert():
    code = (
        "import torch\n"
        "from tritonbnn import kernels\n"
        "from tritonbnn.kernels import config\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert config.shipped_table.cache_info().currsize == 0\n"
    )
    assert_runs_silently(code)
