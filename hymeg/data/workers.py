"""Batches of rows encoded by several processes, in order and in bounded memory."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from hymeg.data.text_files import Batch
from hymeg.errors import UserError

_encode: Callable[[Batch], object]


def encode_all[T](
    batches: Iterable[Batch], make_encoder: Callable[..., Callable[[Batch], T]], settings: tuple, num_workers: int
) -> Iterator[T]:
    """The batches, encoded, in their order.

    Args:
        make_encoder: a class or function of a module; each process calls it once, with `settings`.
        num_workers: 1: this process encodes, with the tokenizer's own threads. More: so many processes.

    Raises:
        UserError: what the encoder raises; a process died.
    """
    if num_workers == 1:
        yield from map(make_encoder(*settings), batches)
        return
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (make_encoder, settings))
    under_way = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(_encode_in_worker, batch))
            if len(under_way) == 2 * num_workers:  # a map over the pool would read all the input at once
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died, perhaps killed for want of memory; try fewer --workers ({num_workers} now)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(make_encoder: Callable[..., Callable[[Batch], object]], settings: tuple) -> None:
    global _encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encode = make_encoder(*settings)


def _encode_in_worker(batch: Batch) -> object:
    return _encode(batch)
