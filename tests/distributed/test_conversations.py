"""Fine-tuning on conversations: neither packing nor layout changes loss or gradient; samples come in one order, whoever
draws them and however often the run was interrupted."""

import json
import random

import pytest
from worlds import assert_same_training, largest_difference

TP2, PP2, CP2, EP2 = (
    f"--{name}-parallel-size 2" for name in ("tensor-model", "pipeline-model", "context", "expert-model")
)
NUM_ROWS, SEQ_LENGTH = 16, 192
WORDS = (
    "the",
    "of",
    "sea",
    "wind",
    "house",
    "bright",
    "river",
    "stone",
    "while",
    "under",
    "letter",
    "green",
    "quiet",
    "morning",
    "eleven",
    "paper",
)

FILES = {"packed": "rows", "weighted": "0.6 rows2 0.4 rows3"}
STEPS = 12  # more than three epochs
CUTS = {"packed": (1, 3, 4, 7, 10), "weighted": (3, 8)}
SKIPPING, SKIPPED_IN = "--iterations-to-skip 2", ("TP2", "DP2", "PP2 VPP2")
EVALUATION = "--lr 0 --eval-interval 2"  # stands after the rate of the other runs, and wins

LAYOUTS = {  # world size -> name -> flags, checkpoint
    2: {
        "TP2": (TP2, "trunk"),
        "PP2": (PP2, "mtp"),
        "PP2 VPP2": (f"{PP2} --num-virtual-stages-per-pipeline-rank 2", "trunk"),
        "EP2": (EP2, "trunk"),
        "CP2": (CP2, "mtp"),
        "DP2": ("--use-distributed-optimizer", "trunk"),
        "DP2 apart": ("--no-sft-packing", "trunk"),
        "CP2 apart": (f"--no-sft-packing {CP2}", "mtp"),
    },
    4: {
        "TP2 CP2": (f"{TP2} {CP2}", "trunk"),
        "DP2 CP2": (f"{CP2} --use-distributed-optimizer", "mtp"),
        "TP2 PP2": (f"{TP2} {PP2}", "mtp"),
    },
}


def end_of(kind: str, cut: int) -> int:
    """Up to which step a run goes that is resumed at `cut`: the first over all epochs."""
    return STEPS if cut == CUTS[kind][0] else min(cut + 3, STEPS)


def write_rows(path, num_rows: int, seed: int) -> None:
    choose = random.Random(seed)
    sentence = lambda: " ".join(choose.choices(WORDS, k=choose.randint(1, 5)))  # noqa: E731
    rows = []
    for number in range(num_rows):
        turns = [
            {"role": role, "content": sentence()} for _ in range(choose.randint(1, 2)) for role in ("user", "assistant")
        ]
        conversation = {"messages": turns}
        translation = {
            "source_lang": "en",
            "target_lang": "fr",
            "source": sentence(),
            "target": sentence(),
            "prompt_lang": "en",
        }
        rows.append(translation if number % 8 == 0 else conversation)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tuning(folder):
    """A fine-tuning's command line."""
    write_rows(folder / "rows.jsonl", NUM_ROWS, 1)
    for number in (2, 3):
        write_rows(folder / f"rows{number}.jsonl", 9 + number, number)

    def build(
        *flags: str,
        batch: int,
        checkpoint: str = "trunk",
        load: str | None = None,
        steps: int = 2,
        files="rows",
        split="100,0,0",
    ) -> list[str]:
        model = str(folder / checkpoint)
        fixed = f"--sft --seq-length {SEQ_LENGTH} --micro-batch-size 1 --train-iters {steps} --num-workers 0"
        rate = "--lr 1e-3 --lr-decay-style constant"
        paths = [word if word.replace(".", "").isdigit() else str(folder / f"{word}.jsonl") for word in files.split()]
        data = [
            "--data-path",
            *paths,
            "--data-cache-path",
            str(folder / "row-cache"),
            *(["--split", split] if split else []),
        ]
        words = " ".join(flags).split()
        return [
            "--hf-model",
            model,
            "--load",
            load or model,
            *data,
            *fixed.split(),
            *rate.split(),
            "--global-batch-size",
            str(batch),
            *words,
        ]

    return build


@pytest.fixture(scope="module")
def num_packs(folder, tuning):
    """How many sequences the rows fill. One global batch is then all of them, in whatever order: each step trains every
    row.
    """
    from hymeg import platform

    platform.install()
    from hymeg.data.conversations import Sequences, Shape
    from hymeg.data.index_building import RowEncoder, build_indices
    from hymeg.data.row_index import RowIndex, index_folder

    rows, settings = str(folder / "rows.jsonl"), (str(folder / "trunk"),)
    at = index_folder(rows, str(folder / "counted"), RowEncoder(*settings).fingerprint)
    build_indices({rows: at}, settings)
    return {
        alignment: len(
            Sequences(RowIndex(at, rows), (0, NUM_ROWS), Shape(SEQ_LENGTH, alignment, True, "error", 0), 1234)
        )
        for alignment in (1, 4)
    }


@pytest.fixture(scope="module")
def tuned(worlds, folder, tuning, num_packs):
    """world size -> name -> what the training recorded."""
    started = {}

    sets = " ".join(f"--{name}-data-path {folder}/rows2.jsonl" for name in ("test", "valid"))
    sets = f"{EVALUATION} {sets} {folder}/rows3.jsonl"

    def batch(flags: str) -> int:
        return NUM_ROWS if "--no-sft-packing" in flags else num_packs[4 if CP2 in flags else 1]

    def results(size: int) -> dict:
        if size not in started:
            if size == 1:
                cases = {name: tuning(batch=batch(""), checkpoint=name) for name in ("trunk", "mtp")}
                cases["apart"] = tuning("--no-sft-packing", batch=NUM_ROWS)
                cases["apart, micro-batches of 4"] = tuning(
                    "--no-sft-packing --micro-batch-size 4", batch=NUM_ROWS, checkpoint="mtp"
                )
                cases["several sets"] = tuning(sets, batch=2, split=None)
                cases["split"] = tuning(EVALUATION, batch=2, split="60,40,0")
                cases["split, later"] = tuning(EVALUATION, "--start-eval-at-iter 2", batch=2, split="60,40,0")
                cases["skipping"] = tuning(SKIPPING, batch=2, steps=3)
                for kind, files in FILES.items():
                    save = f"--save {folder}/saved-{kind} --save-interval 1"
                    cases[f"{kind} whole"] = tuning(save, batch=2, steps=STEPS, files=files)
            else:
                cases = {
                    name: tuning(flags, batch=batch(flags), checkpoint=checkpoint)
                    for name, (flags, checkpoint) in LAYOUTS[size].items()
                }
            if size == 2:
                cases["split"] = tuning(EVALUATION, batch=2, split="60,40,0")
                for name in SKIPPED_IN:
                    flags, checkpoint = LAYOUTS[2][name]
                    cases[f"skipping {name}"] = tuning(flags, SKIPPING, batch=2, steps=3, checkpoint=checkpoint)
                for name, flags in (("DP2", ""), ("TP2", TP2), ("PP2", PP2)):
                    cases[f"several sets {name}"] = tuning(sets, flags, batch=2, split=None)
                for kind, files in FILES.items():
                    for cut in CUTS[kind]:
                        load = f"{folder}/saved-{kind}"
                        cases[f"{kind} from {cut}"] = tuning(
                            f"--ckpt-step {cut}", batch=2, steps=end_of(kind, cut), files=files, load=load
                        )
            started[size] = worlds.cases(size, cases)
        return started[size]

    return results


def test_the_rows_divide_as_the_layouts_need(num_packs):
    assert all(number % 2 == 0 and 2 <= number < NUM_ROWS / 2 for number in num_packs.values()), num_packs


@pytest.mark.parametrize(("name", "checkpoint"), [("apart", "trunk"), ("apart, micro-batches of 4", "mtp")])
def test_packing_changes_neither_loss_nor_gradient(tuned, name, checkpoint):
    assert_same_training(tuned(1)[name]["steps"], tuned(1)[checkpoint]["steps"])


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, of_size in LAYOUTS.items() for name in of_size])
def test_same_as_one_process(tuned, size, name):
    assert_same_training(tuned(size)[name]["steps"], tuned(1)[LAYOUTS[size][name][1]]["steps"])


def test_multi_token_prediction_counts(tuned):
    assert largest_difference(tuned(1)["mtp"]["steps"], tuned(1)["trunk"]["steps"], "grad_norm") > 1e-3


@pytest.mark.parametrize("kind", FILES)
def test_every_epoch_draws_each_sequence_once_and_in_an_order_of_its_own(tuned, kind):
    drawn = [tuple(one) for step in tuned(1)[f"{kind} whole"]["steps"] for one in step["drawn"]]
    for source in {source for source, _ in drawn}:
        own = [number for of, number in drawn if of == source]
        size = max(own) + 1
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(epochs) >= (3 if kind == "packed" else 2)
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1


@pytest.mark.parametrize(("kind", "cut"), [(kind, cut) for kind in FILES for cut in CUTS[kind]])
def test_a_resumed_run_goes_on_with_the_very_next_sample(tuned, kind, cut):
    """Saved by one process, resumed by two: what both lives draw, one after the other, is what the run without
    interruption draws.
    """
    whole = tuned(1)[f"{kind} whole"]["steps"][: end_of(kind, cut)]
    resumed = tuned(2)[f"{kind} from {cut}"]["steps"]
    assert [sorted(step["drawn"]) for step in resumed] == [sorted(step["drawn"]) for step in whole[cut:]]
    assert_same_training(resumed, whole[cut:])


@pytest.mark.parametrize("name", SKIPPED_IN)
def test_an_iteration_that_is_skipped_takes_its_samples_with_it(tuned, name):
    """On every rank, so that all go on with the same ones: those of the run that skips none."""
    whole, skipping, found = (
        of["steps"] for of in (tuned(1)["packed whole"], tuned(1)["skipping"], tuned(2)[f"skipping {name}"])
    )
    drawn = [{tuple(one) for one in step["drawn"]} for step in found]  # each virtual stage of a rank draws them
    assert drawn == [{tuple(one) for one in whole[number]["drawn"]} for number in (0, 2)]
    assert_same_training(found, skipping)


@pytest.mark.parametrize("name", ["DP2", "TP2", "PP2"])
def test_evaluation_goes_over_all_data_with_a_loss_for_each_set(tuned, name):
    """In between and at the end, and of test data then; the model of rate 0 stays as it is, and so does its loss."""
    alone, found = tuned(1)["several sets"]["evaluations"], tuned(2)[f"several sets {name}"]["evaluations"]
    assert found == pytest.approx(alone, rel=1e-5)
    assert len(alone) == 5
    assert alone[:2] == pytest.approx(alone[2:4], rel=1e-6) and alone[4] == pytest.approx(alone[0], rel=1e-6)
    assert abs(alone[0] - alone[1]) > 1e-4


def test_a_split_is_evaluated_whole_each_time(tuned):
    alone, two = tuned(1)["split"]["evaluations"], tuned(2)["split"]["evaluations"]
    assert len(alone) == 2
    assert alone[1] == pytest.approx(alone[0], rel=1e-6)
    assert two == pytest.approx(alone, rel=1e-5)
    assert tuned(1)["split, later"]["evaluations"] == pytest.approx(alone, rel=1e-6)


def test_epochs_draw_every_sequence_as_often_and_are_a_number_of_iterations(worlds, tuning, num_packs, tmp_path):
    """The last batch is filled up from the next epoch, rate and all figures are those of as many --train-iters, and a
    resume under another number of processes goes on in the middle.
    """
    total, batch = 3 * num_packs[1], 4
    iterations = -(-total // batch)
    assert total % batch, "the last batch must be one that is filled up"

    def run(size: int, length: str, more: str = "", **others) -> dict:
        argv = tuning(f"--lr-decay-style linear --lr-warmup-fraction 0.4 {more}", batch=batch, **others)
        at = argv.index("--train-iters")
        return worlds.run(size, [*argv[:at], *length.split(), *argv[at + 2 :]])

    whole = run(1, "--train-epochs 3", f"--save {tmp_path}/saved --save-interval 1")
    counted = run(1, f"--train-iters {iterations}")
    assert whole["steps"] == counted["steps"] and len(whole["steps"]) == iterations
    drawn = [number for step in whole["steps"] for _, number in step["drawn"]]
    assert sorted(drawn[:total]) == sorted(3 * list(range(num_packs[1])))
    resumed = run(2, "--train-epochs 3", "--ckpt-step 1", load=str(tmp_path / "saved"))
    assert [sorted(step["drawn"]) for step in resumed["steps"]] == [sorted(s["drawn"]) for s in whole["steps"][1:]]
    assert_same_training(resumed["steps"], whole["steps"][1:])
