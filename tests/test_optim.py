"""Optimisers: their groups, their arithmetic, their settings, and their state, bit for bit."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tritonbnn.cli import UserError
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryConv2d, RPReLU, RSign
from tritonbnn.optim import (
    OPTIMIZERS,
    build_optimizer,
    describe_groups,
    optimizer_state,
    parameter_groups,
    restore_optimizer,
    set_learning_rate,
)
from tritonbnn.settings import Choice, Options
from tritonbnn.train.checkpoint import encode, read


def network(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        RSign(8),
        BinaryConv2d(8, 8, 3, padding=1),
        RPReLU(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return model.to(memory_format=memory_format)


def test_groups_go_by_the_kind_of_module():
    model = network()
    groups = parameter_groups(model)
    name_of = {id(p): name for name, p in model.named_parameters()}
    names = {group: {name_of[id(p)] for p in ps} for group, ps in groups.items()}
    assert names == {
        "binary": {"3.weight"},
        "decayed": {"0.weight", "2.shift", "4.shift_in", "4.shift_out"},
        "rest": {"0.bias", "1.weight", "1.bias", "4.slope", "7.weight", "7.bias"},
    }


def test_a_group_has_settings_of_its_own():
    settings = OPTIMIZERS["adam"](
        groups={"binary": {"lr_factor": 0.1, "betas": [0.5, 0.6]}, "rest": {"weight_decay": 1}}
    )
    optimizer = build_optimizer(Choice("adam", settings), network(), 1e-3, 1e-4)
    set_learning_rate(optimizer, 1e-2)
    found = {
        group["name"]: (group["lr"], group["betas"], group["weight_decay"])
        for group in optimizer.param_groups
    }
    assert found == {
        "binary": (1e-3, (0.5, 0.6), 1e-4),
        "decayed": (1e-2, (0.9, 0.999), 1e-4),
        "rest": (1e-2, (0.9, 0.999), 1.0),
    }


def test_groups_have_the_published_sizes():
    with torch.device("meta"):
        model = build_model("reactnet_a", binary_weights=False)
    optimizer = build_optimizer("adam", model, 1e-3, 5e-6)
    sizes = [
        (len(g["params"]), sum(p.numel() for p in g["params"])) for g in optimizer.param_groups
    ]
    binary, decayed, rest = sizes
    # the published code decays 105 tensors, and makes no difference between the first two groups
    assert [binary[i] + decayed[i] for i in (0, 1)] == [105, 28_285_792]
    assert rest == (82, 29_343_592 - 28_285_792)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [5e-6, 5e-6, 0]
    said = f"Adam: {binary[0]} binary tensors / {binary[1]:,} scalars at L2 5e-06, "
    assert describe_groups(optimizer).startswith(said)


def test_three_steps_of_adam_are_the_formula():
    """Moments, bias correction, and the L2 term added to the gradient of the decayed group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)).double()
    lr, decay, beta1, beta2 = 0.01, 0.1, 0.9, 0.999
    optimizer = build_optimizer("adam", model, lr, decay)
    assert optimizer.defaults["fused"]
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in expected.items()}
    for step in range(1, 4):
        for name, parameter in model.named_parameters():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient.clone()
            gradient += decay * expected[name] if name == "0.weight" else 0
            m, v = moments[name]
            m.mul_(beta1).add_((1 - beta1) * gradient)
            v.mul_(beta2).add_((1 - beta2) * gradient**2)
            scaled = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + 1e-8)
            expected[name] -= lr * scaled
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-14)


def test_three_steps_of_sgd_are_the_formula():
    """Momentum 0.9, and the L2 term added to the gradient of the decayed group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)).double()
    lr, decay = 0.01, 0.1
    optimizer = build_optimizer("sgd", model, lr, decay)
    assert "SGD: 1 decayed tensors / 54 scalars at L2 0.1, 2 rest tensors" in describe_groups(
        optimizer
    )
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(p) for name, p in expected.items()}
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient = parameter.grad + (decay * expected[name] if name == "0.weight" else 0)
            momenta[name] = 0.9 * momenta[name] + gradient
            expected[name] = expected[name] - lr * momenta[name]
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-14)


class Signum(Optimizer):
    """A user's own: tensors of several dtypes and layouts, numbers, and what is of no parameter."""

    def __init__(self, params, lr: float, rho: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "rho": rho, "weight_decay": weight_decay, "drawn": 0})

    @torch.no_grad()
    def step(self, closure=None):
        self.state["all"] = self.state.get("all", 0) + 1
        for group in self.param_groups:
            group["drawn"] += len(group["params"])
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                    state["age"] = torch.zeros(p.shape, dtype=torch.int16)
                    state["rows"] = torch.zeros(p.shape[0], dtype=torch.float64)
                    state["calls"] = 0
                state["calls"] += 1
                state["mean"].mul_(group["rho"]).add_(p.grad, alpha=1 - group["rho"])
                state["age"] += (state["mean"] > 0).to(torch.int16)
                state["rows"] += p.grad.flatten(1).sum(1) if p.dim() > 1 else p.grad
                noise = torch.rand(p.shape) / (1 + self.state["all"] + group["drawn"])
                scale = 1 + state["calls"] + state["age"].to(p.dtype) + state["rows"].sum().to(p)
                p.sub_((state["mean"].sign() + noise) * group["lr"] / scale.abs().clamp(min=1))


class Bad(Optimizer):
    """Keeps what cannot be saved."""

    kept: object = [1, 2]

    def __init__(self, params, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["kept"] = self.kept


OWN = Choice(f"{__name__}.Signum", Options({"rho": 0.8}))


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4) % 3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# Those of signs and of noise need settings and weights of their own: test_optimiser_settings.py
USUAL = [name for name in OPTIMIZERS if name not in ("bop", "bop_second_order", "ivon")]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", [*USUAL, "sgd nesterov", "adam amsgrad", "own"])
def test_an_optimiser_goes_on_bit_for_bit(tmp_path, name: str, memory_format):
    """Through a file, which forgets strides, and JSON, which forgets tuples."""
    kind, _, option = name.partition(" ")
    settings = OPTIMIZERS.get(kind, OPTIMIZERS["adam"])(**({option: True} if option else {}))
    choice = OWN if name == "own" else Choice(kind, settings)
    model = network(memory_format)
    optimizer = build_optimizer(choice, model, 1e-2, 1e-3)
    train(model, optimizer, range(3))
    tensors, facts = optimizer_state(model, optimizer)
    path = tmp_path / "state.safetensors"
    path.write_bytes(encode(tensors, {"facts": facts}))
    weights = copy.deepcopy(model.state_dict())
    groups = copy.deepcopy([{**g, "params": None} for g in optimizer.param_groups])
    train(model, optimizer, range(3, 6))

    other = network(memory_format)
    other.load_state_dict(weights)
    resumed = build_optimizer(choice, other, 1e-2, 1e-3)
    saved = read(path)
    restore_optimizer(other, resumed, saved.tensors, saved.facts["facts"])
    assert [{**g, "params": None} for g in resumed.param_groups] == groups
    train(other, resumed, range(3, 6))
    for (key, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        before, after = optimizer.state[p], resumed.state[q]
        assert before.keys() == after.keys()
        for key, value in before.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, after[key])
                assert value.dtype == after[key].dtype
                assert value.stride() == after[key].stride()
            else:
                assert value == after[key]


@pytest.mark.parametrize("kept", [[1, 2], {"a": torch.ones(1)}, object(), (torch.ones(1),)])
def test_a_state_that_cannot_be_kept_is_one_line(monkeypatch, kept):
    monkeypatch.setattr(Bad, "kept", kept)
    model = network()
    optimizer = build_optimizer(Choice(f"{__name__}.Bad", Options()), model, 1e-2)
    optimizer.step()
    with pytest.raises(UserError) as caught:
        optimizer_state(model, optimizer)
    words = str(caught.value)
    assert "Bad keeps 'kept' of type" in words
    assert "keep tensors and numbers" in words


def test_a_number_of_every_kind_is_json():
    model = network()
    optimizer = build_optimizer(OWN, model, 1e-2)
    train(model, optimizer, range(2))
    facts = optimizer_state(model, optimizer)[1]
    assert json.loads(json.dumps(facts))["numbers"]["_alone"] == {"all": 2}


class NoOptimizer:
    """Named like one."""


class NoDecay(Optimizer):
    """Does not know weight decay."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("nowhere.Signum", {}, "Python finds no module nowhere"),
        ("tests.nowhere.Signum", {}, "Python finds no module tests.nowhere"),
        ("tests.test_optim.Signun", {}, "has no Signun (did you mean Signum?)"),
        ("tests.test_optim.NoOptimizer", {}, "is no subclass of torch.optim.optimizer.Optimizer"),
        ("tests.test_optim.network", {}, "is no subclass of torch.optim.optimizer.Optimizer"),
        ("tests.test_optim.Signum", {"roh": 1}, "takes no 'roh': choose from lr, rho"),
        ("tests.test_optim.Signum", {"groups": {"bin": {}}}, "unknown group 'bin'"),
        ("tests.test_optim.NoDecay", {}, "has no weight decay: set weight_decay to 0"),
        ("torch.optim.Adam", {"betas": (2.0, 0.9)}, "Invalid beta parameter"),
    ],
)
def test_an_optimiser_of_the_users_own_is_checked(name: str, given: dict, words: str):
    with pytest.raises(UserError) as caught:
        build_optimizer(Choice(name, Options(given)), network(), 1e-3, 1e-4)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"bin": {}}, "unknown group 'bin': choose from binary, decayed, rest"),
        ({"rest": {"beta": 1}}, "unknown key 'beta' of optimizer.groups.rest (did you mean betas?"),
        ({"rest": {"lr_factor": -1}}, "--optimizer.groups.rest.lr-factor must be at least 0"),
        ({"rest": {"betas": [0.9]}}, "--optimizer.groups.rest.betas must be 2 values, not 1"),
    ],
)
def test_settings_of_a_group_are_checked(groups: dict, words: str):
    with pytest.raises(UserError) as caught:
        OPTIMIZERS["adam"](groups=groups)
    assert words in str(caught.value)
