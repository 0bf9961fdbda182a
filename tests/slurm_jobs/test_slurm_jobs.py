"""What examples/slurm/train.sbatch does with a start that fails, nodes that are not fit, wrong words. A stand-in takes
the training's place.
"""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from cluster import JOB, ROOT

pytestmark = pytest.mark.timeout(1200)
STAND_IN = Path(__file__).parent / "stand_in_training.py"
RECIPE = "examples/tiny_cpu/pretrain_fp32.yaml"
WRONG_WORDS = {
    "no recipe": ("", {}, "no recipe is given: sbatch --nodes N "),
    "flag for a recipe": ("--lr 1", {}, "--lr stands where the recipe belongs"),
    "recipe is missing": ("nowhere.yaml", {}, "nowhere.yaml: no readable file"),
    "restarts": (f"{RECIPE} --max-restarts many", {}, "--max-restarts (or HYMEG_MAX_RESTARTS) 'many'"),
    "no restarts": (f"{RECIPE} --max-restarts", {}, "--max-restarts (or HYMEG_MAX_RESTARTS) ''"),
    "recipe is a folder": ("examples", {}, "examples: no readable file"),
    "config twice": (f"{RECIPE} --config other.yaml", {}, "--config: the recipe is given as the first word"),
    "not the repository": (RECIPE, {"HYMEG_ROOT": "/usr"}, "/usr is not hymeg's repository"),
    "no setup file": (RECIPE, {"HYMEG_SETUP": "/no/setup"}, "/no/setup: no readable file"),
    "no venv": (RECIPE, {"HYMEG_VENV": "/no/venv"}, "/no/venv/bin/activate: no readable file"),
    "no program": (RECIPE, {"HYMEG_PROGRAM": "nothing.py"}, "HYMEG_PROGRAM nothing.py: no readable file"),
    "no port": (RECIPE, {"HYMEG_PORT": "auto"}, "HYMEG_PORT 'auto': a port from 1024 to 65535"),
    "no seconds": (RECIPE, {"HYMEG_HEALTH_SECONDS": "3m"}, "HYMEG_HEALTH_SECONDS '3m': whole seconds"),
    "no processes": (RECIPE, {"HYMEG_PROCESSES_PER_NODE": "none"}, "HYMEG_PROCESSES_PER_NODE 'none'"),
    "no GPUs": (RECIPE, {"HYMEG_PROCESSES_PER_NODE": ""}, "this job has no GPUs"),
    "no job": (RECIPE, {"SLURM_JOB_ID": ""}, "this is a job for Slurm"),
}
"""Words, variables, and what the one line says, before anything is asked of Slurm."""
WRONG = {
    "no log folder": (
        "{folder}/recipe.yaml",
        {"HYMEG_LOG_DIR": "/proc/logs"},
        "HYMEG_LOG_DIR: /proc/logs/slurm-",
    ),
    "no pyxis": (
        "{folder}/recipe.yaml",
        {"HYMEG_CONTAINER_IMAGE": "a.sqsh"},
        "this Slurm's srun has no --container-image",
    ),
    "too few GPUs": (
        "{folder}/a_16xh100_80gb.yaml --save out/x --load out/x",
        {"sbatch": "--nodes 2"},
        "is for 16 GPUs, and this job has 2 nodes x 1 = 2",
    ),
}
"""The same, of what the job itself finds; the other errors of the check are in test_health.py."""


@pytest.mark.parametrize("name", WRONG_WORDS)
def test_what_the_script_refuses_is_one_line_and_exit_code_2(name):
    words, variables, line = WRONG_WORDS[name]
    environment = os.environ | {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), "HYMEG_PROCESSES_PER_NODE": "1"}
    done = subprocess.run(
        ["bash", JOB, *words.split()], cwd=ROOT, env=environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and line in done.stderr


def test_jobs_of_one_log_folder_leave_each_other_s_logs_alone(tmp_path):
    """HYMEG_LOG_DIR is exported once, and jobs run at the same time. Slurm's programs are stand-ins, whose nodes are
    never fit.
    """
    for name, text in {"scontrol": 'echo " NodeAddr=localhost"', "srun": "exit 1", "squeue": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HYMEG_LOG_DIR": str(tmp_path / "logs"),
        "HYMEG_PROCESSES_PER_NODE": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "1",
    }
    for job in "12":
        command = ["bash", JOB, RECIPE]
        done = subprocess.run(
            command, cwd=ROOT, env=environment | {"SLURM_JOB_ID": job}, capture_output=True, text=True
        )
        assert done.returncode == 1 and "not started" in done.stderr, done.stderr
        (tmp_path / f"logs/slurm-{job}/start-1/n0.log").write_text("what the ranks said")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("n0.log")} == {
        f"logs/slurm-{job}/start-1/n0.log" for job in "12"
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recipes that are enough for the stand-in, a pretended other version of transformers, and hooks that some nodes
    run.
    """
    folder = tmp_path_factory.mktemp("jobs")
    for name, text in {
        "recipe": "save: {0}/{1}\nload: {0}/{1}\n",
        "a_16xh100_80gb": "lr: 1e-3\n",
    }.items():
        (folder / f"{name}.yaml").write_text(text.format(folder, "out"))
    other = folder / "n1" / "transformers-0.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0\n")
    (folder / "n1" / "out").write_text("a file where n0 sees a folder")
    on_n1 = f"[ $SLURMD_NODENAME != n1 ] || {{ export PYTHONPATH=$PWD:{folder}/n1; cd {folder}/n1; }}\n"
    (folder / "exits.sh").write_text("exit 3\n")
    (folder / "unfit_n1.sh").write_text(on_n1)
    (folder / "unfit_n1_later.sh").write_text(f"[[ $HYMEG_NODE_START == *start-1 ]] || {on_n1}")
    return folder


@pytest.fixture(scope="module")
def submit(slurm, folder):
    def submit(name, words, sbatch="--nodes 1", **variables):
        words = words.format(folder=folder).split()
        return slurm.submit(
            folder / name.replace(" ", "_"), *words, sbatch=sbatch, **{"HYMEG_PROGRAM": STAND_IN, **variables}
        )

    return submit


def empty_venv(folder) -> None:
    """A Python that has nothing of what is needed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "empty"], check=True)


def hooks(folder) -> dict[str, str]:
    """Each writes its name when it is run."""
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / "bin" / "activate").write_text(f"echo venv >>{folder}/hooks.txt; . {sys.prefix}/bin/activate\n")
    (folder / "setup.sh").write_text(f"echo setup $PYTORCH_CUDA_ALLOC_CONF >>{folder}/hooks.txt\n")
    module = f'() {{ echo "module $*" >>{folder}/hooks.txt; }}'  # an exported function, as Lmod's is
    variables = {"HYMEG_MODULES": "cuda/12 nccl", "HYMEG_VENV": f"{folder}/venv", "HYMEG_SETUP": f"{folder}/setup.sh"}
    return variables | {"BASH_FUNC_module%%": module}


@pytest.fixture(scope="module")
def jobs(submit, folder):
    """All submitted at once: the four nodes work them off."""
    empty_venv(folder)
    out = "/proc/self/cwd/out/run"  # below the node's own working directory
    recipe = "{folder}/recipe.yaml"
    return {
        "avoids": submit(
            "avoids", f"{recipe} --exit 1 1", "--nodes 2 --nodelist n0,n1", HYMEG_SETUP=folder / "unfit_n1_later.sh"
        ),
        "unfit": submit(
            "unfit",
            f"{recipe} --save {out} --load {out}",
            "--nodes 2 --nodelist n0,n1",
            HYMEG_SETUP=folder / "unfit_n1.sh",
        ),
        "time is up": submit("time is up", f"{recipe} --steps 1000 3", "--nodes 1 --time 1 --signal B:USR1@50"),
        "too long": submit("too long", f"{recipe} --steps 1000 --deaf", "--nodes 1 --time 1 --signal B:USR1@50"),
        "no module": submit("no module", recipe, HYMEG_MODULES="nccl/0"),
        "setup exits": submit("setup exits", recipe, HYMEG_SETUP=folder / "exits.sh"),
        "another venv": submit("another venv", recipe, HYMEG_VENV=folder / "empty"),
        "hooks": submit("hooks", recipe, "--nodes 1 --ntasks-per-node 2", **hooks(folder)),
        "stuck": submit("stuck", f"{recipe} --max-restarts 0 --exit 3 75 --exit 3 75"),
        "user's error": submit("user's error", f"{recipe} --exit 1 2"),
        "same step": submit("same step", f"{recipe} --exit 3 7 --exit 3 7"),
        "too often": submit("too often", f"{recipe} --max-restarts 1 --exit 1 1 --exit 2 1 --exit 3 1"),
    } | {name: submit(name, words, **variables) for name, (words, variables, _) in WRONG.items()}


def outcomes(job) -> list[str]:
    return [" ".join(line.split()[1:3]) for line in job.history if not line.endswith("started")]


def errors(job) -> list[str]:
    return [line for line in job.output.splitlines() if line.startswith("error: ")]


def test_a_node_found_unfit_after_a_crash_is_avoided(jobs, slurm):
    job = jobs["avoids"]
    job.wait(lambda: job.shown("ExcNodeList") == "n1", "node n1 excluded")
    assert any(line.startswith("error: n1: transformers is 0.0, but ") for line in errors(job))
    slurm.run("scontrol", "update", f"JobId={job.number}", "ReqNodeList=")
    job.requeued(1)
    assert job.ended() == "COMPLETED 0:0"
    assert outcomes(job) == ["crashed 1", "unfit 0", "finished 4"]


def test_nodes_unfit_at_first_end_the_job_and_are_named(jobs):
    """n1 has another transformers, and has a file where the --save folder should be."""
    job = jobs["unfit"]
    assert job.ended() == "FAILED 1:0"
    said = errors(job)
    assert any(line.startswith("error: n1: transformers is 0.0, but ") for line in said)
    assert any(line.startswith("error: n1: /proc/self/cwd/out/run is not writable from this node") for line in said)
    assert not any(line.startswith("error: n0: ") for line in said)
    assert "not started: n1" in said[-1] and outcomes(job) == ["unfit 0"]


def test_a_job_that_is_told_to_leave_again_and_again_in_the_same_step_ends(jobs):
    """It would be requeued for ever."""
    job = jobs["stuck"]
    job.requeued(1)
    assert job.ended() == "FAILED 1:0"
    assert outcomes(job) == ["left 3", "stuck 3"] and "--max-restarts is 0" in errors(job)[-1]


def test_a_job_whose_time_is_up_leaves_and_goes_on(jobs):
    job = jobs["time is up"]
    job.requeued(1)
    assert job.ended() == "COMPLETED 0:0"
    # Ten seconds are short: a slow machine leaves twice, and once perhaps without a step of progress ("stuck").
    *left, finished = outcomes(job)
    assert finished == "finished 3" and left[0].startswith("left ")
    assert all(line.startswith(("left ", "stuck ")) for line in left)
    steps = [int(line.removeprefix("left ")) for line in left if line.startswith("left ")]
    assert steps[0] > 1 and steps == sorted(steps)


def kill_step_daemons(job, node: str) -> None:
    found = [psutil.Process(pid) for pid in job.processes(SLURMD_NODENAME=node)]
    for daemon in {parent for one in found for parent in one.parents() if parent.name() == "slurmstepd"}:
        daemon.kill()


def test_a_job_that_loses_a_step_daemon_starts_again(submit):
    """srun would wait for it for ever."""
    job = submit("daemon", "{folder}/recipe.yaml --steps 10000 3", "--nodes 2")
    job.wait(lambda: job.step(1) > 1, "a step")
    (other,) = {f"n{number}" for number in range(4) if job.processes(SLURMD_NODENAME=f"n{number}")} - {
        job.shown("BatchHost")
    }
    kill_step_daemons(job, other)
    assert job.ended() == "COMPLETED 0:0" and job.shown("Restarts") == "0"
    assert [line.split()[0] for line in outcomes(job)] == ["crashed", "finished"]


def test_a_job_whose_first_node_fails_goes_on(submit, slurm):
    """Slurm requeues it; nobody was left to say how the start ended."""
    job = submit("node fails", "{folder}/recipe.yaml --steps 10000 3", "--nodes 2")
    job.wait(lambda: job.step(1) > 1, "a step")
    node = job.shown("BatchHost")
    kill_step_daemons(job, node)  # and with them all the rest: the node has no power
    job.kill(SLURMD_NODENAME=node)
    slurm.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    slurm.run("bash", "-c", f"scontrol update NodeName={node} State=RESUME || true")  # it may be back by itself
    job.requeued(1)
    assert job.ended() == "COMPLETED 0:0"
    assert [line.split()[0] for line in outcomes(job)] == ["lost", "finished"]


def test_modules_venv_and_setup_are_run_once_in_each_step(jobs, folder):
    """In this order; and there is one task a node, whatever number of tasks the job was submitted with."""
    assert jobs["hooks"].ended() == "COMPLETED 0:0"
    expected = ["module load cuda/12 nccl", "venv", "setup expandable_segments:True"]
    assert (folder / "hooks.txt").read_text().splitlines() == expected * 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no module", "module load nccl/0 failed"),
        ("setup exits", "exits.sh exits, but is sourced"),
        ("another venv", "empty/bin/python cannot run hymeg ("),
    ],
)
def test_a_node_that_is_set_up_wrongly_is_named(jobs, name, expected):
    assert jobs[name].ended() == "FAILED 1:0"
    said = errors(jobs[name])
    assert len(said) == 2 and said[0].startswith("error: n") and expected in said[0] and "as said above" in said[1]


def test_a_users_error_is_not_tried_again(jobs):
    job = jobs["user's error"]
    assert job.ended() == "FAILED 2:0"
    assert outcomes(job) == ["refused 1"] and errors(job) == ["error: exit 2 in step 1"]


def test_a_crash_starts_again_until_it_comes_twice_in_the_same_step(jobs):
    job = jobs["same step"]
    assert job.ended() == "FAILED 1:0"
    assert outcomes(job) == ["crashed 3", "crashed 3"]
    assert "it has failed twice in step 3" in errors(job)[-1]
    assert job.shown("Restarts") == "0"  # the nodes were kept


def test_a_crash_starts_again_as_often_as_allowed(jobs):
    job = jobs["too often"]
    assert job.ended() == "FAILED 1:0"
    assert outcomes(job) == ["crashed 1", "crashed 2"] and "--max-restarts is 1" in errors(job)[-1]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words_are_one_line_and_exit_code_2(jobs, name):
    assert jobs[name].ended() == "FAILED 2:0"
    said = errors(jobs[name])
    assert len(said) == 1 and WRONG[name][2] in said[0]


def test_a_container_is_started_by_srun(submit, folder, jobs):
    """With a srun on PATH that stands for one with pyxis: it takes the container's options, and starts without a
    container.
    """
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").write_text(
        "#!/usr/bin/env bash\n[ $1 != --help ] || exec echo --container-image\nwords=()\n"
        f'for word; do case $word in --container-*) echo "$word" >>{folder}/options ;;'
        ' *) words+=("$word") ;; esac; done\n'
        'PATH=${PATH#*:} exec srun "${words[@]}"\n'
    )
    (folder / "bin" / "srun").chmod(0o755)
    path = f"{folder}/bin:{os.environ['PATH']}"
    job = submit(
        "container",
        "{folder}/recipe.yaml",
        PATH=path,
        HYMEG_CONTAINER_IMAGE="/images/hymeg.sqsh",
        HYMEG_CONTAINER_MOUNTS="/data:/data",
    )
    assert job.ended() == "COMPLETED 0:0"
    assert (folder / "options").read_text().splitlines() == [
        "--container-image=/images/hymeg.sqsh",
        "--container-mounts=/data:/data",
    ] * 2


def test_a_save_that_takes_too_long_is_not_waited_for(jobs):
    """Or the end of the time limit would be the end of the job."""
    job = jobs["too long"]
    job.wait(lambda: "there is no more time to wait for the save: the job is requeued" in job.output, "requeue")
    job.kill()  # or Slurm would, after its KillWait
    job.requeued(1)
    job.cluster.run("scancel", job.number)


def test_no_process_is_left(jobs, slurm):
    """Once all jobs above have ended."""
    for job in jobs.values():
        job.ended()
    assert slurm.processes() == {}
