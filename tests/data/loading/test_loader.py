"""The batches of a stream depend only on data set, seed and update, and not on the workers."""

from __future__ import annotations

import gc
import io
import mmap
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from lars_train.data.auto_augment import TRIVIAL, AutoAugment
from lars_train.data.decode import native
from lars_train.data.decode import pillow as decode_module
from lars_train.data.decode.pillow import NATIVE, PILLOW, decode
from lars_train.data.loading import stream as stream_module
from lars_train.data.loading import workers as workers_module
from lars_train.data.loading.loader import (
    BadSample,
    Batch,
    EvalSpec,
    LoaderSpec,
    Stream,
    View,
    eval_loader,
    train_loader,
)
from lars_train.data.mixing import Mixing
from lars_train.data.order import epoch_order, sample_uniforms
from lars_train.data.transforms import UNIFORMS, TrainingSizes
from lars_train.errors import DataError
from lars_train.signals import TERMINATION_SIGNALS

SIZE = 12
KINDS = ["processes", "threads"] if sys.platform == "linux" else ["threads"]
forked = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked only on Linux")
VIEW = View("pad_crop", SIZE, True, 2, 1.0)
# Another size from epoch 1 on.
GROWING = replace(VIEW, size=20, sizes=TrainingSizes(SIZE, 20))
SHRINKING = replace(VIEW, sizes=TrainingSizes(SIZE, 7))


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@dataclass
class SyntheticImages:
    """A source in memory: sample i is noise with the seed i and the label 10 * i. Some samples are damaged."""

    count: int
    encoded: bool = False
    empty: set[int] = field(default_factory=set)
    missing: set[int] = field(default_factory=set)
    on_read: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        self.labels = np.arange(self.count, dtype=np.int32) * 10

    def __len__(self) -> int:
        return self.count

    def name(self, sample: int) -> str:
        return f"class/{sample}.png"

    def location(self, sample: int) -> str:
        return f"/data/class/{sample}.png"

    def pixels(self, sample: int) -> npt.NDArray[np.uint8]:
        return np.random.default_rng(sample).integers(1, 256, (SIZE, SIZE, 3), dtype=np.uint8)

    def read(self, sample: int) -> bytes | npt.NDArray[np.uint8]:
        if self.on_read:
            self.on_read(sample)
        if sample in self.missing:
            raise FileNotFoundError(2, "No such file or directory", self.location(sample))
        if sample in self.empty:
            return b""
        if not self.encoded:
            return self.pixels(sample)
        file = io.BytesIO()
        Image.fromarray(self.pixels(sample)).save(file, "PNG")
        return file.getvalue()


def train(source: SyntheticImages, start_update: int = 0, stop_update: int = 5, **changes: Any) -> Stream:
    options: dict[str, Any] = {
        "seed": 7,
        "batch": 10,
        "ghost_batch": 4,
        "ghosts_per_micro": 2,
        "updates_per_epoch": 2,
        "rank": 0,
        "world": 1,
        "workers": 0,
        "pin_memory": False,
        "on_error": "skip",
        "view": VIEW,
        **changes,
    }
    return train_loader(LoaderSpec(source=source, **options), start_update, stop_update)


def evaluate(source: SyntheticImages, **changes: Any) -> Stream:
    options = {"micro_batch": 4, "rank": 0, "world": 1, "workers": 0, "pin_memory": False, **changes}
    return eval_loader(EvalSpec(source=source, view=VIEW, **options))


def workers_of_this_test() -> set[int]:
    """Return the ids of processes, and the negative ids of threads."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    processes = {int(child) for child in children.read_text().split()} if children.exists() else set()
    return processes | {-(thread.ident or 0) for thread in threading.enumerate()}


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.bad == b.bad
        for a, b in zip(first, second, strict=True)
    )


def joined(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def expected_view(source: SyntheticImages, sample: int, epoch: int, slot_of: int | None = None) -> torch.Tensor:
    """Compute the training view from its definition: Philox numbers of the slot's sample id."""
    uniforms = sample_uniforms(7, epoch, sample if slot_of is None else slot_of, UNIFORMS).tolist()
    view = decode(source.pixels(sample), partial(VIEW.train, uniforms=uniforms), SIZE)
    return torch.tensor(view).permute(2, 0, 1)


def test_a_stream_follows_the_order_and_augments_by_sample_id() -> None:
    source = SyntheticImages(23)
    batches = list(train(source))
    assert [len(b.labels) for b in batches] == [8, 2] * 5
    images, labels = joined(batches)
    expected = [(epoch, s) for epoch in range(3) for s in epoch_order(7, epoch, 23)[:20].tolist()][:50]
    assert labels.tolist() == [10 * sample for _, sample in expected]
    for image, (epoch, sample) in zip(images, expected, strict=True):
        assert torch.equal(image, expected_view(source, sample, epoch))
    assert all(b.bad == () for b in batches)


def test_batches_are_uint8_channels_last_and_int64() -> None:
    for batch in [
        next(train(SyntheticImages(23))),
        next(evaluate(SyntheticImages(23))),
        next(train(SyntheticImages(23), workers=1)),
    ]:
        assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)
        assert batch.images.shape[1:] == (3, SIZE, SIZE)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoded", [False, True])
def test_batches_do_not_depend_on_the_workers(encoded: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "PIECE", 3)  # several workers in a micro-batch of 8
    source = SyntheticImages(23, encoded, empty={3, 4}, missing={11})
    own = {"auto": AutoAugment(TRIVIAL)} if encoded else {}
    alone = list(train(source, **own))
    assert any(b.bad for b in alone)
    assert same(alone, list(train(source))) != encoded
    assert same(alone, list(train(source, workers=2, kind=kind, **own)))
    assert same(list(evaluate(source)), list(evaluate(source, workers=3, kind=kind)))
    monkeypatch.setattr(stream_module, "PIECE", 100)
    assert same(alone, list(train(source, **own)))


@pytest.mark.parametrize("view", [GROWING, SHRINKING], ids=["growing", "shrinking"])
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_the_size_changes_where_an_epoch_begins(kind: str, view: View) -> None:
    source = SyntheticImages(23)
    options: dict[str, Any] = {"workers": 0} if kind == "none" else {"workers": 2, "kind": kind}
    assert view.sizes is not None
    first, second = (list(train(source, view=replace(VIEW, size=size))) for size in (view.sizes.start, view.sizes.end))
    # Two updates in an epoch, two micro-batches in an update.
    expected = first[:4] + second[4:]
    batches = list(train(source, view=view, **options))
    assert [b.images.shape[-1] for b in batches] == [view.sizes.start] * 4 + [view.sizes.end] * 6
    assert same(batches, expected)
    for start in (1, 2, 3):
        assert same(list(train(source, start, view=view, **options)), expected[2 * start :])
    stream, buffers = train(source, 0, 40, view=view, **options), set()
    for batch in stream:
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        buffers.add(batch.images.data_ptr())
        del batch
    # No batch was a copy.
    assert len(buffers) <= stream_module.pool_slots(8, int(options["workers"]))


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_buffer_is_reused_only_when_no_tensor_refers_to_it(kind: str) -> None:
    options = {"stop_update": 40, "workers": 0 if kind == "none" else 2, "kind": None if kind == "none" else kind}
    expected = list(train(SyntheticImages(23), stop_update=40))
    stream = train(SyntheticImages(23), **options)
    held = []
    for number, batch in enumerate(stream):
        # Hold more batches than the pool has buffers, each by a part of its images or of its labels.
        held.append((number, batch.images[:, 1:], None) if number % 2 else (number, None, batch.labels[1:]))
        if number % 20 == 19:
            time.sleep(0.02)  # enough time to fill all free buffers
            for held_number, images, labels in held:
                if images is not None:
                    assert torch.equal(images, expected[held_number].images[:, 1:])
                if labels is not None:
                    assert torch.equal(labels, expected[held_number].labels[1:])
            held.clear()
        del batch
    assert number == 79
    stream = train(SyntheticImages(23), **options)
    slots = stream_module.pool_slots(8, int(options["workers"] or 0))
    assert len({next(stream).images.data_ptr() for _ in range(80)}) <= slots
    assert slots == (4 if kind == "none" else 8)


def test_a_pool_holds_about_two_pieces_per_worker() -> None:
    for batch in (1, 8, 32, 100, 256, 2048, 50_000):
        for count in (1, 2, 16, 64, 128):
            filled = stream_module.pool_slots(batch, count) - stream_module.LENT
            pieces = -(-batch // stream_module.piece_size(batch))
            # The consumer waits for one of the buffers.
            assert (filled - 1) * pieces >= 2 * count or filled == stream_module.AHEAD
            assert (filled - 2) * pieces < 2 * count or filled == stream_module.AHEAD
            assert filled * pieces <= 4096  # the capacity of a pipe


@pytest.mark.parametrize(
    ("suffix", "decoder", "kind"),
    [
        ("JPEG", NATIVE, "threads"),
        ("JPEG", PILLOW, KINDS[0]),
        ("png", NATIVE, KINDS[0]),
    ],
)
def test_threads_are_used_if_the_decoder_releases_the_gil(suffix: str, decoder: str, kind: str) -> None:
    source = SyntheticImages(5)
    source.name = lambda sample: f"class/{sample}.{suffix}"  # type: ignore[method-assign]
    assert stream_module.worker_kind(source, decoder) == kind


@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_a_stream_can_start_at_a_later_update(start: int) -> None:
    source = SyntheticImages(23, empty={5})
    assert same(list(train(source))[2 * start :], list(train(source, start_update=start)))


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("ghosts_per_micro", [1, 3])
def test_all_ranks_together_get_the_batches_of_a_single_rank(world: int, ghosts_per_micro: int) -> None:
    source = SyntheticImages(23, empty={5})
    whole = list(train(source, stop_update=1))
    parts = [
        batch
        for rank in range(world)
        for batch in train(source, stop_update=1, world=world, rank=rank, ghosts_per_micro=ghosts_per_micro)
    ]
    for one, other in zip(joined(whole), joined(parts), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_mixes_depend_on_update_and_ghost_batch_not_on_ranks(world: int) -> None:
    mixing = Mixing(0.2, 1.0, 7)
    start = 3  # in the second epoch, as after a resume or a rollback
    batches = [
        batch
        for rank in range(world)
        for batch in train(SyntheticImages(23), start, start + 1, world=world, rank=rank, mixing=mixing)
    ]
    assert [mix.stop - mix.start for batch in batches for mix in batch.mixes] == [4, 4, 2]
    assert [mix[2:] for batch in batches for mix in batch.mixes] == [mix[2:] for mix in mixing.draw(1, 3, (0, 10), 4)]


def test_the_next_good_sample_replaces_a_bad_image() -> None:
    source = SyntheticImages(20, empty={18, 19}, missing={0})
    batches = list(train(source, stop_update=2))
    images, labels = joined(batches)
    order = epoch_order(7, 0, 20).tolist()
    for slot in map(order.index, (18, 19, 0)):
        assert labels[slot] == 10  # the label of sample 1, which follows 18, 19 and 0
        assert torch.equal(images[slot], expected_view(source, 1, 0, slot_of=order[slot]))
    empty, missing = "the file is empty", "No such file or directory"
    reasons = {18: empty, 19: empty, 0: missing}
    tried = {18: [18, 19, 0], 19: [19, 0], 0: [0]}
    expected = [BadSample(bad, f"/data/class/{bad}.png", reasons[bad]) for slot in order for bad in tried.get(slot, [])]
    assert [bad for b in batches for bad in b.bad] == expected


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("damage", "reason"), [("empty", "the file is empty"), ("missing", "No such file")])
def test_on_error_fail_reports_file_and_reason_in_one_line(workers: int, damage: str, reason: str) -> None:
    source = SyntheticImages(20, empty={6}) if damage == "empty" else SyntheticImages(20, missing={6})
    stream = train(source, on_error="fail", workers=workers)
    with pytest.raises(DataError, match=f"^/data/class/6.png: {reason}.*data.on_error=skip") as caught:
        list(stream)
    assert "\n" not in str(caught.value)
    assert next(stream, None) is None


def test_batches_before_a_failure_still_arrive() -> None:
    first, second = (epoch_order(7, epoch, 23).tolist() for epoch in (0, 1))
    unlucky = next(sample for sample in first[20:] if sample in second[:20])
    place = second.index(unlucky)
    good = list(train(SyntheticImages(23)))[: 4 + 2 * (place // 10) + (place % 10 >= 8)]
    stream = train(SyntheticImages(23, empty={unlucky}), on_error="fail", workers=2)
    assert same(good, [next(stream) for _ in good])
    with pytest.raises(DataError, match=f"class/{unlucky}.png"):
        next(stream)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_without_a_readable_image_ends_the_run(workers: int) -> None:
    source = SyntheticImages(20, missing=set(range(20)))
    with pytest.raises(DataError, match=r"last of 20 samples in a row .* data\.root"):
        next(train(source, workers=workers))


def test_a_thousand_bad_samples_in_a_row_end_the_run() -> None:
    source = SyntheticImages(1200, empty=set(range(1200)) - {int(epoch_order(7, 0, 1200)[0])})
    with pytest.raises(DataError, match="last of 1000 samples in a row"):
        list(train(source, updates_per_epoch=100, stop_update=100))


@pytest.mark.parametrize("world", [1, 2, 7, 13])
def test_evaluation_returns_every_sample_once_in_order(world: int) -> None:
    source = SyntheticImages(11)
    batches = [b for rank in range(world) for b in evaluate(source, world=world, rank=rank)]
    images, labels = joined(batches)
    assert labels.tolist() == source.labels.tolist()
    assert all(len(b.labels) <= 4 for b in batches)
    for sample, image in enumerate(images):
        view = decode(source.pixels(sample), VIEW.evaluate, SIZE)
        assert torch.equal(image, torch.tensor(view).permute(2, 0, 1))


def test_evaluation_keeps_the_place_of_a_bad_image() -> None:
    batches = list(evaluate(SyntheticImages(11, empty={2}, missing={9})))
    images, labels = joined(batches)
    assert labels.tolist() == [0, 10, -1, 30, 40, 50, 60, 70, 80, -1, 100]
    assert [int(image.max()) == 0 for image in images] == [s in {2, 9} for s in range(11)]
    assert [b.bad for b in batches] == [
        (BadSample(2, "/data/class/2.png", "the file is empty"),),
        (),
        (BadSample(9, "/data/class/9.png", "No such file or directory"),),
    ]


@forked
@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "was killed by SIGKILL; .* memory runs out"), (signal.SIGTRAP, "was killed by SIGTRAP: a fault")],
)
def test_a_killed_worker_ends_the_stream_with_the_reason(number: int, reason: str) -> None:
    def die(sample: int) -> None:
        if sample == 6:
            os.kill(os.getpid(), number)

    before = workers_of_this_test()
    stream = train(SyntheticImages(20, on_read=die), workers=2)
    with pytest.raises(DataError, match=rf"^a loader worker \(process \d+\) {reason}"):
        list(stream)
    assert workers_of_this_test() == before
    assert next(stream, None) is None


@forked
def test_killed_idle_workers_end_the_stream_with_the_reason() -> None:
    before = workers_of_this_test()
    stream = train(SyntheticImages(23), workers=2, stop_update=10_000)
    next(stream)
    for worker in workers_of_this_test() - before:
        os.kill(worker, signal.SIGKILL)
    with pytest.raises(DataError, match="was killed by SIGKILL"):
        list(stream)


def runs_out_of_memory(sample: int) -> None:
    if sample == 6:
        raise MemoryError


def breaks(sample: int) -> None:
    if sample == 6:
        raise ZeroDivisionError("in the source")


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_a_worker_ends_the_stream(kind: str) -> None:
    before = workers_of_this_test()
    with pytest.raises(DataError, match=r"a loader worker ran out of memory; reduce data\.workers"):
        list(train(SyntheticImages(20, on_read=runs_out_of_memory), workers=2, kind=kind))
    with pytest.raises((ZeroDivisionError, RuntimeError), match="in the source"):
        list(train(SyntheticImages(20, on_read=breaks), workers=2, kind=kind))
    assert workers_of_this_test() == before


def require_ignored_signals(sample: int) -> None:
    if any(signal.getsignal(number) is not signal.SIG_IGN for number in TERMINATION_SIGNALS):
        raise FileNotFoundError(2, "a worker that Ctrl-C would end")


@forked
def test_forked_workers_ignore_termination_signals() -> None:
    stream = train(SyntheticImages(20, on_read=require_ignored_signals), workers=1, on_error="fail")
    assert len(list(stream)) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_close_ends_the_workers_and_the_stream(kind: str) -> None:
    before = workers_of_this_test()
    stream = train(SyntheticImages(23), workers=2, stop_update=10_000, kind=kind)
    next(stream)
    assert len(workers_of_this_test() - before) == 2
    stream.close()
    stream.close()
    assert workers_of_this_test() == before
    assert next(stream, None) is None


@pytest.mark.parametrize("kind", KINDS)
def test_exhausted_and_deleted_streams_have_no_workers(kind: str) -> None:
    before = workers_of_this_test()
    stream = train(SyntheticImages(23), workers=2, kind=kind)
    assert len(list(stream)) == 10
    assert workers_of_this_test() == before
    forgotten = train(SyntheticImages(23), workers=2, kind=kind)
    next(forgotten)
    del forgotten
    gc.collect()
    assert workers_of_this_test() == before


@forked
def test_workers_end_when_their_parent_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_CHECK_S", 0.1)
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        stream = train(SyntheticImages(23), workers=2, stop_update=10_000)
        next(stream)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(write)
    os.waitpid(parent, 0)
    # The workers hold the other end. If they do not end, the test times out.
    assert os.read(read, 1) == b""
    os.close(read)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_unchanged(workers: int) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    list(train(SyntheticImages(23), workers=workers))
    list(evaluate(SyntheticImages(23), workers=workers))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == pickle.dumps(np.random.get_state())


def test_a_stream_computes_the_order_of_each_epoch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []

    def recorded(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
        epochs.append(epoch)
        return epoch_order(seed, epoch, count)

    monkeypatch.setattr("lars_train.data.loading.loader.epoch_order", recorded)
    stream = train(SyntheticImages(23))
    assert epochs == []
    list(stream)
    assert epochs == [0, 1, 2]


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_statistics_cover_the_batches_since_the_last_call(kind: str) -> None:
    def slow(sample: int) -> None:
        time.sleep(0.001)

    workers, of_kind = (0, None) if kind == "none" else (2, kind)
    stream = train(SyntheticImages(23, on_read=slow), workers=workers, kind=of_kind, stop_update=2)
    assert stream.statistics() == (0, 0, 0)
    for images in (8, 2):
        next(stream)
        found = stream.statistics()
        assert (found.images, found.fast) == (images, 0)
        assert found.seconds >= 0.001 * images
    for _ in stream:
        pass
    assert stream.statistics().images == 10


@pytest.mark.skipif(native.jpeg is None, reason="the C decoder was not built")
def test_statistics_count_the_images_of_the_native_decoder() -> None:
    # Pillow decodes 3, 5, 7 and 8.
    stream = evaluate(MixedFiles(23), workers=2, kind="threads", decoder=NATIVE)
    assert len(list(stream)) == 6
    assert stream.statistics().fast == 19


def test_ready_returns_at_once() -> None:
    gate = threading.Event()
    stream = train(SyntheticImages(23, on_read=lambda sample: gate.wait(60) and None), workers=1, kind="threads")
    assert not stream.ready()
    gate.set()
    while not stream.ready():
        time.sleep(0.001)
    assert same([next(stream)], [next(train(SyntheticImages(23)))])
    for _ in stream:
        pass
    assert not stream.ready()
    assert not train(SyntheticImages(23)).ready()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="2 updates of 12"):
        train(SyntheticImages(23), batch=12)
    with pytest.raises(ValueError, match="'ignore'"):
        train(SyntheticImages(23), on_error="ignore")


def test_a_batch_survives_pickling() -> None:
    batch = next(train(SyntheticImages(23, empty=set(range(0, 23, 2)))))
    again = pickle.loads(pickle.dumps(batch))
    assert same([batch], [again])
    assert again.images.stride() == batch.images.stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_keep_content_and_layout(workers: int) -> None:
    source = SyntheticImages(23, empty={3})
    expected = list(train(source))
    for number, batch in enumerate(train(source, workers=workers, pin_memory=True)):
        assert batch.images.is_pinned()
        assert batch.labels.is_pinned()
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert same([batch], [expected[number]])


def test_buffers_are_page_locked_after_all_forks_until_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with a fake CUDA runtime."""
    locked: dict[int, int] = {}
    here = os.getpid()

    class Runtime:
        code = 0

        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
            assert os.getpid() == here
            assert len(workers_of_this_test() - before) == 2
            locked[address] = size
            return self.code

        def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
            del locked[address]
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    before = workers_of_this_test()
    stream = train(SyntheticImages(23), workers=2, pin_memory=True)
    batch = next(stream)
    ((address, size),) = locked.items()
    assert address <= batch.images.data_ptr() < address + size
    stream.close()
    del stream
    gc.collect()
    assert locked  # the batch still refers to them
    del batch
    gc.collect()
    assert not locked
    monkeypatch.setattr(Runtime, "code", 2)
    with pytest.warns(RuntimeWarning, match=r"could not be page-locked \(CUDA error 2\)"):
        stream = train(SyntheticImages(23), workers=2, pin_memory=True)
    assert same(list(stream), list(train(SyntheticImages(23))))
    locked.clear()


@forked
def test_worker_processes_share_the_memory_of_the_source() -> None:
    parent = os.getpid()
    source = SyntheticImages(23, on_read=lambda sample: None if os.getpid() != parent else os.abort())
    assert len(list(train(source, workers=1, stop_update=1))) == 2  # a lambda cannot be pickled


@forked
@pytest.mark.parametrize("stuck", [(0,), (1,), (0, 1)])
def test_workers_that_do_not_start_are_replaced(stuck: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(evaluate(SyntheticImages(23)))
    run, forks = workers_module._run_process, mmap.mmap(-1, 1)

    def late(*arguments: Any) -> None:
        forks[0] += 1
        if forks[0] - 1 in stuck:
            # Like a process that waits for a lock, it reacts only to SIGKILL.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        run(*arguments)

    before = workers_of_this_test()
    monkeypatch.setattr(workers_module, "_run_process", late)
    monkeypatch.setattr(workers_module, "START_S", 1.0)
    assert same(list(evaluate(SyntheticImages(23), workers=2)), expected)
    assert forks[0] == 2 + len(stuck)
    assert workers_of_this_test() == before


def test_a_failed_start_of_a_worker_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    before = workers_of_this_test()
    start, left = threading.Thread.start, [1]

    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    def start_one(thread: threading.Thread) -> None:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(thread)

    if sys.platform == "linux":
        monkeypatch.setattr(os, "fork", fork)
        with pytest.raises(DataError, match=r"cannot be started \(Resource temporarily unavailable\); .*data\.workers"):
            evaluate(SyntheticImages(23), workers=2, kind="processes")
    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(DataError, match=r"cannot be started \(can't start new thread\); .*data\.workers"):
        evaluate(SyntheticImages(23), workers=2, kind="threads")
    assert workers_of_this_test() == before


@forked
def test_workers_that_never_start_end_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    before = workers_of_this_test()
    monkeypatch.setattr(workers_module, "_run_process", lambda *arguments: time.sleep(600))
    monkeypatch.setattr(workers_module, "START_S", 0.1)
    with pytest.raises(DataError, match="2 of 2 loader workers did not start"):
        evaluate(SyntheticImages(23), workers=2)
    assert workers_of_this_test() == before


class MixedFiles(SyntheticImages):
    """JPEGs, except for a PNG, a CMYK JPEG and two truncated ones."""

    def read(self, sample: int) -> bytes:
        kind, mode = ("PNG", "RGB") if sample == 3 else ("JPEG", "CMYK" if sample == 5 else "RGB")
        coarse = Image.fromarray(np.random.default_rng(sample).integers(0, 256, (9, 11, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((90, 70 + sample)).convert(mode).save(file, kind)
        data = file.getvalue()
        return data[: len(data) - 40 * (sample in (7, 8))]


@pytest.mark.skipif(native.jpeg is None, reason="the C decoder was not built")
@pytest.mark.parametrize(("workers", "kind"), [(0, None), *((2, kind) for kind in KINDS)])
def test_both_decoders_give_the_same_batches(workers: int, kind: str | None) -> None:
    for stream in (train, evaluate):
        one, other = (
            list(stream(MixedFiles(23), workers=workers, decoder=choice, kind=kind)) for choice in (NATIVE, PILLOW)
        )
        for a, b in zip(one, other, strict=True):
            assert (a.images.int() - b.images.int()).abs().max() <= 1
            assert torch.equal(a.labels, b.labels)
            assert a.bad == b.bad
        assert {bad.sample for batch in one for bad in batch.bad} == {7, 8}


@pytest.mark.skipif(native.jpeg is None, reason="the C decoder was not built")
def test_pillow_decodes_only_what_the_native_decoder_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []
    whole = decode_module._open_image
    monkeypatch.setattr(decode_module, "_open_image", lambda data: opened.append(data) or whole(data))
    source = MixedFiles(23)
    list(evaluate(source, decoder=NATIVE))
    assert opened == [source.read(sample) for sample in (3, 5, 7, 8)]
    list(evaluate(source))
    assert len(opened) == 4 + 23
