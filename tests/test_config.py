"""Recipes and command lines become one configuration, or one line that says what is wrong."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from tritonbnn.cli import UserError
from tritonbnn.methods import METHODS
from tritonbnn.models import MODELS
from tritonbnn.optim import OPTIMIZERS, SCHEDULES
from tritonbnn.settings import Choice, Options
from tritonbnn.train import __main__ as trainer
from tritonbnn.train.arguments import parse
from tritonbnn.train.config import CHOICES, MAY_CHANGE_ON_RESUME, Config, differences, to_toml
from tritonbnn.train.recipe import read_recipe, resolve, shipped_recipes

ONE = {"stage": [{"name": "one"}]}
TWO = {"stage": [{"name": "step1", "binary_weights": False}, {"name": "step2", "start": "step1"}]}


def stage_of(line: str, name: str = "step1"):
    """A stage as a command line makes it."""
    return parse(line.split()).config.stage(name)


def test_the_default_recipe_is_digits():
    arguments = parse([])
    assert arguments.config == resolve(read_recipe("digits"))
    assert arguments.out == Path("runs/digits")
    assert not arguments.fresh


def test_shipped_recipes():
    assert shipped_recipes() == [
        "bop-cifar10",
        "bop-digits",
        "bop2-digits",
        "cifar10",
        "cifar100",
        "digits",
        "fashion",
        "imagenet",
        "images",
        "ivon-digits",
        "wp-digits",
    ]
    imagenet = parse(["imagenet"]).config
    assert (imagenet.batch_size, imagenet.lighting) == (256, "published")
    fields = ("name", "binary_weights", "start", "epochs", "lr", "weight_decay", "published_top1")
    assert [tuple(getattr(stage, field) for field in fields) for stage in imagenet.stages] == [
        ("step1", False, "", 256, 1.25e-3, 5e-6, 71.4),
        ("step2", True, "step1", 256, 1.25e-3, 0.0, 70.5),
    ]
    for stage in imagenet.stages:
        assert stage.method == Choice("distill", METHODS["distill"].Settings("resnet34"))
        assert (stage.optimizer.name, stage.schedule.name) == ("adam", "adambnn")


def test_the_gamma_of_bop_on_cifar_falls_tenfold_every_hundred_epochs():
    [stage] = parse(["bop-cifar10"]).config.stages
    factors = [stage.schedule.settings(epoch, stage.epochs) for epoch in range(stage.epochs)]
    assert factors == pytest.approx([0.1 ** (epoch // 100) for epoch in range(500)])


def test_the_command_line_is_laid_over_the_recipe():
    config = parse(
        ["--epochs", "5", "--step2.epochs", "7", "--step1.lr", "1e-3", "--sync-bn"]
    ).config
    assert [stage.epochs for stage in config.stages] == [5, 7]
    assert [stage.lr for stage in config.stages] == [1e-3, 2.5e-3]
    assert config.sync_bn
    assert config.stage("step1").weight_decay == 5e-6  # the recipe's


def test_a_shared_key_on_the_command_line_beats_a_key_of_one_stage_in_the_recipe():
    config = parse(["--weight-decay", "1e-4"]).config
    assert [stage.weight_decay for stage in config.stages] == [1e-4, 1e-4]


def test_choices_have_settings_of_their_own():
    line = "--optimizer sgd --optimizer.momentum 0.8 --optimizer.nesterov true --step2.optimizer"
    line += " radam --step2.optimizer.betas 0.8,0.9 --schedule cosine --schedule.warmup 3"
    line += " --label-smoothing 0.1 --optimizer.groups.binary.lr-factor 0.5"
    first, second = parse(line.split()).config.stages
    own = {"binary": {"lr_factor": 0.5}}
    expected = OPTIMIZERS["sgd"](momentum=0.8, nesterov=True, groups=own)
    assert first.optimizer == Choice("sgd", expected)
    assert second.optimizer == Choice("radam", OPTIMIZERS["radam"](betas=(0.8, 0.9)))
    for stage in (first, second):
        assert stage.schedule == Choice("cosine", SCHEDULES["cosine"](warmup=3))
        assert stage.method == Choice("plain", METHODS["plain"].Settings(0.1))


def test_another_choice_forgets_the_settings_of_the_one_before(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'optimizer = { name = "sgd", momentum = 0.5 }\n[[stage]]\nname = "a"\n'
        '[[stage]]\nname = "b"\n[stage.optimizer]\nnesterov = true\n'
    )
    a, b = parse([str(path)]).config.stages
    assert a.optimizer.settings == OPTIMIZERS["sgd"](momentum=0.5)
    assert b.optimizer.settings == OPTIMIZERS["sgd"](momentum=0.5, nesterov=True)
    a, b = parse([str(path), "--optimizer", "rmsprop", "--b.lr", "1"]).config.stages
    assert a.optimizer == b.optimizer == Choice("rmsprop", OPTIMIZERS["rmsprop"]())
    assert (a.lr, b.lr) == (1.25e-3, 1.0)


@pytest.mark.parametrize(
    ("line", "name", "settings"),
    [
        ("digits", "plain", {"label_smoothing": 0.0}),
        ("digits --teacher none", "plain", {"label_smoothing": 0.0}),
        ("digits --teacher a.pth", "distill", {"teacher": str(Path("a.pth").absolute())}),
        ("imagenet", "distill", {"teacher": "resnet34"}),
        ("imagenet --teacher a.pth", "distill", {"teacher": str(Path("a.pth").absolute())}),
        ("imagenet --teacher none", "plain", {"label_smoothing": 0.0}),
        ("imagenet --teacher none --label-smoothing 0.2", "plain", {"label_smoothing": 0.2}),
        ("imagenet --method plain", "plain", {"label_smoothing": 0.0}),
        (
            "digits --method distill --method.teacher a.pth",
            "distill",
            {"teacher": str(Path("a.pth").absolute())},
        ),
    ],
)
def test_a_teacher_is_the_short_name_of_a_method(line: str, name: str, settings: dict):
    assert stage_of(line).method == Choice(name, METHODS[name].Settings(**settings))


def test_a_class_of_the_users_own_takes_what_it_is_given():
    line = "--optimizer torch.optim.Adagrad --optimizer.lr-decay 0.1 --optimizer.foreach false"
    found = stage_of(f"{line} --optimizer.initial-accumulator-value 1").optimizer
    given = {"lr_decay": 0.1, "foreach": False, "initial_accumulator_value": 1}
    assert found == Choice("torch.optim.Adagrad", Options(given))


def test_every_flag_of_the_contract_exists(tmp_path: Path):
    line = (
        "images --out o --data-dir d --device cpu --epochs 3 --batch-size 8 --lr 1e-3 --width 0.5"
        " --precision bf16 --step 1 --teacher none --seed 3 --workers 2 --fresh --init-from f"
    )
    arguments = parse(line.split())
    assert arguments.fresh
    assert [stage.name for stage in arguments.config.chosen] == ["step1"]
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
    (tmp_path / "old.toml").write_text(
        'dataset = "folder"\ndata_dir = "photos"\n[[stage]]\nname = "only"\n'
    )
    config = parse([str(tmp_path / "old.toml")]).config
    assert (config.dataset, config.data_dir) == ("images", str(Path.cwd() / "photos"))


def test_a_resolved_configuration_is_a_recipe(tmp_path: Path):
    config = parse(["imagenet", "--data-dir", 'a "quoted" é', "--step1.epochs", "3"]).config
    path = tmp_path / "imagenet.toml"
    path.write_text(to_toml(config), "utf-8")
    assert parse([str(path)]).config == config
    assert [t["epochs"] for t in tomllib.loads(to_toml(config))["stage"]] == [3, 256]


def test_every_choice_is_written_and_read_again(tmp_path: Path):
    for key, known in CHOICES.items():
        for name in known:
            config = resolve(TWO, {key: name})
            path = tmp_path / f"{name}.toml"
            path.write_text(to_toml(config))
            assert resolve(read_recipe(str(path)), {"recipe": ""}) == config
    own = {"name": "torch.optim.Adagrad", "eps": 1e-9, "groups": {"rest": {"lr_factor": 2}}}
    config = resolve(ONE, {"optimizer": own, "method": {"name": "my.Method", "deep": [1, "a b"]}})
    path.write_text(to_toml(config))
    assert resolve(read_recipe(str(path)), {"recipe": ""}) == config


OLD = """
recipe = "mine"
teacher = "{teacher}"
label_smoothing = 0.1
optimizer = "sgd"
step = {step}
seed = 3

[step1]
epochs = 4
lr = 0.002
weight_decay = 5e-06

[step2]
epochs = 5
lr = 0.001
weight_decay = 0.0
"""


@pytest.mark.parametrize(("step", "names"), [(0, ["step1", "step2"]), (2, ["step2"])])
def test_a_configuration_from_before_stages_had_names(tmp_path: Path, step: int, names: list[str]):
    path = tmp_path / "mine.toml"
    path.write_text(OLD.format(step=step, teacher="none"))
    config = parse([str(path)]).config
    assert [stage.name for stage in config.chosen] == names
    first, second = config.stages
    assert (first.binary_weights, second.binary_weights) == (False, True)
    assert (first.start, second.start) == ("", "step1")
    assert [(s.epochs, s.lr, s.weight_decay) for s in config.stages] == [
        (4, 0.002, 5e-6),
        (5, 0.001, 0.0),
    ]
    assert first.method == Choice("plain", METHODS["plain"].Settings(0.1))
    assert first.optimizer == Choice("sgd", OPTIMIZERS["sgd"]())
    path.write_text(OLD.format(step=step, teacher="resnet34"))
    assert parse([str(path)]).config.stage("step2").method.name == "distill"


def test_help_names_choices_and_what_the_recipe_sets(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        trainer.main(["imagenet", "--help", "--step2.epochs", "9"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "VALUE" not in text
    assert (
        "--epochs INT passes over the training images (default: 256 in step1, 9 in step2)" in text
    )
    assert f"--model {{{','.join(MODELS)}}} network (default: reactnet_a)" in text
    assert f"--optimizer {{{','.join(OPTIMIZERS)}}} or package.Class of your own" in text
    assert "--method.teacher TEXT resnet34, or a file with its weights (default: resnet34)" in text
    assert "--optimizer.betas NUMBER,NUMBER" in text
    assert "(default: 0.9,0.999)" in text
    assert "--stage NAME run it alone (step1, step2)" in text
    assert (
        "--compile, --no-compile network and teacher through torch.compile (default: false)" in text
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("digit", "unknown recipe 'digit': choose from bop-cifar10, bop-digits, bop2-digits,"),
        ("missing.toml", "cannot read recipe missing.toml"),
        ("--epoch 3", "unknown argument --epoch (did you mean --epochs?)"),
        ("--step3.epochs 3", "unknown argument --step3.epochs (did you mean step2?)"),
        ("--step1.epoch 3", "unknown key 'step1.epoch' (did you mean epochs?)"),
        ("--step1.epochs", "argument --step1.epochs: expected one argument"),
        ("--step1.epochs --fresh", "argument --step1.epochs: expected one argument"),
        ("--optimizer adm", "--optimizer adm: choose from adam, adamw, sgd, nadam, rmsprop, radam"),
        ("--optimizer adm", "(did you mean adam?), or a class of your own as package.Class"),
        ("--step2.optimizer adm", "--step2.optimizer adm: choose from"),
        ("--method plane", "--method plane: choose from plain, distill (did you mean plain?)"),
        ("--schedule cosin", "--schedule cosin: choose from adambnn, linear, cosine"),
        ("--schedule my.Own", "--schedule my.Own: choose from adambnn, linear, cosine"),
        ("--optimizer.momentum 0.9", "unknown key 'optimizer.momentum'"),
        ("--optimizer.beta 0.9", "unknown key 'optimizer.beta' (did you mean betas?)"),
        ("--optimizer.betas 0.9", "--optimizer.betas must be 2 values, not 1"),
        ("--optimizer.betas 0.9,1", "--optimizer.betas must be less than 1, not 1.0"),
        ("--optimizer.betas a,b", "--optimizer.betas must be a number, not 'a'"),
        ("--optimizer.amsgrad yes", "--optimizer.amsgrad must be true or false, not 'yes'"),
        ("--optimizer.groups.bin.eps 1", "unknown group 'bin': choose from binary, decayed, rest"),
        ("--optimizer.groups 1", "--optimizer.groups must be a table, not '1'"),
        ("--schedule.warmup 1", "unknown key 'schedule.warmup'"),
        ("--schedule cosine --schedule.warmup -1", "--schedule.warmup must be at least 0, not -1"),
        ("imagenet --label-smoothing 0.1", "--label-smoothing: method distill has no such setting"),
        ("--stage step3", "--stage step3: choose from step1, step2"),
        ("--optimizer no.Where", "optimizer no.Where: Python finds no module no"),
        ("--optimizer torch.optim.Adm", "has no Adm (did you mean Adam?)"),
        ("--optimizer torch.nn.Linear", "is no subclass of torch.optim.optimizer.Optimizer"),
        ("--optimizer torch.optim.Adagrad --optimizer.mu 1", "takes no 'mu': choose from lr"),
        ("--method torch.optim.Adam", "is no subclass of tritonbnn.methods.method.Method"),
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
        ("[step3]\nlr = 3", "unknown key 'step3'"),
        ("epochs = true", "--epochs must be a whole number, not True"),
        ('epochs = "x"', "--epochs must be a whole number, not 'x'"),
        ("sync_bn = 1", "--sync-bn must be true or false, not 1"),
        ("model = 3", "--model must be text, not 3"),
        ("lr = nan", "--lr must be a finite number"),
        ("epochs = [1]", "--epochs must be a whole number, not [1]"),
        ("step1 = 3", "unknown key 'step1'"),
        ("lr = 1.0", "the recipe has no stage: add a [[stage]] table"),
        ("stage = 3", "a stage is a [[stage]] table with a name"),
        ("[stage]\nname = 'a'", "a stage is a [[stage]] table with a name"),
        ("[[stage]]\nlr = 1.0", "stage 1 has the name None"),
        ("[[stage]]\nname = '../a'", "stage 1 has the name '../a'"),
        ("[[stage]]\nname = ''", "stage 1 has the name ''"),
        ("[[stage]]\nname = 'optimizer'", "stage 1 has the name 'optimizer'"),
        ("[[stage]]\nname = 'a'\n[[stage]]\nname = 'a'", "there are two stages 'a'"),
        (
            "[[stage]]\nname = 'one'\n[[stage]]\nname = 'two'\nstart = 'ona'",
            "stage two starts from 'ona', which is neither a stage before it nor a checkpoint"
            " (did you mean one?)",
        ),
        (
            "[[stage]]\nname = 'a'\nstart = 'b'\n[[stage]]\nname = 'b'",
            "stage a starts from b, which does not come before it",
        ),
        ("[[stage]]\nname = 'a'\nstart = 'a'", "stage a starts from a, which does not come before"),
        ("[[stage]]\nname = 'a'\noptimizer = 3", "--a.optimizer must be a name, or a table"),
        ("[[stage]]\nname = 'a'\noptimizer = { name = 3 }", "--a.optimizer must be a name"),
        ("[[stage]]\nname = 'a'\nseed = 3", "unknown key 'a.seed'"),
        ("only = 'b'\n[[stage]]\nname = 'a'", "--stage b: choose from a"),
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
    "graph": True,
    "workers": 3,
    "data_dir": "elsewhere",
    "skip_bad_images": True,
    "only": "one",
    "log_interval": 7,
    "log_minutes": 0.5,
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
        if spec.name in (*CHANGED, "recipe", "stages"):
            continue
        value = getattr(before, spec.name)
        other = not value if isinstance(value, bool) else value * 2 + type(value)("1")
        found = differences(before, dataclasses.replace(before, **{spec.name: other}))
        assert found == [f"{spec.name} was {value!r} and is {other!r}"]


def test_epochs_may_grow_and_not_shrink():
    def with_own(**own: dict) -> Config:
        return resolve(TWO, {"epochs": 5, "own": own})

    before = with_own()
    assert differences(before, with_own(step2={"epochs": 6})) == []
    assert differences(before, with_own(step2={"epochs": 4})) == ["step2.epochs was 5 and is 4"]
    assert differences(before, with_own(step1={"lr": 1.0})) == ["step1.lr was 0.00125 and is 1.0"]


@pytest.mark.parametrize(
    ("layer", "phrases"),
    [
        ({"optimizer": "sgd"}, ["one.optimizer was 'adam' and is 'sgd'"]),
        (
            {"optimizer": {"name": "adam", "eps": 1.0, "amsgrad": True}},
            [
                "one.optimizer.eps was 1e-08 and is 1.0",
                "one.optimizer.amsgrad was False and is True",
            ],
        ),
        ({"label_smoothing": 0.5}, ["one.method.label_smoothing was 0.0 and is 0.5"]),
        ({"schedule": "linear"}, ["one.schedule was 'adambnn' and is 'linear'"]),
        ({"binary_weights": False}, ["one.binary_weights was True and is False"]),
        ({"published_top1": 50.0}, []),
    ],
)
def test_a_choice_may_not_change(layer: dict, phrases: list[str]):
    assert differences(resolve(ONE), resolve(ONE, layer)) == phrases


def test_stages_may_not_change():
    assert differences(resolve(ONE), resolve(TWO)) == ["stages were one and are step1, step2"]


def test_step_is_for_stages_of_that_name(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text("[[stage]]\nname = 'one'\n")
    with pytest.raises(UserError, match="--step is for stages step1 and step2: use --stage with"):
        parse([str(path), "--step", "1"])
    assert parse([str(path), "--step", "0", "--stage", "one"]).config.only == "one"
