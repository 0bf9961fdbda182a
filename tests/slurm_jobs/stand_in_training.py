"""Stands in for pretrain_hy.py where a test is about the job and not about training. Takes half a second a step.

Flags: --steps N ..., one for each start of the job, the last for all further; --exit STEP CODE, each for one start;
--deaf: does not listen to the signal to leave.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, nargs="+", default=[4])
parser.add_argument("--exit", nargs=2, type=int, action="append", default=[])
parser.add_argument("--deaf", action="store_true")
args, _ = parser.parse_known_args()
told = []
if not args.deaf:
    signal.signal(signal.SIGUSR2, lambda *_: told.append(True))
file = Path(os.environ["HYMEG_STEP_FILE"])
start = int(file.parent.name.removeprefix("start-"))
exit_step, exit_code = args.exit[start - 1] if start <= len(args.exit) else (None, 0)
for step in range(1, args.steps[min(start, len(args.steps)) - 1] + 1):
    file.write_text(f"{step}\n")
    if step == exit_step:
        print(f"error: exit {exit_code} in step {step}", file=sys.stderr, flush=True)
        sys.exit(exit_code)
    time.sleep(0.5)
    if told:
        sys.exit(75)
