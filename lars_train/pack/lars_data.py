"""The command ``lars-data``: pack images into stores of tar shards, verify stores, describe them."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from lars_train.errors import ConfigError, DataError
from lars_train.messages import ignore_closed_output, not_empty, open_standard_streams, printable

BAD_INPUT, BAD_DATA, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Exit codes: 0 for success; 1 for damaged data; 2 for bad input; 130 for Ctrl-C."""
    open_standard_streams()
    args = _parser().parse_args(arguments)
    # Imported here so that --help prints at once.
    from lars_train.pack import tasks

    try:
        {"pack": tasks.run_pack, "verify": tasks.run_verify, "info": tasks.run_info}[args.command](args, _progress)
    except ConfigError as error:
        _end(str(error), BAD_INPUT)
    except DataError as error:
        _end(str(error), BAD_DATA)
    except KeyboardInterrupt:
        _end("interrupted; the same command resumes from the complete shards.", INTERRUPTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lars-data", description="Pack images into stores of tar shards, verify stores, describe them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    pack = commands.add_parser(
        "pack",
        help="make a store of tar shards from a folder",
        description="Pack images into tar shards with an index and verify them against the original, which is not "
        "modified. If interrupted, the same command resumes. To train: lars-train data=folder data.root=STORE.",
    )
    pack.add_argument(
        "source",
        type=not_empty,
        help="a folder with train/ and val/ (or one of them, or only class folders), a .zip or tar shards of such a "
        "folder, or Hugging Face's parquet files",
    )
    pack.add_argument("store", type=not_empty, help="the folder to create")
    smaller = pack.add_mutually_exclusive_group()
    smaller.add_argument(
        "--short", type=_positive_int, metavar="PIXELS", help="shrink images until the shorter side is at most this"
    )
    smaller.add_argument(
        "--max", type=_positive_int, metavar="PIXELS", help="shrink images until the longer side is at most this"
    )
    pack.add_argument("--quality", type=_quality, metavar="1..95", help="quality of re-encoded JPEGs (default: 90)")
    pack.add_argument(
        "--shards",
        type=_positive_int,
        metavar="N",
        help="number of shards of train/, or of val/ if there is no train/ (default: one per 4,000 images)",
    )
    pack.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="if an image cannot be read or, when re-encoding, decoded: stop (fail, default) or leave it out (skip)",
    )
    pack.add_argument(
        "--val-labels", type=not_empty, metavar="PATH", help="labels of a val/ without folders, see data.val_labels"
    )
    pack.add_argument(
        "--image-key", metavar="EXT", help="extension to pack if tar samples have several images, see data.image_key"
    )
    verify = commands.add_parser(
        "verify", help="check every image of a store", description="Check every image of a store."
    )
    verify.add_argument("store", type=not_empty)
    verify.add_argument("--source", type=not_empty, help="the original data set, to compare the stored images with")
    verify.add_argument(
        "--val-labels", type=not_empty, metavar="PATH", help="labels of a val/ without folders, see data.val_labels"
    )
    verify.add_argument(
        "--image-key", metavar="EXT", help="extension to compare if tar samples have several images, see data.image_key"
    )
    for command in (pack, verify):
        command.add_argument("--jobs", type=_positive_int, metavar="N", help="processes (default: one per core)")
    info = commands.add_parser("info", help="describe a store", description="Describe a store from its index.")
    info.add_argument("store", type=not_empty)
    return parser


def _positive_int(text: str) -> int:
    return _int_between(text, 1, sys.maxsize, "a whole number of at least 1")


def _quality(text: str) -> int:
    return _int_between(text, 1, 95, "a whole number from 1 to 95")


def _int_between(text: str, minimum: int, maximum: int, expected: str) -> int:
    if not (text.isdecimal() and minimum <= int(text) <= maximum):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return int(text)


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    # Disable tqdm's monitor thread: it is unsafe to fork a process with threads.
    tqdm.monitor_interval = 0
    with tqdm(total=total, desc=what, unit="image", unit_scale=False, dynamic_ncols=True, disable=None) as bar:

        def tick(count: int) -> None:
            bar.update(count)

        yield tick


def _end(message: str, code: int) -> None:
    with ignore_closed_output():
        print(f"lars-data: {printable(message)}", file=sys.stderr, flush=True)
    sys.exit(code)
