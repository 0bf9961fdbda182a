"""A training on a real Slurm of two nodes that is requeued, preempted, shot and orphaned goes on as if nothing had
happened.
"""

import datetime
import re
import time

import psutil
import pytest
import small_training
from small_training import NUM_STEPS, SAVE_INTERVAL

pytestmark = pytest.mark.timeout(2400)  # six starts, each of which takes ten times longer on a busy machine


def submit(slurm, training, name):
    out = training / name
    return slurm.submit(out, training / "recipe.yaml", *small_training.flags(training, out), sbatch="--nodes 2")


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


@pytest.fixture(scope="module")
def jobs(slurm, training):
    """Two jobs of the same words: one is left in peace, the other is disturbed in every start but its last. Both have
    ended.
    """
    peaceful, disturbed = submit(slurm, training, "peaceful"), submit(slurm, training, "disturbed")

    def reach(start: int, step: int) -> None:
        disturbed.wait(lambda: disturbed.step(start) >= step, f"step {step} of start {start}")

    reach(1, 30)
    slurm.run("scontrol", "requeue", disturbed.number)
    disturbed.requeued(1)
    reach(2, 70)
    be_told_that_time_is_up(disturbed)
    disturbed.requeued(2)
    slurm.run("scontrol", "update", f"JobId={disturbed.number}", "TimeLimit=60")
    reach(3, 3 * SAVE_INTERVAL + 50)
    ranks(disturbed)[1].kill()
    reach(4, 3 * SAVE_INTERVAL + 100)
    launcher(ranks(disturbed)[1]).parent().kill()
    return peaceful, disturbed, [job.ended() for job in (peaceful, disturbed)]


def test_both_jobs_end_well(jobs):
    assert jobs[2] == ["COMPLETED 0:0", "COMPLETED 0:0"]


def test_each_start_ended_as_it_was_made_to(jobs):
    outcomes = [line.split()[1] for line in jobs[1].history if not line.endswith("started")]
    assert outcomes == ["left", "left", "crashed", "crashed", "finished"]
    assert re.search(r"3 crashed \d+ n\d: rank \d was killed by SIGKILL", "\n".join(jobs[1].history))


def test_every_step_has_the_loss_of_the_undisturbed_training(jobs):
    peaceful, disturbed, _ = jobs
    expected = losses(peaceful, 1)
    assert sorted(expected) == list(range(1, NUM_STEPS + 1))
    seen = set()
    for start in range(1, 6):
        found = losses(disturbed, start)
        assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-5)
        seen |= set(found)
    assert seen == set(expected)


def test_who_was_told_to_leave_goes_on_with_the_next_step(jobs):
    starts = [losses(jobs[1], start) for start in (1, 2, 3)]
    assert min(starts[1]) == max(starts[0]) + 1 and min(starts[2]) == max(starts[1]) + 1


def test_who_crashed_goes_on_from_the_last_complete_checkpoint(jobs):
    third, fourth, fifth = (losses(jobs[1], start) for start in (3, 4, 5))
    for before, after in ((third, fourth), (fourth, fifth)):
        assert (min(after) - 1) % SAVE_INTERVAL == 0 and max(before) - SAVE_INTERVAL <= min(after) - 1 <= max(before)


def test_no_process_is_left(jobs, slurm):
    assert slurm.processes() == {}
