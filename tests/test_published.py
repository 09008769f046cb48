"""The published weights: every tensor used or named, pairs merged in order, no code run."""

import pickle
from pathlib import Path

import pytest
import torch

from benchmarks.baseline import ObviousReActNetA
from tritonbnn.models import build_model, load_adambnn

OPTIONS = {"num_classes": 5, "width": 0.25}


@pytest.fixture
def published():
    torch.manual_seed(0)
    model = ObviousReActNetA(**OPTIONS)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    return model.state_dict()


def ours():
    return build_model("reactnet_a", **OPTIONS)


def test_every_tensor_lands_in_its_place(published):
    model = ours()
    report = load_adambnn(model, published)
    assert (report.tensors, report.merged) == (298, 30)
    unit = model.blocks[1][1]
    expected = [published[f"feature.2.binary_pw_down{i}.weight"] for i in (1, 2)]
    assert torch.equal(unit.weight, torch.cat(expected))
    assert torch.equal(unit.shift_out, published["feature.2.move23.bias"].flatten())
    total = sum(v.double().sum() for v in published.values() if v.dim())
    assert torch.isclose(
        sum(v.double().sum() for v in model.state_dict().values() if v.dim()), total
    )


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_file_loads(published, prefix, tmp_path):
    path = tmp_path / "model_best.pth.tar"
    state = {prefix + key: value for key, value in published.items()}
    content = {"epoch": 3, "state_dict": state, "best_top1_acc": torch.tensor(70.5)}
    torch.save(content, path)
    model, same = ours(), ours()
    load_adambnn(model, path)
    load_adambnn(same, published)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )


def test_tensors_that_do_not_fit_are_named(published):
    extra = published | {"feature.3.odd": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"not used feature\.3\.odd"):
        load_adambnn(ours(), extra)
    del published["feature.2.move12.bias"]
    with pytest.raises(ValueError, match=r"missing feature\.2\.move12\.bias"):
        load_adambnn(ours(), published)


def test_another_width_or_class_count_is_named(published):
    model = build_model("reactnet_a", num_classes=6, width=0.25)
    with pytest.raises(ValueError, match=r"fc\.weight must have shape \(6, 256\), not \(5, 256\)"):
        load_adambnn(model, published)


def test_a_failed_load_changes_nothing(published):
    model = ours()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    published["fc.bias"] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"fc\.bias"):
        load_adambnn(model, published)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_pickle_with_code_is_refused(tmp_path):
    path, witness = tmp_path / "weights.pth.tar", tmp_path / "witness"
    path.write_bytes(pickle.dumps({"state_dict": Malicious(witness)}, protocol=2))
    with pytest.raises(ValueError, match="without running code"):
        load_adambnn(ours(), path)
    torch.save({"state_dict": Malicious(witness)}, path)
    with pytest.raises(ValueError, match="without running code"):
        load_adambnn(ours(), path)
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_a_corrupt_file_is_one_clear_error(content, tmp_path):
    path = tmp_path / "weights.pth.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth\.tar"):
        load_adambnn(ours(), path)
    with pytest.raises(ValueError, match="does not exist"):
        load_adambnn(ours(), tmp_path / "absent.pth.tar")


def test_other_networks_are_refused(published):
    with pytest.raises(TypeError, match="reactnet_a"):
        load_adambnn(build_model("reactnet_18", num_classes=5, width=0.25), published)
