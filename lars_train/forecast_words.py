"""What `forecast` found, in words for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lars_train.units import size


def told(found: dict[str, Any]) -> Iterator[str]:
    """What `forecast` found, in words."""
    disk = found["disk"]
    least, most = disk["checkpoints_kept_bytes"]
    log = sum(disk["log_bytes"].values())
    yield (
        f"disk           {size(disk['checkpoint_bytes'])} a checkpoint: {size(disk['checkpoints_written_bytes'])} "
        f"written in all, {size(most)} at the end ({size(least)} if the best is among the last)"
    )
    files = ", ".join(f"{name} {size(count)}" for name, count in disk["log_bytes"].items())
    yield f"               {size(sum(disk['log_line_bytes'].values()))} a log line: {size(log)} in all ({files})"
    precision = found["precision"]
    yield f"precision      {'not known here: memory as in fp32' if precision == 'auto' else precision}"
    for entry in found["memory_per_device"]:
        process = f" (process {entry['process_bytes'] / 1e9:.2f} GB)" if "process_bytes" in entry else ""
        yield (
            f"memory         micro-batch {entry['micro_batch']:>4}: {entry['bytes'] / 1e9:.2f} GB per device{process}, "
            f"accumulation {entry['accumulation']}"
        )
    if any("process_bytes" in entry for entry in found["memory_per_device"]):
        yield "               per device: what torch's allocator holds; process: all that each process takes on a CPU,"
        yield "               at most, with Python, libraries and workspaces: what to ask of Slurm, for each rank"
    expected = found.get("expected")
    if expected is None:
        yield "hours          not known: name plan.device, or give plan.images_per_second"
    else:
        rate = found["rate"]
        yield f"rate           {rate['images_per_second']:,.4g} images/s per device ({rate['source']})"
        yield (
            f"update         {expected['seconds']:.4g} s: compute {expected['compute']:.4g}, "
            f"input {expected['input']:.4g}, "
            f"network {expected['network']:.4g} (of {expected['reduction']:.4g}); limited by {expected['limit']}"
        )
        share = 100 * expected["efficiency"]
        yield f"hours          {expected['hours']:.3g}, at {share:.0f} % of one device's efficiency"
    yield from _told_rows(found["rows"])


def _told_rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "rows           batch     devices    hours  limited by       disk"
    hours = 0.0
    for row in rows:
        if "problem" in row:
            yield f"               {row['row']:<6}  not on these images: {row['problem']}"
            continue
        expected, disk = row.get("expected"), size(row["disk_bytes"])
        if expected is None:
            yield f"               {row['row']:<6}{'':>11}{'?':>9}  {'?':<10}{disk:>11}"
            continue
        hours += expected["hours"]
        more = " (no more ghost batches)" if expected["devices"] == row["most_devices"] else ""
        yield (
            f"               {row['row']:<6}{expected['devices']:>11,}{expected['hours']:>9.3g}  "
            f"{expected['limit']:<10}{disk:>11}{more}"
        )
    if hours:
        disk = size(sum(row.get("disk_bytes", 0) for row in rows))
        yield f"               {'all':<6}{'':>11}{hours:>9.3g}  {'':<10}{disk:>11}"
