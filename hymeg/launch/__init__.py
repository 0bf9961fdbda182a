"""A node's part of a job, without Slurm in it: start torchrun, pass the signal to leave on, leave nothing behind; check
the nodes before.

Nothing here imports torch or Megatron at its top: it runs on every node, before every start.
"""

REQUEUE = 75
"""What every rank exits with once it was told to leave and has saved: start the same command again, and it goes on."""

ENDINGS = {
    16: "a result was not valid (NaN, or another of Megatron's checks): saved, to be computed again by a new start",
    17: "a result was not valid (NaN, or another of Megatron's checks): the log says what came of computing it again",
}
"""What Megatron's exit codes say (core/rerun_state_machine.py). A launcher starts again after both."""

STEP_FILE = "HYMEG_STEP_FILE"
"""Environment variable: where rank 0 writes the step that it works on."""
