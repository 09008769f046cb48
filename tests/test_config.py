"""Recipes and command lines become one configuration, or one line that says what is wrong."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from tritonbnn.cli import UserError
from tritonbnn.train.arguments import parse, read_recipe, resolve, shipped_recipes
from tritonbnn.train.config import MAY_CHANGE_ON_RESUME, Config, differences, to_toml


def test_the_default_recipe_is_digits():
    arguments = parse([])
    assert arguments.config == resolve(read_recipe("digits"))
    assert arguments.out == Path("runs/digits")
    assert not arguments.fresh


def test_shipped_recipes():
    assert shipped_recipes() == ["cifar10", "cifar100", "digits", "fashion", "imagenet", "images"]
    imagenet = parse(["imagenet"]).config
    assert (imagenet.batch_size, imagenet.teacher, imagenet.lighting) == (
        256,
        "resnet34",
        "published",
    )
    steps = [dataclasses.astuple(imagenet.of_step(step)) for step in (1, 2)]
    assert steps == [(256, 1.25e-3, 5e-6), (256, 1.25e-3, 0.0)]


def test_the_command_line_is_laid_over_the_recipe():
    config = parse(
        ["--epochs", "5", "--step2.epochs", "7", "--step1.lr", "1e-3", "--sync-bn"]
    ).config
    assert (config.step1.epochs, config.step2.epochs) == (5, 7)
    assert (config.step1.lr, config.step2.lr) == (1e-3, 2.5e-3)
    assert config.sync_bn
    assert config.step1.weight_decay == 5e-6  # the recipe's


def test_a_shared_key_on_the_command_line_beats_a_step_key_of_the_recipe():
    config = parse(["--weight-decay", "1e-4"]).config
    assert (config.step1.weight_decay, config.step2.weight_decay) == (1e-4, 1e-4)


def test_every_flag_of_the_contract_exists(tmp_path: Path):
    line = (
        "images --out o --data-dir d --device cpu --epochs 3 --batch-size 8 --lr 1e-3 --width 0.5"
        " --precision bf16 --step 1 --teacher none --seed 3 --workers 2 --fresh --init-from f"
    )
    arguments = parse(line.split())
    assert arguments.fresh
    assert arguments.config.steps == (1,)
    assert arguments.config.data_dir == str(Path.cwd() / "d")


def test_scratch_is_no_path():
    assert parse(["--init-from", "scratch"]).config.init_from == "scratch"
    assert parse(["--init-from", "run"]).config.init_from == str(Path.cwd() / "run")


def test_digits_take_no_folder():
    with pytest.raises(UserError, match="--data-dir is not for the embedded digits") as caught:
        parse(["digits", "--data-dir", "photos"])
    assert "recipe images" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "flag", "value"),
    [
        *(("fashion", *pair) for pair in (("--class-order", "numeric"), ("--background", "red"))),
        *(("digits", *pair) for pair in (("--white-level", "4095"), ("--background", "red"))),
    ],
)
def test_a_setting_that_the_data_set_does_not_have_is_refused(recipe: str, flag: str, value: str):
    with pytest.raises(UserError, match=f"{flag} is not for .*recipe images"):
        parse([recipe, flag, value])


def test_a_data_set_keeps_its_older_name(tmp_path: Path):
    (tmp_path / "old.toml").write_text('dataset = "folder"\ndata_dir = "photos"\n')
    config = parse([str(tmp_path / "old.toml")]).config
    assert (config.dataset, config.data_dir) == ("images", str(Path.cwd() / "photos"))


def test_a_resolved_configuration_is_a_recipe(tmp_path: Path):
    config = parse(["imagenet", "--data-dir", 'a "quoted" é', "--step1.epochs", "3"]).config
    path = tmp_path / "imagenet.toml"
    path.write_text(to_toml(config), "utf-8")
    assert parse([str(path)]).config == config
    assert tomllib.loads(to_toml(config))["step1"]["epochs"] == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("digit", "unknown recipe 'digit' (did you mean digits?)"),
        ("missing.toml", "cannot read recipe missing.toml"),
        ("--epoch 3", "unknown argument --epoch (did you mean --epochs?)"),
        ("--step3.epochs 3", "unknown argument --step3.epochs"),
        ("digits fashion", "unknown argument fashion"),
        ("--epochs 0", "--epochs must be at least 1, not 0"),
        ("--step2.epochs -1", "--step2.epochs must be at least 1, not -1"),
        ("--epochs many", "--epochs must be a whole number, not 'many'"),
        ("--epochs 2.5", "--epochs must be a whole number, not '2.5'"),
        ("--batch-size 0", "--batch-size must be at least 1, not 0"),
        ("--lr nan", "--lr must be a finite number, not nan"),
        ("--lr inf", "--lr must be a finite number, not inf"),
        ("--lr 0", "--lr must be greater than 0, not 0.0"),
        ("--lr -1", "--lr must be greater than 0, not -1.0"),
        ("--lr fast", "--lr must be a number, not 'fast'"),
        ("--lr", "--lr: expected one argument"),
        ("--width 0", "--width must be greater than 0"),
        ("--label-smoothing 1", "--label-smoothing must be less than 1"),
        ("--precision fp8", "--precision fp8: choose from fp32, bf16, fp16"),
        ("--model reactnet_b", "(did you mean reactnet_a?)"),
        ("cifar10 --dataset cifar", "(did you mean cifar10?)"),
        ("images --class-order size", "--class-order size: choose from name, numeric"),
        ("images --background whitish", "--background 'whitish' is no colour"),
        ("images --white-level 65536", "--white-level must be 1 to 65535"),
        ("images --augment mixup", "--augment mixup: choose from imagenet, crop-flip, crop, none"),
        ("--step 3", "--step 3: choose from 0, 1, 2"),
        ("--seed -1", "--seed must be at least 0"),
    ],
)
def test_a_bad_command_line_is_named(line: str, words: str):
    with pytest.raises(UserError) as caught:
        parse(line.split())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 3", "unknown key 'epoch' in the recipe (did you mean epochs?)"),
        ("[step1]\nlrr = 3", "unknown key 'step1.lrr'"),
        ("[step3]\nlr = 3", "unknown key 'step3.lr'"),
        ("epochs = true", "--epochs must be a whole number, not True"),
        ('epochs = "x"', "--epochs must be a whole number, not 'x'"),
        ("sync_bn = 1", "--sync-bn must be true or false, not 1"),
        ("model = 3", "--model must be text, not 3"),
        ("lr = nan", "--lr must be a finite number"),
        ("epochs = [1]", "--epochs must be a whole number, not [1]"),
        ("step1 = 3", "unknown key 'step1'"),
        ("epochs 3", "is not valid TOML"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path: Path, text: str, words: str):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse([str(path)])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_no_text(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read recipe"):
        parse([str(path)])


CHANGED = {
    "device": "cuda",
    "workers": 3,
    "data_dir": "elsewhere",
    "step": 1,
    "log_interval": 7,
    "save_minutes": 1.5,
    "plan": "keep",
    "analysis": "full",
    "analysis_interval": 3,
}


def test_some_keys_may_change_on_resume():
    assert set(CHANGED) == set(MAY_CHANGE_ON_RESUME)
    assert differences(Config(), dataclasses.replace(Config(), **CHANGED)) == []


def test_every_other_key_may_not():
    before = Config()
    for spec in dataclasses.fields(Config):
        if spec.name in (*CHANGED, "recipe", "step1", "step2"):
            continue
        value = getattr(before, spec.name)
        other = not value if isinstance(value, bool) else value * 2 + type(value)("1")
        found = differences(before, dataclasses.replace(before, **{spec.name: other}))
        assert found == [f"{spec.name} was {value!r} and is {other!r}"]


def test_epochs_may_grow_and_not_shrink():
    before = resolve({"epochs": 5})
    assert differences(before, resolve({"epochs": 5, "step2.epochs": 6})) == []
    assert differences(before, resolve({"epochs": 5, "step2.epochs": 4})) == [
        "step2.epochs was 5 and is 4"
    ]
    assert differences(before, resolve({"epochs": 5, "step1.lr": 1.0})) == [
        "step1.lr was 0.00125 and is 1.0"
    ]
