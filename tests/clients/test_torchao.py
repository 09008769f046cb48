"""torchao's PT2E quantisation of an exported network: what is real becomes 8-bit, units stay."""

import pytest
import torch

from tests.clients import client
from tests.helpers import gradient
from tritonbnn import ops
from tritonbnn.models import build_model

pt2e = client("torchao.quantization.pt2e.quantize_pt2e")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao, about its own future


def quantizer(targets):
    """Annotates the input and weight of every call of ``targets``, and its output."""
    from torchao.quantization.pt2e import HistogramObserver
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
    )

    spec = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=HistogramObserver,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
    )

    class OfThese(Quantizer):
        def annotate(self, model):
            for node in model.graph.nodes:
                if node.target in targets:
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map=dict.fromkeys(node.args[:2], spec), _annotated=True
                    )
            return model

        def validate(self, model):
            pass

    return OfThese()


@pytest.mark.parametrize("training", [True, False])
def test_a_quantised_network_keeps_its_units(training):
    torch.manual_seed(0)
    model = build_model("reactnet_a", width=0.25, num_classes=3, small_images=True)
    x = gradient(4, 3, 32, 32)
    model(x)  # averages that are not those of the start
    model.train(training)
    program = torch.export.export(model, (x,))
    real = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
    prepared = pt2e.prepare_pt2e(program.module(), quantizer(real))
    expected = prepared(x)
    quantised = pt2e.convert_pt2e(prepared)
    targets = [str(node.target) for node in quantised.graph.nodes]
    assert targets.count("tritonbnn.binary_unit.default") == 26
    assert sum("quantize_per_tensor" in name for name in targets) >= 4
    if training:
        assert quantised(x).isfinite().all()
        return
    error = (quantised(x) - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.5  # a sign that tips over moves much
    # and then the units may become torch's own operators too
    again = torch.export.export(quantised, (x,)).run_decompositions(ops.decompositions())
    assert not any("tritonbnn" in str(node.target) for node in again.graph.nodes)


def test_inputs_of_units_are_observed_too():
    model = build_model("reactnet_18", width=0.25, num_classes=3, small_images=True).eval()
    x = gradient(2, 3, 32, 32)
    program = torch.export.export(model, (x,))
    units = (torch.ops.tritonbnn.binary_unit.default,)
    prepared = pt2e.prepare_pt2e(program.module(), quantizer(units))
    prepared(x)
    assert pt2e.convert_pt2e(prepared)(x).isfinite().all()
