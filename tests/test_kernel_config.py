"""Problem keys, tuning tables, and what a problem runs as."""

import json
import math
from dataclasses import asdict, replace
from importlib.metadata import version

import pytest
import torch

from tests.helpers import assert_runs_silently
from tritonbnn.kernels import config
from tritonbnn.kernels.targets import TARGETS

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
        (
            entry(formulation="popcount"),
            "conv_real runs as dot or library or warpgroup, not as 'popcount'",
        ),
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


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders of reviewed tables and of the user's own."""
    reviewed, cache = tmp_path / "configs", tmp_path / "cache"
    monkeypatch.setattr(config, "CONFIG_DIR", reviewed)
    monkeypatch.setenv("TRITONBNN_CACHE", str(cache))
    config.table_of.cache_clear()
    for folder in (reviewed, cache / "tables"):
        folder.mkdir(parents=True)
    yield reviewed / "nvidia_test_80gb.json", cache / "tables" / "nvidia_test_80gb.json"
    config.table_of.cache_clear()


def test_an_unknown_gpu_gets_defaults(places):
    write(places[0], entry())
    assert config.table_of("NVIDIA Unknown") == {}
    assert config.table_of(GPU)[KEY].tile == TILE


def test_the_user_s_own_entries_come_first(places):
    small, other = config.TileConfig(16, 32, 32, 4, 2), replace(KEY, channels=64)
    write(places[0], entry(), entry(other))
    write(places[1], entry(tile=small))
    assert config.own_path(GPU) == places[1]
    found = config.table_of(GPU)
    assert (found[KEY].tile, found[other].tile) == (small, TILE)


@pytest.mark.parametrize("text", ["{", '{"gpu": "other", "entries": []}', ""])
def test_an_own_table_that_somebody_broke_costs_a_line(places, text, caplog):
    write(places[0], entry())
    places[1].write_text(text)
    assert config.table_of(GPU)[KEY].tile == TILE
    (record,) = caplog.records
    assert str(places[1]) in record.message
    assert record.message.endswith("that table is not used; remove it, or tune again")


def test_another_triton_s_one_bit_entries_are_left_out(places, caplog):
    one_bit = replace(KEY, op="conv_packed", dtype="int32")
    for path in places:
        write(path, entry(), entry(one_bit, "mma"))
        document = json.loads(path.read_text())
        path.write_text(json.dumps({**document, "triton": "1.0", "driver": "1"}))
    assert set(config.table_of(GPU)) == {KEY}
    said = [record.message for record in caplog.records]
    assert [line.split(" is of ")[0] for line in said] == [str(path) for path in places]
    assert said[0].endswith("is of Triton 1.0: its entries of mma, wgmma are left out")
    for path in places:
        document = json.loads(path.read_text())
        path.write_text(json.dumps({**document, "triton": version("triton")}))
    config.table_of.cache_clear()
    assert set(config.table_of(GPU)) == {KEY, one_bit}  # whatever the driver


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


def test_what_a_table_lacks_is_the_default_of_the_target_beside_it():
    tuned, other = (config.ProblemKey("conv_packed", "int32", 8, 9, 9, c, 64) for c in (32, 64))
    choice = config.Choice("popcount", config.TileConfig(32, 32, 32, 4, 2))
    device = torch.device("cpu")
    with config.using({tuned: choice}, TARGETS["sm_80"]):
        assert config.choose(tuned, device) == choice
        assert config.choose(other, device).formulation == "mma"
        assert config.choose_default(other, "mma", device).formulation == "mma"
    with config.using({tuned: choice}):
        assert config.choose(other, device).formulation == "int8"


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
        "assert config.table_of.cache_info().currsize == 0\n"
    )
    assert_runs_silently(code)


@pytest.mark.parametrize("block_n", [1, 2, 16, 32, 128])
def test_whole_words_make_a_tile_no_larger(block_n):
    """A narrow layer's epilogue: of 4 channels, a tile of whole words would be 8 times as large."""
    tile = config.TileConfig(4096 // block_n, block_n, 1, 4, 1)
    whole = config.whole_words(tile)
    assert whole.block_n == max(block_n, 32)
    assert whole.block_m * whole.block_n == 4096
