"""Before every start, on every node at once: can they train together? python -m hymeg.launch.health, one process a
node; see `main` for its flags.

The first node listens where the rendezvous will be, and the others come with what they have found: so the network is
checked as well. It compares, and says all that is wrong, a line each, with the node's name. Exit code: 0, 1 for a node
that is not fit, 2 for a recipe or flag that is wrong.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from hymeg.errors import EXIT_CODE, UserError
from hymeg.launch.checks import check_num_gpus, check_run, host_gib, node_problems, read_run, versions

_SECONDS_BETWEEN_CLOCKS = 10.0
say = functools.partial(print, flush=True)  # srun may kill this process soon


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hymeg.launch.health", description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of this node")
    parser.add_argument("--nodes", required=True, help="the names of all, the first one listens: n0,n1")
    parser.add_argument("--head", required=True, metavar="HOST:PORT", help="where it listens")
    parser.add_argument("--processes", required=True, type=int, help="on each node")
    parser.add_argument("--folder", required=True, type=Path, help="of this start, shared; `unfit` there names nodes")
    parser.add_argument("--seconds", default=180, type=int, help="until a node that said nothing is given up")
    parser.add_argument("recipe")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    names = args.nodes.split(",")
    first = args.name == names[0]
    folders, problems, needed_gib = [args.folder], [], 0.0
    try:
        run = read_run(args.recipe, args.words)
        check_run(run)
        any_number = os.environ.get("HYMEG_ANY_GPUS") == "1"
        note = check_num_gpus(args.recipe, len(names), args.processes, any_number)
        folders.append(Path(run.save))
        needed_gib = host_gib(run, args.processes)
        if first and note:
            say(f"hymeg: {note}")
    except UserError as error:
        if first:
            say(f"error: {error}")
            (args.folder / "refused").touch()  # as an exit code it is lost when srun kills the other nodes
            sys.exit(EXIT_CODE)
        problems.append(str(error))  # it is for the first node to say: srun would kill that as soon as this one ends
    problems += node_problems(args.processes, needed_gib, folders)
    facts = {"name": args.name, "problems": problems, "versions": versions()}
    host, _, port = args.head.rpartition(":")
    if first:
        sys.exit(_head(facts, names, int(port), folders, args.seconds))
    sys.exit(_other(facts, (host, int(port)), folders, args.seconds))


def _head(facts: dict[str, Any], names: list[str], port: int, folders: list[Path], seconds: int) -> int:
    """Hear all others, compare, say what is wrong."""
    token = secrets.token_hex(8)
    for folder in folders:
        with contextlib.suppress(OSError):  # which is among the problems found here
            _token_file(folder, names[0]).write_text(token)
    heard = {names[0]: facts}
    try:
        streams = _hear(heard, names, port, {"head": names[0], "token": token}, seconds)
    except OSError as error:
        found = f"port {port} cannot be listened at ({os.strerror(error.errno)})"
        say(f"error: {names[0]}: {found}; set HYMEG_PORT to a free one")
        return 1
    problems = list(compare(heard, names, folders, token, seconds))
    for name, problem in problems:
        say(f"error: {name}: {problem}")
    if problems:
        (folders[0] / "unfit").write_text("".join(f"{name}\n" for name in dict(problems)))
    else:
        say(f"hymeg: {len(names)} nodes are fit: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}")
    for folder, name in itertools.product(folders, names):
        with contextlib.suppress(OSError):
            _token_file(folder, name).unlink()
    for stream in streams:  # at last, for srun ends this process as soon as another has failed
        with contextlib.suppress(OSError):  # it has gone, and srun says so
            _send(stream, {"fit": not problems})
    return 1 if problems else 0


def _hear(
    heard: dict[str, dict[str, Any]], names: list[str], port: int, greeting: dict[str, str], seconds: int
) -> list[TextIO]:
    """Fill `heard` until all `names` are in it or time is up; returns where to answer. Nobody waits for the silent."""
    streams, end = [], time.monotonic() + seconds

    def listen(connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):  # who says nothing, or nothing of sense, is named in the end
            stream = connection.makefile("rw")
            _send(stream, greeting | {"time": time.time()})
            facts = json.loads(stream.readline())
            if isinstance(facts, dict) and facts.get("name") in names:
                streams.append(stream)
                heard[facts["name"]] = facts

    with socket.create_server(("", port), backlog=max(128, len(names))) as server:
        server.settimeout(0.2)
        while len(heard) < len(names) and time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                connection.settimeout(seconds)
                threading.Thread(target=listen, args=(connection,), daemon=True).start()
    return streams


def compare(
    heard: dict[str, dict[str, Any]], names: list[str], folders: list[Path], token: str, seconds: int
) -> Iterator[tuple[str, str]]:
    """(node, what is wrong with it); the first node is what the others are compared with."""
    first = heard[names[0]]
    for name in names:
        if (facts := heard.get(name)) is None:
            yield name, f"no word within {seconds} s: it did not start, or cannot reach {names[0]}"
            continue
        yield from ((name, problem) for problem in facts["problems"])
        for package, version in first["versions"].items():
            if (found := facts["versions"].get(package)) != version:
                yield name, f"{package} is {found}, but {version} on {names[0]}; make them the same on all nodes"
        if abs(facts.get("clock", 0.0)) > _SECONDS_BETWEEN_CLOCKS:
            yield name, f"its clock is {facts['clock']:+.0f} s off that of {names[0]}; set both (NTP)"
        problems = facts["problems"] + first["problems"]
        for folder in folders if name != names[0] else ():
            if str(folder) not in facts["tokens"] or any(str(folder) in problem for problem in problems):
                continue  # said already
            path = _token_file(folder, name)
            if facts["tokens"][str(folder)] != token or not path.is_file() or path.read_text() != token:
                wanted = f"the same folder as on {names[0]}; give one on a file system that all nodes share"
                yield name, f"{folder} is not {wanted}"


def _other(facts: dict[str, Any], head: tuple[str, int], folders: list[Path], seconds: int) -> int:
    """Tell the first node what was found here, and hear whether all are fit."""
    end, where = time.monotonic() + seconds, f"{head[0]}:{head[1]}"
    while True:
        before = time.time()
        try:
            connection = socket.create_connection(head, timeout=5)
            break
        except OSError as error:
            if time.monotonic() > end:
                todo = "open that port between the nodes, or set HYMEG_PORT"
                say(f"error: {facts['name']}: cannot reach {where} ({error}); {todo}")
                return 1
            time.sleep(0.5)
    try:
        with connection:
            connection.settimeout(seconds + 30)
            return _talk(connection.makefile("rw"), facts, folders, before)
    except (OSError, ValueError, KeyError):
        said = f"{where} is not the first node's check, or it has gone"
        say(f"error: {facts['name']}: {said}; set HYMEG_PORT to a free port")
        return 1


def _talk(stream: TextIO, facts: dict[str, Any], folders: list[Path], before: float) -> int:
    """The first node tells its time between `before` and now: their middle is off by half the time between at most,
    and what is more is the clock's.
    """
    said = json.loads(stream.readline())
    away = (time.time() - before) / 2
    offset = before + away - said["time"]
    facts["clock"] = 0.0 if abs(offset) <= away else offset
    facts["tokens"] = dict.fromkeys(map(str, folders), "")
    for folder in folders:  # what the first node wrote there, as seen here; and the same for it to see
        with contextlib.suppress(OSError):
            _token_file(folder, facts["name"]).write_text(said["token"])
            facts["tokens"][str(folder)] = _token_file(folder, said["head"]).read_text()
    _send(stream, facts)
    return 0 if json.loads(stream.readline())["fit"] else 1


def _token_file(folder: Path, name: str) -> Path:
    return folder / f".hymeg-health-{name}"


def _send(stream: TextIO, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
