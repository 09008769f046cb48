"""The README's figures are those of the files, and the pictures are the same every time."""

import json
from pathlib import Path

import pytest

from benchmarks import deploy_table, report, tables
from benchmarks.machine import ROOT
from tritonbnn import cli
from tritonbnn.compare.page import Result
from tritonbnn.compare.sets import Claim

HEAD = {
    "device": "A GPU",
    "command": "python -m benchmarks.train_step",
    "step": 2,
    "threads": 2,
    "commit": "abc",
}


def row(speed, **more):
    return {
        "seconds": [8 / speed],
        "median_seconds": 8 / speed,
        "spread": 0.04,
        "images_per_second": speed,
        "time_ms": {"pack": 1.0, "convolution forward": 2.5},
        **more,
    }


def side_by_side(claims=(), **top1):
    """A comparison's numbers, by row and seed."""
    one = {"recipe": "fashion", "epochs": {"step2": 20}, "published": {}}
    rows = {name: {**one, "title": name} for name in top1}
    values = {
        name: {
            str(seed): {"top1": value, "step2.top1": value, "flip_flop_sampled": 0.01}
            for seed, value in enumerate(of_seeds)
        }
        for name, of_seeds in top1.items()
    }
    return Result([], rows, list(claims), 2, values).document()


@pytest.fixture
def place(tmp_path):
    """A README and the results of one GPU."""
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    markers = f"before\n{deploy_table.BEGIN}\nold\n{deploy_table.END}\nafter\n"
    (tmp_path / "deploy.md").write_text(markers)
    folder = tmp_path / "results" / "a-gpu"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    rows = {
        "ours+bf16": row(8000.0, peak_mb=1500.0, saved_mb_per_image=12.0, share_of_floor=0.7),
        "expert+compile": row(16000.0, peak_mb=2000.0, saved_mb_per_image=30.0),
        "expert": row(4000.0, saved_mb_per_image=36.0),
        "obvious": {"out_of_memory": True, "largest_batch": 4},
        "twin": row(2000.0, peak_mb=3000.0),
    }
    floors = {"bf16 keep": {"images_per_second": 11000.0}}
    point = {"batch": 8, "size": 224, "rows": rows, "floors": floors}
    write(folder / "train_step_2.json", {**HEAD, "points": [point]})
    double = {**point, "batch": 16, "rows": {**rows, "twin": {"failed": "no compiler"}}}
    write(folder / "batch_sweep.json", {**HEAD, "points": [point, double]})
    write(folder / "compare_fashion.json", {**HEAD, **side_by_side(fashion=[92.0, 93.0])})
    return tmp_path


def write(path: Path, result: dict) -> None:
    path.write_text(json.dumps(result))


def run(place, *flags):
    where = ["--results", str(place / "results"), "--readme", str(place / "README.md")]
    where += ["--deploy-page", str(place / "deploy.md")]
    return report.main([*where, "--page", str(place / "docs" / "results.md"), *flags])


@pytest.fixture
def cpu(place):
    """The results of one CPU more: three rivals, and the digits of another commit."""
    folder = place / "results" / "cpu-a-2-cores"
    folder.mkdir()
    rows = {"ours": row(8.0, saved_mb_per_image=32.0), "obvious": row(4.0, cpu_seconds=3.9)}
    head = {**HEAD, "device": "A CPU"}
    point = {"batch": 8, "size": 224, "rows": rows}
    write(folder / "train_step_2.json", {**head, "points": [point]})
    rows = {"ours": row(80.0), "expert": row(50.0), "expert+compile": row(100.0)}
    point = {"batch": 64, "size": 32, "rows": rows}
    write(folder / "train_step_digits_2.json", {**head, "commit": "def", "points": [point]})
    one = {"ours": row(50.0), "expert": row(40.0)}
    single = {**head, "threads": 1, "points": [{**point, "rows": one}]}
    write(folder / "train_step_digits_2_1_thread.json", single)
    peak = {"mb": {"ours": 700.0, "obvious": 2800.0}}
    peak["mb_by_process"] = {"ours": [700.0, 650.0, 720.0], "obvious": [2800.0] * 3}
    returning = {"mb": {"ours": 1.0}, "mb_by_process": {"ours": [1.0]}}
    mallocs = {"default": peak, "returning": returning}
    write(folder / tables.PEAK, {**head, "step": 2, "with_malloc": mallocs})
    return folder


def test_figures_come_from_the_files_and_the_rest_is_said_to_be_missing(place):
    assert run(place) == 0
    page = (place / "docs" / "results.md").read_text()
    assert "\n## A GPU\n" in page
    lines = page.splitlines()
    assert "| ours, bf16 | 1 ± 2% | - | 8,000 | 2.00 x | 12 | 1.5 | 70 % |" in lines
    assert "| obvious | out of memory; batch 4 fits | - | - | - | - | - | - |" in lines
    assert "| twin | 4 ± 2% | - | 2,000 | 8.00 x | - | 3 | - |" in lines
    swept = [line for line in lines if line.startswith("| 16 | 8,000 ± 2% |")]
    assert swept[0].endswith("| out of memory; batch 4 fits | failed: no compiler |")
    assert "| fashion, threads: 2 | seeds | epochs | step2, top-1, % |" in page
    assert "| fashion | 2 | 20 | 92.5 ± 0.71 | 10 ± 0 |" in lines
    assert "compare digits: not measured yet." in lines
    assert "| img/s by size |" in lines
    assert lines[lines.index("| img/s by size |") + 2] == "| not measured yet |"


def test_layers_alone_have_a_table_where_they_were_measured(place, cpu):
    path = cpu / tables.LAYERS
    assert run(place) == 0
    page = place / "docs" / "results.md"
    assert "A layer alone" not in page.read_text()
    times = {"eval": (0.003, 0.015), "weight": (0.01, 0.02), "stream": (0.04, 0.03)}
    ways = {
        way: {
            "BinaryConv2d": {"median_seconds": own, "spread": 0.1},
            "nn.Conv2d": {"median_seconds": theirs, "spread": 0.1},
        }
        for way, (own, theirs) in times.items()
    }
    layer = {"kernel_size": 3, "channels": 128, "size": 56, "ways": ways}
    head = {"threads": 2, "commit": "abc", "command": "python -m benchmarks.layers", "rounds": 5}
    write(path, {**head, "device": "A CPU", "batch": 8, "dtype": "float32", "layers": [layer]})
    assert run(place) == 0
    lines = page.read_text().splitlines()
    assert "| layer, batch 8, float32, threads: 2 | eval forward |" in "\n".join(lines)
    cells = "15 ÷ 3 = 5.00 x | 20 ÷ 10 = 2.00 x | 30 ÷ 40 = 0.75 x"
    assert f"| 3 x 3, 128 channels at 56 x 56 | {cells} |" in lines
    assert "From `python -m benchmarks.layers`, commit abc, 5 rounds." in lines
    write(path, {**head, "device": "A CPU", "batch": 8, "dtype": "float32", "layers": [{}]})
    with pytest.raises(cli.UserError, match=f"{tables.LAYERS} is not as expected"):
        run(place)


def test_verdicts_are_derived_when_the_page_is_written(place):
    """From the seeds' numbers; a sentence in the file, of whatever code wrote it, is not read."""
    path = place / "results" / "a-gpu" / "paper_digits.json"
    claims = [Claim("Adam is better", "top1", ("sgd", "adam"))]
    claims.append(Claim("Adam flips more", "flip_flop", ("sgd", "adam")))
    for value, expected in (
        (93, "holds."),
        (79, "so in the means, but the seeds overlap."),
        (-9, "not so in the means, but the seeds overlap."),
    ):
        numbers = side_by_side(claims, sgd=[80, 81, 82], adam=[value, 94, 95])
        stale = {"summary": {"orders": [{"verdict": "A stale sentence."}]}}
        write(path, {**HEAD, **numbers, **stale})
        assert run(place) == 0
        page = (place / "docs" / "results.md").read_text()
        assert f"- Adam is better: {expected}\n" in page
        assert "- Adam flips more: not decided: runs are missing, or do not tell it.\n" in page
        assert "| FF ratio (sampled), 1e-3 |" in page
        assert "stale" not in page


def test_the_committed_comparisons_hold_numbers_and_no_verdict():
    folder = ROOT / "benchmarks" / "results"
    found = [json.loads(path.read_text()) for path in folder.glob("*/*.json")]
    found = [result for result in found if "values" in result]
    assert found
    for result in found:
        runs = [run for of_seeds in result["values"].values() for run in of_seeds.values()]
        assert {type(value) for run in runs for value in run.values()} == {float}
        assert Result.of(result).verdicts() is not None
        words = {key for key, value in result.items() if isinstance(value, str)}
        assert words <= {"device", "cpu", "python", "torch", "triton", "commit", "command", "code"}


def test_the_readme_sets_ours_against_the_best_expert_and_twin(place):
    assert run(place) == 0
    readme = (place / "README.md").read_text()
    assert readme.startswith(f"before\n{report.BEGIN}\n\n**A GPU**\n")
    assert readme.endswith(f"{report.END}\nafter\n")
    lines = readme.splitlines()
    assert "| ours, bf16 | - | 1 ± 2% | - | - | - | 12 | 1,500 |" in lines
    assert "| **ours ÷ best expert** | - | 2.00 x | - | - | - | 0.40 x | 0.75 x |" in lines
    assert "| **ours ÷ best twin** | - | 0.25 x | - | - | - | - | 0.50 x |" in lines
    assert "Ours is slower than the fastest expert in step 2." in readme
    assert "Not measured against the expert yet: step 1, digits step 1, digits step 2." in readme
    assert "All of commit abc." in lines


def test_a_ratio_is_of_rivals_that_took_turns(place):
    """Max-autotune has a file of its own, with ours in it again."""
    rows = {"ours+bf16": row(9000.0), "expert+max-autotune": row(27000.0)}
    point = {"batch": 8, "size": 224, "rows": rows}
    folder = place / "results" / "a-gpu"
    write(folder / "train_step_2_max_autotune.json", {**HEAD, "points": [point]})
    run(place)
    readme = (place / "README.md").read_text()
    assert "| **ours ÷ best expert** | - | 3.00 x |" in readme


def test_missing_rivals_are_dashes_and_commits_are_told_apart(place, cpu):
    assert run(place) == 0
    readme = (place / "README.md").read_text().partition("**A CPU, 2 cores, no GPU**")[2]
    lines = readme.splitlines()
    assert "| ours | - | 1,000 ± 2% | - | 100 ± 2% | - | 32 | 700 |" in lines
    assert "| expert | - | - | - | 160 ± 2% | - | - | - |" in lines
    assert "| twin, torch.compile | - | - | - | - | - | - | - |" in lines
    assert "| **ours ÷ best expert** | - | - | - | 1.25 x | - | - | - |" in lines
    assert "**Of several commits**" in readme
    assert "def: train_step_digits_2.json" in readme
    assert "step 2 at batch 8, 224 x 224, threads: 2." in readme
    page = (place / "docs" / "results.md").read_text().partition("## A CPU")[2]
    assert "| obvious | 2,000 ± 2% | 3,900 | 4 | - | - |" in page
    assert "| step 2, batch 64, 32 x 32, threads: 1 |" in page
    assert "| ours | 700 | 650 | 720 |" in page


def test_the_readme_shows_the_cpu_on_which_the_expert_was_measured(place, cpu):
    newer = cpu.with_name("cpu-b-8-cores")
    newer.mkdir()
    rows = {"ours": row(8.0), "expert": row(4.0)}
    points = [{"batch": 8, "size": 224, "rows": rows}]
    head = {**HEAD, "device": "B CPU", "cpu": "family 1", "instructions": ["avx2"]}
    write(newer / "train_step_2.json", {**head, "points": points})
    run(place)
    readme = (place / "README.md").read_text()
    assert "**B CPU, family 1, avx2, 8 cores, no GPU**" in readme
    assert "A CPU" not in readme
    assert "## A CPU, 2 cores, no GPU" in (place / "docs" / "results.md").read_text()


def test_without_any_gpu_that_is_said(tmp_path):
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}")
    (tmp_path / "deploy.md").write_text(f"{deploy_table.BEGIN}\n{deploy_table.END}")
    (tmp_path / "results" / "tiny-cpu").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    assert run(tmp_path) == 0
    assert "Not measured on a GPU yet: `make gpu`" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_check_tells_a_page_that_differs(place, name, capsys):
    assert run(place, "--check") == 1
    assert "old" in (place / "README.md").read_text()
    assert not (place / "docs" / "results.md").exists()
    assert run(place) == 0
    capsys.readouterr()
    assert run(place, "--check") == 0
    assert capsys.readouterr().err == ""
    page = place / name
    page.write_text(page.read_text().replace("1.5", "1.6").replace("1,500", "1,600"))
    assert run(place, "--check") == 1
    said = capsys.readouterr().err
    assert said == f"stale: {page}: run python -m benchmarks.report\n"


def test_check_tells_a_file_that_changed(place, capsys):
    run(place)
    path = place / "results" / "a-gpu" / "train_step_2.json"
    path.write_text(path.read_text().replace("0.001", "0.002"))
    assert run(place, "--check") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_pictures_are_the_same_every_time(place):
    folder = place / "results" / "a-gpu"
    run(place)
    first = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}
    names = {
        f"{name}.{kind}" for name in ("families", "memory", "throughput") for kind in ("svg", "png")
    }
    assert set(first) == names
    for name in first:
        (folder / name).unlink()
    run(place)
    assert {name: (folder / name).read_bytes() for name in names} == first
    assert b"<dc:date>" not in first["memory.svg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"train_step_2.json cannot be read"),
        ("[]", r"train_step_2.json is not a result"),
        ('{"points": []}', r"train_step_2.json is not as expected \(IndexError"),
        ('{"points": [{"rows": {"ours": {}}, "batch": 1}]}', r"train_step_2.json is not as"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(place, text, message):
    (place / "results" / "a-gpu" / "train_step_2.json").write_text(text)
    before = (place / "README.md").read_text()
    with pytest.raises(cli.UserError, match=message) as caught:
        run(place)
    assert "\n" not in str(caught.value)
    assert (place / "README.md").read_text() == before


def test_a_readme_without_a_place_for_results(place):
    (place / "README.md").write_text("nothing")
    with pytest.raises(cli.UserError, match=r"README\.md needs the lines"):
        run(place)
    (place / "README.md").unlink()
    with pytest.raises(cli.UserError, match="cannot read"):
        run(place)


def test_the_committed_pages_show_what_is_in_the_files():
    assert report.main(["--check"]) == 0
    page = (ROOT / "docs" / "results.md").read_text()
    shown = 0
    for device in report.devices(ROOT / "benchmarks" / "results"):
        for name in tables.STEP_FILES.values():
            for point in (device.get(name) or {"points": []})["points"]:
                for each in point["rows"].values():
                    if "images_per_second" in each:
                        assert f"| {each['images_per_second']:,.4g} |" in page
                        shown += 1
    assert shown
