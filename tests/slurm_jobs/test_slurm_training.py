"""A training on a real Slurm of two nodes that is requeued, preempted, shot and orphaned goes on as if nothing had
happened: with the losses of plain torchrun left in peace.
"""

import datetime
import re
import time

import psutil
import pytest
import small_training
from small_training import NUM_STEPS, SAVE_INTERVAL

pytestmark = pytest.mark.timeout(2400)  # up to seven starts, each of which takes ten times longer on a busy machine


def losses(job, start: int) -> dict[int, float]:
    return small_training.losses(job.log(start))


def ranks(job) -> list[psutil.Process]:
    """The job's processes that train."""
    return [
        psutil.Process(pid)
        for pid, command in job.processes().items()
        if "pretrain_hy.py" in command and "hymeg.launch" not in command
    ]


def launcher(rank: psutil.Process) -> psutil.Process:
    return next(parent for parent in rank.parents() if "hymeg.launch.node" in " ".join(parent.cmdline()))


def be_told_that_time_is_up(job) -> None:
    """The limit is moved so near that Slurm signals when it next looks at the clock, within half a minute: until then
    the ranks stand still.
    """
    stopped = ranks(job)
    for rank in stopped:
        rank.suspend()
    limit = (time.time() - datetime.datetime.fromisoformat(job.shown("StartTime")).timestamp()) // 60 + 4
    job.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={limit:.0f}")
    job.wait(lambda: "USR1: the job must end soon" in job.output, "signal of the time limit")
    for rank in stopped:
        rank.resume()


def be_requeued(job) -> None:
    job.cluster.run("scontrol", "requeue", job.number)


def lose_a_rank(job) -> None:
    ranks(job)[1].kill()


def lose_a_step_daemon(job) -> None:
    launcher(ranks(job)[1]).parent().kill()


DISTURBANCES = {
    be_requeued: "left",
    be_told_that_time_is_up: "left",
    lose_a_rank: "crashed",
    lose_a_step_daemon: "crashed",
}
"""What is done to a start, and how it ends."""


# What the other two do to a job without a training is in test_slurm_jobs.py and test_launcher.py.
@pytest.fixture(
    scope="module",
    params=[[be_requeued, lose_a_rank], pytest.param(list(DISTURBANCES), marks=pytest.mark.soak)],
    ids=["twice", "in every way"],
)
def disturbed(request, slurm, training):
    """A job that is disturbed in every start but its last, and has ended; what was done to it; how it ended."""
    out = training / f"disturbed{len(request.param)}"
    job = slurm.submit(out, training / "recipe.yaml", *small_training.flags(training, out), sbatch="--nodes 2")
    restarts = 0
    for start, disturb in enumerate(request.param, 1):
        job.wait(lambda start=start: job.step(start) > 0, f"first step of start {start}")
        enough = job.step(start) + SAVE_INTERVAL + 2
        job.wait(lambda start=start, enough=enough: job.step(start) >= enough, f"step {enough} of start {start}")
        disturb(job)
        if DISTURBANCES[disturb] == "left":
            restarts += 1
            job.requeued(restarts)
            slurm.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    return job, request.param, job.ended()


def test_each_start_ends_as_it_was_made_to_and_the_job_well(disturbed):
    job, done_to_it, end = disturbed
    assert end == "COMPLETED 0:0"
    outcomes = [line.split()[1] for line in job.history if not line.endswith("started")]
    assert outcomes == [DISTURBANCES[disturb] for disturb in done_to_it] + ["finished"]
    assert re.search(r" crashed \d+ n\d: rank \d was killed by SIGKILL", "\n".join(job.history))


def test_every_step_has_the_loss_of_the_undisturbed_training(disturbed, losses_left_in_peace):
    assert sorted(losses_left_in_peace) == list(range(1, NUM_STEPS + 1))
    seen = set()
    for start in range(1, len(disturbed[1]) + 2):
        found = losses(disturbed[0], start)
        assert found == pytest.approx({step: losses_left_in_peace[step] for step in found}, rel=1e-5)
        seen |= set(found)
    assert seen == set(losses_left_in_peace)


def test_each_start_goes_on_where_it_should(disturbed):
    """Who was told to leave, with the next step; who crashed, from the last complete checkpoint."""
    job, done_to_it, _ = disturbed
    for start, disturb in enumerate(done_to_it, 1):
        last, first = max(losses(job, start)), min(losses(job, start + 1))
        if DISTURBANCES[disturb] == "left":
            assert first == last + 1
        else:
            assert (first - 1) % SAVE_INTERVAL == 0 and last - SAVE_INTERVAL <= first - 1 <= last


def test_no_process_is_left(disturbed, slurm):
    assert slurm.processes() == {}
