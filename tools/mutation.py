"""What would the tests miss? Breaks the package on purpose, one small change at a time, and says which test noticed.

    python tools/mutation.py hymeg/data --count 30 --seed 1

A first run notes which lines of the package every unit test executes. A change is then shown to the tests that come by
its line, then to the rest of their files, cheap ones first, until one fails or `--budget` is spent. Tests run in copies
of the tree, in processes forked from one that has imported torch and Megatron. Results go to a file of JSON lines, one
a change: started again, the same command goes on where it stopped.
"""

import argparse
import ast
import collections
import contextlib
import copy
import fnmatch
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLD = ("hymeg/__init__.py", "hymeg/errors.py", "hymeg/platform/*")
"""Loaded before Megatron is: a change here needs a process that has not imported it yet."""
LIBRARIES = ("torch.distributed.checkpoint", "transformers", "safetensors.torch", "hypothesis", "pytest")
MEGATRON = ("training.training", "core.models.gpt.gpt_model", "core.datasets.gpt_dataset", "core.dist_checkpointing")
ELSEWHERE = {
    "hymeg/launch/*": ["tests/slurm_jobs/test_health.py", "tests/slurm_jobs/test_launcher.py"],
    "hymeg/platform/*": ["tests/distributed/test_parts.py"],
    "hymeg/planning/*": ["tests/end_to_end/test_plan_construction.py"],
}
"""Package files -> tests that come by them in processes of their own, beside those of tests/unit."""

OPPOSITES = [(ast.Eq, ast.NotEq), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)]
OPPOSITES += [(ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.FloorDiv)]
SWAPS = dict(OPPOSITES) | {b: a for a, b in OPPOSITES} | {ast.Div: ast.Mult, ast.Mod: ast.FloorDiv}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
PROSE = {"print", "warn", "warning", "info", "debug", "note", "UserError", "add_argument", "patch", "patched"}
"""Calls whose arguments are for readers."""
FOR_READERS = {"strict", "flush", "stacklevel", "help", "description"}
DROPPED = (ast.Raise, ast.Assert, ast.AugAssign, ast.Continue, ast.Break, ast.Delete)


def changes(parent: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(node, source to put in its place), below `parent`; docstrings, messages and annotations are left alone."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.JoinedStr | ast.arg | ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.keyword) and node.arg in FOR_READERS:
            continue
        if isinstance(node, ast.Call) and _name(node.func) in PROSE:
            continue
        if isinstance(node, ast.If) and re.search("TYPE_CHECKING|__name__", ast.unparse(node.test)):
            continue
        yield from _variants(node)
        if isinstance(node, ast.Raise):
            continue
        if isinstance(node, ast.FunctionDef):
            node = ast.Module([*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body], [])
        elif isinstance(node, ast.ClassDef):
            node = ast.Module(node.body, [])
        elif isinstance(node, ast.AnnAssign):
            node = ast.Module([node.value] if node.value else [], [])
        yield from changes(node)


def _name(function: ast.expr) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))


def _with(node: ast.AST, **fields) -> str:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return f"({ast.unparse(changed)})"


def _variants(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    for conditions in (getattr(node, "test", None), getattr(node, "ifs", None)):
        for condition in conditions if isinstance(conditions, list) else filter(None, [conditions]):
            yield condition, f"(not ({ast.unparse(condition)}))"
    call = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    stored = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    if isinstance(node, DROPPED) or stored or (call and _name(call.func) not in PROSE):
        yield node, "pass"
    elif isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        yield node, "return None"
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield node, _with(node, ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in SWAPS:
        yield node, _with(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield node, f"({ast.unparse(node.left)})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield node, _with(node, func=ast.Name(NAMES[node.func.id]))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield node, f"({node.value + 1!r})"
        yield node, f"({node.value - 1!r})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w./*-]+", node.value):
        yield node, repr(node.value + "x")


def mutations(file: str, source: bytes) -> list[dict]:
    """Every change to `file`: its lines, its bytes and what would stand there."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree, found = ast.parse(source), {}
    statements = [(node.lineno, node.end_lineno) for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    for node, new in changes(tree):
        begun = max(first for first, last in statements if first <= node.lineno and node.end_lineno <= last)
        a, b = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        old = " ".join(source[a:b].decode().split())
        at = {"file": file, "line": node.lineno, "lines": [begun, node.end_lineno], "span": [a, b]}
        found[a, b, new] = at | {"old": old, "new": new}
    return list(found.values())


def draw(paths: list[str], count: int, seed: int) -> list[dict]:
    """Lines are drawn first, all alike, then a change that begins there."""
    files = subprocess.check_output(["git", "ls-files", *paths], cwd=ROOT, text=True).split()
    by_line = collections.defaultdict(list)
    for file in (file for file in files if file.endswith(".py")):
        for mutation in mutations(file, (ROOT / file).read_bytes()):
            by_line[file, mutation["line"]].append(mutation)
    chance = random.Random(seed)
    return [chance.choice(by_line[line]) for line in chance.sample(sorted(by_line), min(count, len(by_line)))]


class Notes:
    """A pytest plugin: the package's lines that a test runs, and for how long; those of imports under its file."""

    def __init__(self):
        self.lines, self.seconds, self.failed = collections.defaultdict(set), collections.Counter(), []
        self.current, self.package = "import", f"{os.getcwd()}/hymeg/"
        monitor = sys.monitoring
        monitor.use_tool_id(monitor.COVERAGE_ID, "mutation")
        monitor.register_callback(monitor.COVERAGE_ID, monitor.events.LINE, self.on_line)
        monitor.set_events(monitor.COVERAGE_ID, monitor.events.LINE)

    def on_line(self, code, number):
        if code.co_filename.startswith(self.package):
            self.lines[self.current].add(f"hymeg/{code.co_filename.removeprefix(self.package)}:{number}")
        return sys.monitoring.DISABLE

    def pytest_runtest_protocol(self, item):
        self.current = item.nodeid
        sys.monitoring.restart_events()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.append(f"{report.nodeid} (import)")


class Chosen(Notes):
    """A pytest plugin: runs these tests alone, in this order."""

    def __init__(self, order: list[str]):
        self.order, self.seconds, self.failed = {test: n for n, test in enumerate(order)}, collections.Counter(), []
        self.current = None

    def pytest_runtest_protocol(self, item):
        pass

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])


def in_pool(work: Callable, tasks: list, jobs: int, names: list[str], cold: bool) -> Iterator:
    """What `work` makes of every task, as it comes, in processes that each have a copy of the tree."""
    with tempfile.TemporaryDirectory(prefix="mutation-trees-") as folder:
        copies, context = multiprocessing.SimpleQueue(), multiprocessing.get_context("fork")
        for number in range(jobs):
            for name in names:
                at = Path(folder, str(number), name)
                at.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, at)
            copies.put(f"{folder}/{number}")
        with futures.ProcessPoolExecutor(jobs, context, prepare, (cold, copies)) as pool:
            waiting = [pool.submit(work, task) for task in tasks]
            try:
                for done in futures.as_completed(waiting):
                    yield done.result()
            finally:
                pool.shutdown(cancel_futures=True)


def prepare(cold: bool, copies) -> None:
    """In a process of the pool: go into a copy of the tree and import what the tests will not change."""
    os.chdir(copies.get())
    os.environ |= {"PYTHONPATH": os.getcwd(), "HYMEG_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    sys.path[:] = [os.getcwd(), *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tools"))]
    with contextlib.suppress(ImportError):
        for library in LIBRARIES:
            importlib.import_module(library)
    if not cold:
        importlib.import_module("hymeg.platform").install()
        for module in MEGATRON:
            importlib.import_module(f"megatron.{module}")


def in_a_child(work: Callable[[], object], seconds: float):
    """What `work` returns in a forked process; "timeout" or "died" where it returns nothing."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.environ["TMPDIR"] = tempfile.tempdir = folder
            out = os.open(f"{folder}/out", os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 1), os.dup2(out, 2)
            Path(folder, "result").write_text(json.dumps(work()))
            os._exit(0)
        deadline, done = time.monotonic() + seconds, (0, 0)
        while done[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
            done = os.waitpid(pid, os.WNOHANG)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if done[0] == 0:
            os.waitpid(pid, 0)
            return "timeout"
        result = Path(folder, "result")
        return json.loads(result.read_text()) if result.exists() else "died"


def pytest_with(plugin: Notes, files: list[str], *options: str) -> None:
    import pytest

    off = ["-p", "no:cacheprovider", "-p", "no:randomly", "-o", "addopts="]
    common = ["-q", "-m", "not soak", *off, f"--rootdir={os.getcwd()}"]
    pytest.main([*common, *options, *files], plugins=[plugin])


def survey(file: str) -> tuple[str, dict]:
    """What the tests of `file` run, unchanged."""

    def work():
        notes = Notes()
        pytest_with(notes, [file])
        lines = {test: sorted(run) for test, run in notes.lines.items()}
        return {"lines": lines, "seconds": notes.seconds, "failed": notes.failed}

    return file, in_a_child(work, 900)


def choose(mutation: dict, surveys: dict[str, dict], budget: float) -> list[str]:
    """The tests to show it to: those that run its lines, then others of their files; named and cheap files first."""
    package, _, module = mutation["file"].removesuffix(".py").replace("/", ".").rpartition(".")
    names = re.compile(rf"{re.escape(package)}(\.| import .*\b){module}\b")
    lines = {f"{mutation['file']}:{number}" for number in range(mutation["lines"][0], mutation["lines"][1] + 1)}
    ranked, room = [], mutation["file"].split("/")[1]
    is_seen = any(not lines.isdisjoint(run) for notes in surveys.values() for run in notes["lines"].values())
    for file, notes in surveys.items():
        sees = {test for test, run in notes["lines"].items() if not lines.isdisjoint(run)}
        if any(fnmatch.fnmatch(mutation["file"], glob) and file in files for glob, files in ELSEWHERE.items()):
            sees |= notes["seconds"].keys()
        if not is_seen and f"hymeg.{room}" in (ROOT / file).read_text():
            sees |= notes["seconds"].keys()  # by a process of their own, perhaps
        if sees:
            unnamed = not names.search((ROOT / file).read_text())
            price = sum(seconds for test, seconds in notes["seconds"].items() if test in sees)
            for test, seconds in notes["seconds"].items():
                ranked.append((test not in sees, unnamed, price, file, len(ranked), test, seconds))
    chosen, spent = [], 0.0
    for *_, test, seconds in sorted(ranked):
        if spent + seconds <= budget or not chosen:
            chosen.append(test)
            spent += seconds
    return chosen


def judge(task: tuple[dict, list[str], float]) -> dict:
    """Apply a mutation to this process's copy and run the tests chosen until one fails."""
    mutation, tests, seconds = task
    path, (a, b) = Path(mutation["file"]), mutation["span"]
    original, stamp = path.read_bytes(), path.stat().st_mtime
    path.write_bytes(original[:a] + mutation["new"].encode() + original[b:])
    os.utime(path, (stamp + 2 + a % 1000, stamp + 2 + a % 1000))  # whole seconds tell a compiled file's age
    begun = time.monotonic()

    def work():
        chosen = Chosen(tests)
        pytest_with(chosen, list(dict.fromkeys(test.partition("::")[0] for test in tests)), "-x")
        return {"by": chosen.failed[:1], "ran": len(chosen.seconds)}

    try:
        found = in_a_child(work, seconds)
    finally:
        path.write_bytes(original)
        os.utime(path, (stamp, stamp))
    if isinstance(found, str):
        found = {"by": [found], "ran": 0}
    broken = ["nothing could be run"] if tests and not found["ran"] else []
    by = [*found["by"], *broken, "SURVIVED"][0]
    return mutation | {"by": by, "ran": found["ran"], "of": len(tests), "seconds": round(time.monotonic() - begun, 1)}


def tell(result: dict) -> None:
    short = lambda text: text if len(text) < 50 else f"{text[:47]}..."  # noqa: E731
    change = f"{short(result['old'])} -> {short(result['new'])}"
    print(f"{result['file']}:{result['line']:<4} {change:<80} {result['by']}  [{result['seconds']} s]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="folders or files of the package")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests a change is shown to")
    parser.add_argument("--log", type=Path, default=Path("mutation.jsonl"), help="results; the survey lies beside it")
    args = parser.parse_args()

    drawn = draw(args.paths, args.count, args.seed)
    told = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log.exists() else []
    key = lambda m: (m["file"], *m["span"], m["old"], m["new"])  # noqa: E731
    known = {key(result): result for result in told}
    results = [known[key(m)] for m in drawn if key(m) in known]
    todo = [m for m in drawn if key(m) not in known]

    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split("\n")
    listed = [name for name in listed if name and (ROOT / name).is_file()]
    tests = [name for name in listed if fnmatch.fnmatch(name, "tests/unit/test_*.py")]
    tests += [t for g, others in ELSEWHERE.items() if fnmatch.filter([m["file"] for m in drawn], g) for t in others]
    tree = hashlib.sha256(b"".join((ROOT / n).read_bytes() for n in listed if n.startswith(("hymeg/", "tests/"))))
    surveyed = args.log.with_suffix(f".{tree.hexdigest()[:12]}.json")
    surveys = json.loads(surveyed.read_text()) if surveyed.exists() else {}
    if missing := [file for file in tests if todo and file not in surveys]:
        for file, found in in_pool(survey, missing, args.jobs, listed, cold=True):
            if wrong := found if isinstance(found, str) else found["failed"]:
                raise SystemExit(f"{file} must pass before anything is changed: {wrong}")
            print(f"{file}: {len(found['seconds'])} tests, {sum(found['seconds'].values()):.1f} s", flush=True)
            surveys[file] = found
            surveyed.write_text(json.dumps(surveys))
    for cold in (False, True):
        part = [m for m in todo if any(fnmatch.fnmatch(m["file"], glob) for glob in COLD) is cold]
        tasks = [(m, choose(m, surveys, args.budget), 3 * args.budget + 60) for m in part]
        for result in in_pool(judge, tasks, args.jobs, listed, cold):
            results.append(result)
            with args.log.open("a") as log:
                print(json.dumps(result), file=log)
            tell(result)
    print()
    for result in results:
        if result["by"] in ("SURVIVED", "timeout"):
            tell(result)
    rooms = collections.defaultdict(list)
    for result in results:
        rooms[os.path.dirname(result["file"])].append(result["by"] != "SURVIVED")
    for room, noticed in sorted(rooms.items()):
        print(f"{room}: {sum(noticed)} of {len(noticed)} noticed ({sum(noticed) / len(noticed):.0%})")


if __name__ == "__main__":
    main()
