"""The trainer under torchrun, where rank 1 is killed at its third step the first time it runs."""

import os

from tests.zygote import Faults
from tritonbnn import cli
from tritonbnn.train.__main__ import main

if __name__ == "__main__":
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        Faults("death", at_call=0, at_step=3)
    cli.run(main)
