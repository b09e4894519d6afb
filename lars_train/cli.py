"""The command line: compose the config with Hydra, run the command, and report errors.

torch is not imported until a command needs it.

Exit codes: 0 for success; 1 for a failed run, or a check that found a problem; 2 for bad input; 75 if a
termination signal stopped the run, which the same command resumes; 128 plus the signal's number if a second signal
ended the run at once; 130 for Ctrl-C before or after training.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lars_train.config import config_dir, register, resolve
from lars_train.config.arguments import HELP, SWEEP, prepare_arguments, quoted, take_config_file
from lars_train.config.compose import explain
from lars_train.config.help import overview, page
from lars_train.config.saved import NAME, SavedConfig, register_saved
from lars_train.errors import ConfigError, DataError, Diverged, NotReady, Stopped
from lars_train.launch import WorkerError, collect_garbage_rarely, share_cores
from lars_train.messages import (
    complain,
    ignore_closed_output,
    is_rank0,
    open_standard_streams,
    printable_lines,
    say,
)
from lars_train.optim import __version__
from lars_train.signals import handle_termination

BAD_INPUT, FAILED, STOPPED, INTERRUPTED = 2, 1, 75, 130


class _Jobs:
    """The results of the command line's jobs: one, or several in a sweep."""

    def __init__(self) -> None:
        self.done = 0
        self.directories: dict[Path, str] = {}
        self.failures: list[tuple[str, int, str]] = []
        self.crash: Exception | None = None

    def fail(self, label: str, code: int, reason: str) -> None:
        """Record a failed job and print the reason."""
        self.failures.append((label, code, reason))
        complain(reason)

    def save(self, folder: Path) -> None:
        """Write the results of a submitted job to a new file in `folder`."""
        results = {"done": self.done, "failures": self.failures}
        results["directories"] = [[str(path), label] for path, label in self.directories.items()]
        (folder / f"{uuid.uuid4().hex}.json").write_text(json.dumps(results))

    def add_saved(self, folder: Path) -> None:
        """Add the results that submitted jobs saved in `folder`."""
        for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
            results = json.loads(path.read_text())
            self.done += results["done"]
            self.failures += [(label, code, reason) for label, code, reason in results["failures"]]
            self.directories |= {Path(directory): label for directory, label in results["directories"]}

    def exit_code(self) -> int:
        """Return 0 without failures, 2 if every failure was bad input, else 1."""
        codes = {code for _, code, _ in self.failures}
        return 0 if not codes else BAD_INPUT if codes == {BAD_INPUT} else FAILED


# Hydra's launchers that submit jobs to Slurm, or start processes as Slurm would.
_SUBMITS = re.compile("hydra/launcher=submitit_")

# Folders to remove at the end.
_scratch: list[str] = []


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Handle a termination signal before and after training; during training `SignalHandler` does."""
    text = f"lars-train: {signal.Signals(number).name}: stopped; the same command resumes from the last checkpoint.\n"
    os.write(2, text.encode())
    for folder in _scratch:
        shutil.rmtree(folder, ignore_errors=True)
    # `sys.exit` would raise an exception, possibly in the middle of an import.
    os._exit(INTERRUPTED if number == signal.SIGINT else STOPPED)


def main() -> None:
    """Run ``lars-train`` or ``python -m lars_train``, and exit with its code."""
    open_standard_streams()
    share_cores()
    collect_garbage_rarely()
    handle_termination(_exit_on_signal)
    command = (Path(sys.argv[0]).name if "__main__" not in sys.argv[0] else "python -m lars_train", *sys.argv[1:])
    try:
        arguments, file = take_config_file(sys.argv[1:])
        if HELP.intersection(arguments):
            show_help([word for word in arguments if not word.startswith("-") and "=" not in word])
            sys.exit(0)
        sys.argv[1:] = prepare_arguments(arguments, None if file else os.environ.get("IMAGENET_DIR"))
        register()
        saved = register_saved(file, [argument for argument in sys.argv[1:] if "=" in argument]) if file else None
    except ConfigError as error:
        complain(str(error))
        sys.exit(BAD_INPUT)
    if "--version" in sys.argv[1:]:
        say(f"lars-train {__version__}")
        sys.exit(0)
    sweeping = not SWEEP.isdisjoint(sys.argv[1:])
    submitted = _choose_sweep_folder() if sweeping else None
    # Otherwise Hydra does not raise its errors, but prints them and exits with code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    jobs = _Jobs()
    name = NAME if saved else "config"

    def job(raw: DictConfig) -> None:
        failures = len(jobs.failures)
        _run_job(raw, command, jobs, sweeping, saved)
        if sweeping and len(jobs.failures) > failures and jobs.failures[-1][1] == FAILED:
            # Close the connections of the job's process group, which a reference cycle through the traceback keeps
            # open. The other ranks wait for this rank until then.
            gc.collect()
        if submitted is not None and is_rank0():
            jobs.save(submitted)

    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)(job)()
    except BrokenPipeError:
        # The reader of the pipe has exited (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except Exception as error:
        if error is jobs.crash:
            with ignore_closed_output():
                print(printable_lines(traceback.format_exc()), file=sys.stderr, flush=True)
            sys.exit(FAILED)
        # `_run_job` handles the errors of jobs. Hydra's errors about the command line have no common class.
        complain(explain(error, sys.argv[1:]))
        sys.exit(FAILED if submitted is not None and any(submitted.iterdir()) else BAD_INPUT)
    if submitted is not None:
        jobs.add_saved(submitted)
    if sweeping:
        _report_sweep(jobs)
    # In a sweep, the other ranks exit with 0: if one of them failed first, the launcher would end rank 0 too early.
    sys.exit(jobs.exit_code() if not sweeping or is_rank0() else 0)


def _choose_sweep_folder() -> Path | None:
    """Set ``hydra.sweep.dir``. Return the folder where submitted jobs save their results; None without such jobs."""
    if any(map(_SUBMITS.match, sys.argv[1:])):
        # Next to the run directories, which all machines can access.
        folder = Path("runs", ".sweeps", uuid.uuid4().hex[:8]).absolute()
        folder.mkdir(parents=True)
        sys.argv.insert(1, f"hydra.sweep.dir={quoted(str(folder))}")
        return folder
    if not any(argument.startswith("hydra.sweep.dir=") for argument in sys.argv[1:]):
        # Hydra writes multirun.yaml there. The run directories have everything worth keeping.
        scratch = tempfile.mkdtemp(prefix="lars-train-")
        _scratch.append(scratch)
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        sys.argv.insert(1, f"hydra.sweep.dir={quoted(scratch)}")
    return None


def show_help(names: Sequence[str]) -> None:
    """Print the overview, or the pages of the groups and keys in `names`. Raises `ConfigError` for an unknown name."""
    say("\n\n".join(map(page, names)) if names else overview())


def _run_job(raw: DictConfig, command: tuple[str, ...], jobs: _Jobs, sweeping: bool, saved: SavedConfig | None) -> None:
    # A job that a scheduler started has not run `main`.
    open_standard_streams()
    # Unresolved, so that `resolve` reports a failing interpolation by its key.
    given = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(given, list)
    overrides = tuple(map(str, given))
    # Without the quotes that `prepare_arguments` put around digits.
    label = re.sub(r"='([\w.+-]+)'", r"=\1", " ".join(overrides)) or "(no overrides)"
    if sweeping:
        say(f"\n=== job {jobs.done + len(jobs.failures) + 1}: {label}")
    try:
        config = resolve(raw)
        if saved is not None:
            config = saved.place(config)
        # These import torch.
        from lars_train import commands
        from lars_train.training.run_directory import Invocation, holds_run_of, run_directory

        config = commands.with_stored_scaling(config, raw)
    except ConfigError as error:
        jobs.fail(label, BAD_INPUT, str(error))
        return
    hydra_yaml = OmegaConf.to_yaml(OmegaConf.create({"hydra": HydraConfig.get()}))
    try:
        invocation = Invocation(command, overrides, OmegaConf.to_yaml(raw), hydra_yaml)
        commands.run(config, invocation)
        jobs.done += 1
    except ConfigError as error:
        jobs.fail(label, BAD_INPUT, str(error))
    except (DataError, Diverged, NotReady, WorkerError) as error:
        jobs.fail(label, FAILED, str(error))
    except Stopped as stopped:
        # Exit with SystemExit: after an Exception, Hydra would start the next job of a sweep.
        complain(str(stopped))
        scheduler = signal.getsignal(signal.SIGUSR2)
        if (
            str(stopped).startswith(f"{signal.SIGUSR2.name}:")
            and callable(scheduler)
            and scheduler is not _exit_on_signal
        ):
            # submitit's handler, which training replaced: it requeues the job and ends the process.
            scheduler(signal.SIGUSR2, None)
        sys.exit(stopped.code)
    except Exception as error:
        if not sweeping:
            jobs.crash = error
            raise
        with ignore_closed_output():
            print(printable_lines(traceback.format_exc()), file=sys.stderr, flush=True)
        jobs.fail(label, FAILED, f"{type(error).__name__}: {error}")
    finally:
        # A failed job gets a row in the report. A job with bad input gets none: its directory may hold another run.
        refused = (label, BAD_INPUT) in [failure[:2] for failure in jobs.failures]
        if sweeping and not refused and config.mode == "train" and holds_run_of(run_directory(config), config):
            jobs.directories[run_directory(config)] = label


def _report_sweep(jobs: _Jobs) -> None:
    say(f"\n=== sweep: {jobs.done} of {jobs.done + len(jobs.failures)} jobs done")
    if jobs.directories and is_rank0():
        from lars_train.report.lars_report import report_sweep

        report_sweep(jobs.directories)
    for label, _, reason in jobs.failures:
        complain(f"job failed: {label}: {reason}")
