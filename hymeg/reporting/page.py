"""One HTML page of one run or several: all in one file, which needs no network and no script."""

import html
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hymeg.reporting import pictures
from hymeg.reporting.reading import Run

_STYLE = Path(__file__).with_name("page.css").read_text()
_NUM_EXAMPLES = 12


def page(runs: Sequence[Run]) -> str:
    """The page of `runs`, of which there is one or more; their curves lie over each other."""
    title = "Training report: " + ", ".join(run.name for run in runs)
    sections = [_header(runs), _curves(runs), _translations(runs), *map(_expert_load, runs), *map(_facts, runs)]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{_STYLE}</style>\n</head>\n<body>\n{''.join(sections)}</body>\n</html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _header(runs: Sequence[Run]) -> str:
    lines = []
    for run, colour in pictures.coloured(runs):
        loss = run.losses.get("lm loss")
        length = run.starts[-1]["train_iters"]  # None under --train-samples
        of = f" of {length:,}" if length is not None else ""
        last = f"step {loss[-1][0]:,}{of}, loss {loss[-1][1]:.4f}" if loss else ""
        parts = [
            last,
            f"held out {held[-1][1]:.4f}" if (held := run.losses.get("lm loss, validation")) else "",
            f"chrF {run.translations[-1]['overall']['chrF']:.1f}" if run.translations else "",
            f"resumed at {', '.join(map(str, run.resumes))}" if run.resumes else "",
            f"{run.unread} lines of its record were cut off" if run.unread else "",
        ]
        said = "; ".join(filter(None, parts))
        lines.append(f'<p><b style="color:{colour}">■ {_text(run.name)}</b> {_text(said)}</p>\n')
    return f"<h1>Training report</h1>\n{''.join(lines)}"


def _curves(runs: Sequence[Run]) -> str:
    names = {  # in order; a load is 1, and says nothing, where a single expert-parallel rank has it all
        name: None
        for run in runs
        for name, series in run.curves.items()
        if not name.startswith("load of") or any(value != 1 for _, value in series)
    }
    cards = [_card("Loss", pictures.losses(runs))] if any(run.losses for run in runs) else []
    cards += [_card(name[0].upper() + name[1:], pictures.curve(runs, name)) for name in names]
    marks = "<p>▲ a checkpoint; a dashed vertical line: resumed there.</p>\n"
    return _section("Curves", f"{marks}{_grid(cards)}") if cards else ""


def _translations(runs: Sequence[Run]) -> str:
    judged = [run for run in runs if run.translations]
    if not judged:
        return ""
    cards = [_card("chrF (pale: of each pair)", pictures.scores(judged))]
    cards += [_card(f"Alarms: {run.name}", pictures.alarms(run)) for run in judged]
    tables = [_score_table(run) + _examples(run) for run in judged]
    return _section("Held-out translations", _grid(cards) + "".join(tables))


def _score_table(run: Run) -> str:
    """The last evaluation's scores, overall and of each pair."""
    last = run.translations[-1]
    metrics = ("chrF", "chrF++", "BLEU")
    judged = {"overall": last["overall"]} | last["pairs"]
    rows = [[name, of["texts"], *(f"{of[metric]:.2f}" for metric in metrics)] for name, of in judged.items()]
    signatures = ", ".join(f"{metric} {signature}" for metric, signature in last["signatures"].items())
    table = _table(["pair", "texts", *metrics], rows)
    heading = f"<h3>{_text(run.name)} at step {last['iteration']:,}</h3>"
    return f'<div class="card" style="margin-top:1rem">{heading}{table}<p><code>{_text(signatures)}</code></p></div>\n'


def _examples(run: Run) -> str:
    """The same rows at each evaluation, of many the first, some between and the last."""
    iterations = [iteration for iteration, rows in run.examples.items() if rows]
    if len(iterations) > 4:
        iterations = [iterations[round(i * (len(iterations) - 1) / 3)] for i in range(4)]
    by_row: dict[Any, dict[int, dict]] = {}
    for iteration in iterations:
        for row in run.examples[iteration]:
            by_row.setdefault(row["row"], {})[iteration] = row
    rows = []
    for of_row in list(by_row.values())[:_NUM_EXAMPLES]:
        any_row = next(iter(of_row.values()))
        cells = [_text(any_row["pair"]), _text(any_row.get("source", "")), _text(any_row["reference"])]
        rows.append([*cells, *(_hypothesis(of_row.get(iteration)) for iteration in iterations)])
    steps = [f"step {iteration:,}" for iteration in iterations]
    table = _table(["pair", "source", "reference", *steps], rows, is_html=True)
    return f'<div class="card scroll" style="margin-top:1rem"><h3>Examples: {_text(run.name)}</h3>{table}</div>\n'


def _hypothesis(row: dict | None) -> str:
    if row is None:
        return ""
    fired = f' <span class="alarm">{_text(", ".join(row["alarms"]))}</span>' if row["alarms"] else ""
    return f"{_text(row['hypothesis'])}{fired}"


def _expert_load(run: Run) -> str:
    if not run.counts.any():
        return ""
    cards = [
        _card("Busiest expert over the mean: layers x steps", pictures.load_over_steps(run)),
        _card("Tokens over the mean, last tenth of the run: layers x experts", pictures.load_by_expert(run)),
    ]
    return _section(f"Expert load: {run.name}", _grid(cards))


def _facts(run: Run) -> str:
    """What was run, where, on what."""
    last = run.starts[-1]
    what = {
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.starts[0]["time"])),
        "lives": ", ".join(f"from step {start['iteration']:,}" for start in run.starts),
        "on": f"{last['world_size']} x {last['device']}, {last['host']}",
        **last["model"],
        **last["layout"],
        **last["versions"],
    }
    data = {**last["data"], "folder of the run": run.folder}
    cards = [
        _card("Layout: ranks, coloured by their share of the experts", pictures.layout(run)),
        _card("Run", _list(what)),
        _card("Data", _list(data)),
        _card("Command", f"<code>{_text(last['command'])}</code>"),
    ]
    return _section(f"What was run: {run.name}", _grid(cards))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{content}</section>\n"


def _grid(cards: Iterable[str]) -> str:
    return f'<div class="grid">\n{"".join(cards)}</div>\n'


def _card(title: str, content: str) -> str:
    return f'<div class="card"><h3>{_text(title)}</h3>{content}</div>\n'


def _list(items: dict[str, Any]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(key)}</dt><dd>{_text(value)}</dd>' for key, value in items.items())}</dl>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], is_html: bool = False) -> str:
    show = str if is_html else _text
    lines = ["".join(f"<th>{_text(name)}</th>" for name in head)]
    lines += ["".join(f'<td class="number">{show(cell)}</td>' for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
