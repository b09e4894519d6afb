"""``lars-data``: packs folders of pictures into stores, verifies and describes them."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from lars_train.errors import ConfigError, DataError
from lars_train.messages import ignore_closed_output, not_empty, open_standard_streams, printable

BAD_INPUT, BAD_DATA, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with 0, 1 for data that is damaged or broken, or 2 for bad input."""
    open_standard_streams()
    args = _parser().parse_args(arguments)
    # Only now, so that --help answers at once.
    from lars_train.pack import tasks

    try:
        {"pack": tasks.run_pack, "verify": tasks.run_verify, "info": tasks.run_info}[args.command](args, _progress)
    except ConfigError as error:
        _end(str(error), BAD_INPUT)
    except DataError as error:
        _end(str(error), BAD_DATA)
    except KeyboardInterrupt:
        _end("interrupted; the same command goes on from the shards that are whole.", INTERRUPTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lars-data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    pack = commands.add_parser(
        "pack",
        help="make a store of tar shards from a folder",
        description="Packs pictures into tar shards with an index, verifies them against the original, which is only "
        "read. The same command goes on after a kill. Use: lars-train data=folder data.root=STORE.",
    )
    pack.add_argument(
        "source",
        type=not_empty,
        help="a folder with train/ and val/ (or one of them, or class folders alone), a .zip or shards of one, "
        "or Hugging Face's parquet files",
    )
    pack.add_argument("store", type=not_empty, help="the folder to make")
    smaller = pack.add_mutually_exclusive_group()
    smaller.add_argument("--short", type=_positive, metavar="PIXELS", help="the shorter side is at most this")
    smaller.add_argument("--max", type=_positive, metavar="PIXELS", help="the longer side is at most this")
    pack.add_argument("--quality", type=_quality, metavar="1..95", help="of JPEGs encoded anew (default: 90)")
    pack.add_argument(
        "--shards",
        type=_positive,
        metavar="N",
        help="shards of train/, or of a val/ alone (default: one per 4,000 pictures)",
    )
    pack.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="a picture that cannot be read, or decoded where it has to be: end there (default), or leave it out",
    )
    pack.add_argument("--val-labels", type=not_empty, metavar="PATH", help="labels of a flat val/, as data.val_labels")
    pack.add_argument("--image-key", metavar="EXT", help="of tars whose samples have several images, as data.image_key")
    verify = commands.add_parser("verify", help="read a store from end to end", description="Checks every picture.")
    verify.add_argument("store", type=not_empty)
    verify.add_argument(
        "--source", type=not_empty, help="the original, to which pictures stored as they are must be equal"
    )
    verify.add_argument(
        "--val-labels", type=not_empty, metavar="PATH", help="labels of a flat val/ in SOURCE, as data.val_labels"
    )
    verify.add_argument("--image-key", metavar="EXT", help="of tars in SOURCE, as data.image_key")
    for command in (pack, verify):
        command.add_argument("--jobs", type=_positive, metavar="N", help="processes (default: one per core)")
    info = commands.add_parser("info", help="say what is in a store", description="Reads the index alone.")
    info.add_argument("store", type=not_empty)
    return parser


def _positive(text: str) -> int:
    return _whole(text, 1, sys.maxsize, "a whole number of at least 1")


def _quality(text: str) -> int:
    return _whole(text, 1, 95, "a whole number from 1 to 95")


def _whole(text: str, least: int, most: int, wanted: str) -> int:
    if not (text.isdecimal() and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return int(text)


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    # Its thread must not be there when processes are forked.
    tqdm.monitor_interval = 0
    with tqdm(total=total, desc=what, unit="image", unit_scale=False, dynamic_ncols=True, disable=None) as bar:

        def tick(count: int) -> None:
            bar.update(count)

        yield tick


def _end(message: str, code: int) -> None:
    with ignore_closed_output():
        print(f"lars-data: {printable(message)}", file=sys.stderr, flush=True)
    sys.exit(code)
