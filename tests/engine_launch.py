"""`accelerate launch ... -m tests.engine_launch ARGUMENTS`: what `-m train ARGUMENTS` is, under any engine on a CPU."""

import sys

from tests.engine_worker import let_engines_run_on_a_cpu
from train.__main__ import main

if __name__ == "__main__":
    let_engines_run_on_a_cpu()
    sys.exit(main())
