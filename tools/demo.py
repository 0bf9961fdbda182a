#!/usr/bin/env python3
"""A tour of hymeg on CPU, in a few minutes: a Hugging Face checkpoint trains on four processes, goes on under
another layout on two, is fine-tuned, and becomes one again.

Every step is a command line, printed before it runs, for you to type yourself. Here is only their order; what shows
them is in tools/tour.
"""

import argparse
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from tour.curves import FIRST, NUM_STEPS_TWICE, SECOND, compare, draw, read_losses
from tour.screen import ROOT, Screen, TrainingScreen, run, shown, wrapped

TINY = "examples/tiny_cpu"
TEXTS = [f"examples/data/udhr/{language}.jsonl" for language in ("de", "en", "es", "fr", "zh")]
LAYOUTS = {
    # Unsaid, the experts' tensor-parallel size is TP's, and they would want EP2 x ETP2 x PP2 = 8 processes.
    FIRST: "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 "
    "--expert-tensor-parallel-size 1",
    SECOND: "--context-parallel-size 2 --expert-model-parallel-size 2",
}
NUM_PROCESSES = {FIRST: 4, SECOND: 2}
HELD_OUT = "examples/data/translations_heldout.jsonl"
TRANSLATIONS = (
    f"--data-path examples/data/translations.jsonl --valid-data-path {HELD_OUT} --valid-translations {HELD_OUT} "
    "--valid-generate 8"
)
NUM_STAGES = 11


class Row(NamedTuple):
    """A line of the table at the end."""

    what: str
    layout: str
    seconds: float
    result: str


class Tour:
    """The steps, and the folder in which all that they make lies."""

    def __init__(self, out: Path, num_steps: int):
        self.out, self.num_steps = out, num_steps
        self.last_step = num_steps + max(NUM_STEPS_TWICE, num_steps // 3)
        self.model, self.dist, self.back, self.export = (
            shown(out / name) for name in ("model", "distributed", "back", "export")
        )
        self.saves, self.untuned, self.tuned, self.curves = (
            shown(out / name) for name in ("checkpoints", "untuned", "tuned", "tensorboard")
        )
        self.picture, self.data = shown(out / "loss.png"), shown(out / "udhr")
        self.python, self.torchrun = (
            shown(Path(sys.executable)),
            shown(Path(sysconfig.get_path("scripts")) / "torchrun"),
        )
        self.settings = (
            f"--config {TINY}/pretrain_fp32.yaml --hf-model {self.model} --data-path {self.data}_text_document"
        )
        self.rows: list[Row] = []

    def __call__(self) -> None:
        print(
            "A tiny Hy-MT2 trains on real text over four processes of this machine's CPU, then over two, then on "
            f"translations: about three minutes. All it makes: {shown(self.out)}"
        )
        print(
            "Layouts: TP tensor, PP pipeline, EP expert, CP context, DP data parallel; a number says over how many "
            "processes."
        )
        self.prepare()
        self.pretrain()
        self.tune()
        self.publish()
        self.finish()

    def prepare(self) -> None:
        """A checkpoint as it is published, in the form that Megatron loads, and text as it reads it."""
        convert, texts = f"{self.python} tools/convert_checkpoint.py", " ".join(TEXTS)
        make = f"{self.python} tools/make_tiny_checkpoint.py {self.model} --config {TINY}/config.json --dtype fp32"
        self.step("make a tiny Hy-MT2 of random weights", "", "model", make)
        self.step(
            "convert it for training",
            "",
            "to-distributed",
            f"{convert} hf-to-dist --hf {self.model} --dist {self.dist} --verify",
        )
        self.step("and back", "", "back", f"{convert} dist-to-hf --dist {self.dist} --hf {self.back}")
        self.step(
            "compare, bit by bit", "", "compare", f"{self.python} tools/compare_checkpoints.py {self.model} {self.back}"
        )
        encode = f"{self.python} tools/preprocess_data.py --input {texts} --output {self.data} --tokenizer {self.model}"
        self.step("turn text in five languages into tokens", "", "data", encode)

    def pretrain(self) -> None:
        """Under one layout, then from its checkpoint under another, for some steps under both."""
        stop = f"--save-interval {self.num_steps} --exit-interval {self.num_steps + NUM_STEPS_TWICE}"
        first = self.train(f"train, save at step {self.num_steps}", FIRST, "first", f"--load {self.dist} {stop}")
        second = self.train(
            f"resume from step {self.num_steps}", SECOND, "second", f"--load {self.saves} --ckpt-step {self.num_steps}"
        )
        difference = compare(first, second, self.out / "second.log")
        draw(first, second, self.num_steps, self.out / "loss.png")
        how_well = f"to {difference:.0e}" if difference else "to the last digit printed"
        self.rows[-1] = self.rows[-1]._replace(result=f"{self.rows[-1].result}; as under the first layout, {how_well}")

    def tune(self) -> None:
        """On translations; the loss on articles that were held out, and what it says of them, before and after."""
        settings = (
            f"--config {TINY}/finetune_fp32.yaml --hf-model {self.model} {TRANSLATIONS} --data-cache-path "
            f"{shown(self.out / 'translations')}"
        )
        load = f"--load {self.saves} --finetune --train-iters {self.num_steps // 2}"
        before = (
            f"env HYMEG_PLATFORM=cpu {self.python} pretrain_hy.py {settings} {load} --skip-train --tensorboard-dir "
            f"{self.untuned}"
        )
        self.step("its loss on held-out translations, so far", "", "untuned", before, TrainingScreen())
        tune = f"{self.launch(SECOND)} {settings} {load} --save {self.tuned} {LAYOUTS[SECOND]}"
        self.step("fine-tune it on translations", SECOND, "tuned", tune, TrainingScreen())

    def publish(self) -> None:
        """What was trained as a Hugging Face checkpoint, and what transformers makes of it."""
        export = f"{self.python} tools/convert_checkpoint.py dist-to-hf --dist {self.tuned} --hf {self.export} --verify"
        self.step("export the trained model", "", "export", export)
        losses = (
            f"{self.python} tools/tour/two_losses.py --dist {self.tuned} --hf {self.export} --data-path "
            f"{self.data}_text_document"
        )
        self.step("its loss here and in transformers", "", "losses", losses)

    def launch(self, layout: str) -> str:
        processes = f"--standalone --nproc-per-node {NUM_PROCESSES[layout]}"
        return f"env HYMEG_PLATFORM=cpu {self.torchrun} {processes} pretrain_hy.py"

    def step(self, what: str, layout: str, name: str, command: str, screen: Screen | None = None) -> None:
        print(f"\n=== {len(self.rows) + 1} of {NUM_STAGES}: {what}{f', layout {layout}' if layout else ''}", flush=True)
        screen = screen or Screen()
        run(command, self.out / f"{name}.log", screen)
        self.rows.append(Row(what, layout, screen.seconds, screen.last_line))

    def train(self, what: str, layout: str, name: str, load: str) -> dict[int, float]:
        """Returns step -> loss."""
        curves = shown(self.out / "tensorboard" / name)
        save = f"--train-iters {self.last_step} --save {self.saves} --tensorboard-dir {curves}"
        train = f"{self.launch(layout)} {self.settings} {load} {save} {LAYOUTS[layout]}"
        self.step(what, layout, name, train, TrainingScreen())
        losses = read_losses(self.out / "tensorboard" / name)
        begin, end = min(losses), max(losses)
        self.rows[-1] = self.rows[-1]._replace(
            result=f"steps {begin} to {end}: loss {losses[begin]:.2f} to {losses[end]:.2f}"
        )
        return losses

    def finish(self) -> None:
        """The table, where things lie, what to try next."""
        print(f"\n{'':4}{'what':42}{'layout':18}{'seconds':>7}   result")
        for number, row in enumerate(self.rows, 1):
            print(f"{number:>3} {row.what:42}{row.layout:18}{row.seconds:>7.0f}   {row.result}")
        print(f"{'':4}{'in all':42}{'':18}{sum(row.seconds for row in self.rows):>7.0f}\n")
        self.show_translations()
        places = {
            "loss curve": self.picture,
            "checkpoints": self.saves,
            "fine-tuned": self.tuned,
            "translations": f"{self.tuned}/records/translations",
            "exported": self.export,
            "TensorBoard": self.curves,
            "all, logs": shown(self.out),
        }
        for what, where in places.items():
            print(f"{what:12} {where}")
        alone = (
            f"env HYMEG_PLATFORM=cpu {self.python} pretrain_hy.py {self.settings} --load {self.saves} --train-iters "
            f"{self.last_step + 20}"
        )
        print(
            f"\nSee all figures:\n\n  {shown(Path(sysconfig.get_path('scripts')) / 'tensorboard')} --logdir "
            f"{self.curves}"
        )
        print(f"\nSee both trainings on a page:\n\n  {self.python} tools/report.py {self.saves} {self.tuned}")
        print(f"\nGo on from the last checkpoint with one process:\n\n  {wrapped(alone)}")

    def show_translations(self) -> None:
        """Two held-out rows, before and after; of so small a model and so few steps they are no translations yet."""
        files = [self.out / name / "records" / "translations" for name in ("untuned", "tuned")]
        before, after = (
            [json.loads(line) for line in max(folder.glob("iter_*.jsonl")).read_text().splitlines()] for folder in files
        )
        print("Held-out translations, before and after fine-tuning:")
        for old, new in list(zip(before, after, strict=True))[:2]:
            texts = {"source": old["source"], "reference": old["reference"]}
            texts |= {"before": old["hypothesis"], "after": new["hypothesis"]}
            print()
            for what, text in texts.items():
                print(f"{what:12} {' '.join(text.split())[:100]}")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        default=ROOT / "out" / "demo",
        type=Path,
        metavar="DIR",
        help="where all goes (default: out/demo, which is emptied)",
    )
    parser.add_argument(
        "--steps", default=60, type=int, metavar="N", help="steps before the change of layout (default: 60)"
    )
    args = parser.parse_args()
    out = args.out.resolve()
    if args.steps < 10:
        parser.error(f"--steps {args.steps}: at least 10, of which the learning rate takes 5 to rise")
    if out == ROOT / "out" / "demo":
        shutil.rmtree(out, ignore_errors=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {out}: not an empty folder; give another, so that nothing of yours is overwritten")
    out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONUNBUFFERED"] = "1"
    try:
        Tour(out, args.steps)()
    except KeyboardInterrupt:
        sys.exit(f"demo: interrupted; what it made so far is in {shown(out)}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
