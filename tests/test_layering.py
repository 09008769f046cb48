"""Imports point one way, and importing the package does nothing else."""

import ast
from pathlib import Path

import pytest

import tritonbnn
from tests.helpers import assert_runs_silently

ROOT = Path(tritonbnn.__file__).parent
BASE = {"bits", "layout", "checks", "cli", "contract", "files", "recorder", "settings", "window"}
JOB = {"compute", "distributed", "meeting", "stop"}
ALLOWED = {
    "bits": set(),
    "contract": set(),
    "layout": set(),
    "window": set(),
    "checks": {"bits"},
    "cli": set(),
    "recorder": set(),
    "files": {"cli"},
    "settings": {"cli"},
    "reference": set(),
    "packed": {"eager", "layout"},
    "eager": {"bits", "layout", "checks", "contract"},
    "kernels": {"caches", "compiled", "packed", *BASE},
    "compiled": {"cli"},
    "native": {"eager", "packed", "compiled", *BASE},
    "ops": {"kernels", "eager", "native", "packed", *BASE},
    "nn": {"ops", "packed", *BASE},
    "optim": {"nn", "ops", "eager", "packed", *BASE},
    "models": {"nn", *BASE},
    "analysis": {"models", "nn", "ops", "packed", *BASE},
    "caches": {"cli", "compiled"},
    "compute": {"cli", "caches"},
    "data": {"cli", "files"},
    "sort_val": {"data", "cli"},
    "stop": set(),
    "meeting": {"cli"},
    "distributed": {"cli", "meeting", "stop"},
    "methods": {"optim", "models", "nn", "data", *JOB, *BASE},
    "tuning": {"compute", "distributed", "cli"},
    "train": {"tuning", "methods", "optim", "analysis", "models", "nn", "ops", "data", *JOB, *BASE},
    "deploy": {"kernels", "compute", "caches", "compiled", "models", "nn", "data", *BASE},
    "networks": {"deploy", "train", *JOB, *BASE},
    "export": {"networks", "deploy", "train", "data", *JOB, *BASE},
    "posterior": {"train", "optim", *JOB, *BASE},
    "evaluate": {
        *("posterior", "networks", "deploy", "train", "methods", "models", "nn", "data"),
        *(*JOB, *BASE),
    },
    "compare": {"report", "train", "data", "caches", *JOB, *BASE},
    "predict": {"networks", "train", "methods", "models", "nn", "data", *JOB, *BASE},
    "timm": {"models", "cli"},
    "report": {"train", "analysis", "data", *JOB, *BASE},
    "analyze": {"report", "train", "data", "caches", *JOB, *BASE},
}
# At the top of the stack:
TOOLS = {
    "autotune",
    "bench",
    "bench_matmul",
    "candidates",
    "commands",
    "mma_peak",
    "provenance",
    "shipped",
    "aot",
    "apart",
    "judge",
    "problems",
    "timing",
    "trial",
    "truth",
}


def imported(path):
    """The parts of the package that a source file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".") for name in names if name.startswith("tritonbnn."))


def sources():
    return sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.name != "__init__.py")


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for _, other, *rest in imported(path):
        if part == "kernels":
            tool = not TOOLS.isdisjoint((path.stem, path.parent.name))
            assert tool or not (other == "kernels" and rest and rest[0] in TOOLS)
            if tool:
                continue
        assert other == part or other in ALLOWED[part], f"{part} imports {other}"


def test_importing_is_inert():
    """No output, no CUDA initialisation, no Triton, no C library, no environment read of ours."""
    code = (
        "import sys, torch, tritonbnn, tritonbnn.ops, tritonbnn.nn, tritonbnn.models\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'tritonbnn.kernels' not in sys.modules\n"
        "assert 'triton' not in sys.modules\n"
        "assert 'native.so' not in open('/proc/self/maps').read()\n"
        "import tritonbnn.train.__main__\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    assert_runs_silently(code)
