"""The paper's comparisons, as ``python -m tritonbnn.study`` makes them, with what they ran on.

python -m benchmarks.study optimizers decay steps --epochs 6 --out runs/study --json study.json

The report takes the table from ``study_digits.json``, and SGD at other rates from files beside it:

python -m benchmarks.study optimizers --epochs 6 --seeds 1 --sgd-lr 0.0125 --out runs/study-0.0125 \
    --json study_digits_sgd_0.0125.json
"""

from pathlib import Path

from benchmarks.output import command, read_result
from tritonbnn import cli
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.provenance import header
from tritonbnn.study.__main__ import main as study


def main(argv: list[str]) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.study",
        description=__doc__.split("\n")[0],
        epilog="Any other flag goes to python -m tritonbnn.study.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--json", type=Path, required=True, help="write the result here")
    args, flags = parser.parse_known_args(argv)
    path = writable(args.json)
    code = study([*flags, "--out", str(args.out)])
    report = args.out / "study.json"
    if path and not code and (result := read_result(report)):
        write_json(path, header(command("study", argv)) | result)
    return code


if __name__ == "__main__":
    cli.run(main)
