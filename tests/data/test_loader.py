from __future__ import annotations

import io
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from lars_train.data import decode as decode_module
from lars_train.data import loader, native
from lars_train.data.augment import UNIFORMS, eval_geometry
from lars_train.data.decode import decode
from lars_train.data.loader import BadSample, Batch, Stream, View, eval_loader, train_loader
from lars_train.data.order import epoch_order, sample_uniforms
from lars_train.errors import DataError

SIZE = 12
VIEW = View("pad_crop", SIZE, True, 2, 1.0)


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@dataclass
class Pictures:
    """A source in memory: sample i is noise drawn from i, its label 10 * i; some samples are damaged."""

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

    def where(self, sample: int) -> str:
        return f"/data/class/{sample}.png"

    def pixels(self, sample: int) -> npt.NDArray[np.uint8]:
        return np.random.default_rng(sample).integers(1, 256, (SIZE, SIZE, 3), dtype=np.uint8)

    def read(self, sample: int) -> bytes | npt.NDArray[np.uint8]:
        if self.on_read:
            self.on_read(sample)
        if sample in self.missing:
            raise FileNotFoundError(2, "No such file or directory", self.where(sample))
        if sample in self.empty:
            return b""
        if not self.encoded:
            return self.pixels(sample)
        file = io.BytesIO()
        Image.fromarray(self.pixels(sample)).save(file, "PNG")
        return file.getvalue()


def train(source: Pictures, **changes: Any) -> Stream:
    options = {
        "seed": 7,
        "batch": 10,
        "ghost_batch": 4,
        "ghosts_per_micro": 2,
        "updates_per_epoch": 2,
        "start_update": 0,
        "stop_update": 5,
        "rank": 0,
        "world": 1,
        "workers": 0,
        "pin_memory": False,
        "on_error": "skip",
        **changes,
    }
    return train_loader(source, VIEW, **options)


def evaluate(source: Pictures, **changes: Any) -> Stream:
    options = {"micro_batch": 4, "rank": 0, "world": 1, "workers": 0, "pin_memory": False, **changes}
    return eval_loader(source, VIEW, **options)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.bad == b.bad
        for a, b in zip(first, second, strict=True)
    )


def joined(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def picture(source: Pictures, sample: int, epoch: int, slot_of: int | None = None) -> torch.Tensor:
    """The training view computed from its definition: Philox numbers of the slot's sample id."""
    uniforms = sample_uniforms(7, epoch, sample if slot_of is None else slot_of, UNIFORMS).tolist()
    view = decode(source.pixels(sample), partial(VIEW.train, uniforms=uniforms), SIZE)
    return torch.tensor(view).permute(2, 0, 1)


def test_stream_is_the_order_cut_into_micro_batches_and_augmented_by_sample_id() -> None:
    source = Pictures(23)
    batches = list(train(source))
    assert [len(b.labels) for b in batches] == [8, 2] * 5
    images, labels = joined(batches)
    expected = [(epoch, s) for epoch in range(3) for s in epoch_order(7, epoch, 23)[:20].tolist()][:50]
    assert labels.tolist() == [10 * sample for _, sample in expected]
    for image, (epoch, sample) in zip(images, expected, strict=True):
        assert torch.equal(image, picture(source, sample, epoch))
    assert all(b.bad == () for b in batches)


def test_batches_are_uint8_channels_last_and_int64() -> None:
    for batch in [
        next(train(Pictures(23))),
        next(evaluate(Pictures(23))),
        next(train(Pictures(23), workers=1)),
    ]:
        assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)
        assert batch.images.shape[1:] == (3, SIZE, SIZE)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("encoded", [False, True])
def test_order_and_content_do_not_depend_on_the_number_of_workers(encoded: bool) -> None:
    source = Pictures(23, encoded, empty={3, 4}, missing={11})
    alone = list(train(source))
    assert any(b.bad for b in alone)
    assert same(alone, list(train(source, workers=2)))
    assert same(list(evaluate(source)), list(evaluate(source, workers=3)))


@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_stream_from_a_later_update_is_the_tail_of_the_whole(start: int) -> None:
    source = Pictures(23, empty={5})
    assert same(list(train(source))[2 * start :], list(train(source, start_update=start)))


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("ghosts_per_micro", [1, 3])
def test_ranks_together_see_what_one_rank_sees(world: int, ghosts_per_micro: int) -> None:
    source = Pictures(23, empty={5})
    whole = list(train(source, stop_update=1))
    parts = [
        batch
        for rank in range(world)
        for batch in train(source, stop_update=1, world=world, rank=rank, ghosts_per_micro=ghosts_per_micro)
    ]
    for one, other in zip(joined(whole), joined(parts), strict=True):
        assert torch.equal(one, other)


def test_bad_picture_is_replaced_by_the_next_good_id_in_its_slots_augmentation() -> None:
    source = Pictures(20, empty={18, 19}, missing={0})
    batches = list(train(source, stop_update=2))
    images, labels = joined(batches)
    order = epoch_order(7, 0, 20).tolist()
    for slot in map(order.index, (18, 19, 0)):
        assert labels[slot] == 10  # the label of sample 1, which follows 18, 19 and 0
        assert torch.equal(images[slot], picture(source, 1, 0, slot_of=order[slot]))
    empty, missing = "the file is empty", "No such file or directory"
    reasons = {18: empty, 19: empty, 0: missing}
    met = {18: [18, 19, 0], 19: [19, 0], 0: [0]}
    expected = [BadSample(bad, f"/data/class/{bad}.png", reasons[bad]) for slot in order for bad in met.get(slot, [])]
    assert [bad for b in batches for bad in b.bad] == expected


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("damage", "reason"), [("empty", "the file is empty"), ("missing", "No such file")])
def test_failing_policy_names_file_and_reason_in_one_line(workers: int, damage: str, reason: str) -> None:
    source = Pictures(20, empty={6}) if damage == "empty" else Pictures(20, missing={6})
    stream = train(source, on_error="fail", workers=workers)
    with pytest.raises(DataError, match=f"^/data/class/6.png: {reason}.*data.on_error=skip") as caught:
        list(stream)
    assert "\n" not in str(caught.value)
    assert next(stream, None) is None


def test_batches_before_a_failure_still_arrive() -> None:
    first, second = (epoch_order(7, epoch, 23).tolist() for epoch in (0, 1))
    unlucky = next(sample for sample in first[20:] if sample in second[:20])
    place = second.index(unlucky)
    good = list(train(Pictures(23)))[: 4 + 2 * (place // 10) + (place % 10 >= 8)]
    stream = train(Pictures(23, empty={unlucky}), on_error="fail", workers=2)
    assert same(good, [next(stream) for _ in good])
    with pytest.raises(DataError, match=f"class/{unlucky}.png"):
        next(stream)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_set_without_a_readable_picture_ends_the_run(workers: int) -> None:
    source = Pictures(20, missing=set(range(20)))
    with pytest.raises(DataError, match=r"last of 20 samples in a row .* data\.root"):
        next(train(source, workers=workers))


def test_a_thousand_bad_neighbours_in_a_row_end_the_run() -> None:
    source = Pictures(1200, empty=set(range(1200)) - {int(epoch_order(7, 0, 1200)[0])})
    with pytest.raises(DataError, match="last of 1000 samples in a row"):
        list(train(source, updates_per_epoch=100, stop_update=100))


@pytest.mark.parametrize("world", [1, 2, 7, 13])
def test_evaluation_shows_every_sample_once_in_order(world: int) -> None:
    source = Pictures(11)
    batches = [b for rank in range(world) for b in evaluate(source, world=world, rank=rank)]
    images, labels = joined(batches)
    assert labels.tolist() == source.labels.tolist()
    assert all(len(b.labels) <= 4 for b in batches)
    for sample, image in enumerate(images):
        view = decode(source.pixels(sample), partial(eval_geometry, size=SIZE, eval_crop=1.0), SIZE)
        assert torch.equal(image, torch.tensor(view).permute(2, 0, 1))


def test_evaluation_keeps_the_place_of_a_bad_picture() -> None:
    batches = list(evaluate(Pictures(11, empty={2}, missing={9})))
    images, labels = joined(batches)
    assert labels.tolist() == [0, 10, -1, 30, 40, 50, 60, 70, 80, -1, 100]
    assert [int(image.max()) == 0 for image in images] == [s in {2, 9} for s in range(11)]
    assert [b.bad for b in batches] == [
        (BadSample(2, "/data/class/2.png", "the file is empty"),),
        (),
        (BadSample(9, "/data/class/9.png", "No such file or directory"),),
    ]


def die(sample: int) -> None:
    if sample == 6:
        os.kill(os.getpid(), signal.SIGKILL)


def test_dead_worker_raises_instead_of_hanging() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="worker"):
        list(train(Pictures(20, on_read=die), workers=2))
    assert time.monotonic() - started < 15


def ask_threads_and_interrupts(sample: int) -> None:
    if torch.get_num_threads() != 1 or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        raise FileNotFoundError(2, "a worker with many threads, or that Ctrl-C would end")


def test_workers_use_one_thread_and_leave_interrupts_to_the_parent() -> None:
    assert len(list(train(Pictures(20, on_read=ask_threads_and_interrupts), workers=1, on_error="fail"))) == 10


def test_close_ends_the_workers_and_the_stream() -> None:
    before = set(multiprocessing.active_children())
    stream = train(Pictures(23), workers=2, stop_update=10_000)
    next(stream)
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()
    stream.close()
    assert set(multiprocessing.active_children()) <= before
    assert next(stream, None) is None


def test_exhausted_stream_has_no_workers() -> None:
    before = set(multiprocessing.active_children())
    stream = train(Pictures(23), workers=2)
    assert len(list(stream)) == 10
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_left_alone(workers: int) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    list(train(Pictures(23), workers=workers))
    list(evaluate(Pictures(23), workers=workers))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == pickle.dumps(np.random.get_state())


def test_stream_computes_each_epochs_order_once(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []

    def counted(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
        epochs.append(epoch)
        return epoch_order(seed, epoch, count)

    monkeypatch.setattr("lars_train.data.loader.epoch_order", counted)
    stream = train(Pictures(23))
    assert epochs == []
    list(stream)
    assert epochs == [0, 1, 2]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="2 updates of 12"):
        train(Pictures(23), batch=12)
    with pytest.raises(ValueError, match="'ignore'"):
        train(Pictures(23), on_error="ignore")


def test_batch_survives_pickling() -> None:
    batch = next(train(Pictures(23, empty=set(range(0, 23, 2)))))
    again = pickle.loads(pickle.dumps(batch))
    assert same([batch], [again])
    assert again.images.stride() == batch.images.stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_keep_content_and_layout(workers: int) -> None:
    source = Pictures(23, empty={3})
    pinned = list(train(source, workers=workers, pin_memory=True))
    assert all(b.images.is_pinned() and b.labels.is_pinned() for b in pinned)
    assert all(b.images.is_contiguous(memory_format=torch.channels_last) for b in pinned)
    assert same(list(train(source)), pinned)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_workers_are_forked_so_that_they_share_the_sources_memory() -> None:
    parent = os.getpid()
    source = Pictures(23, on_read=lambda sample: None if os.getpid() != parent else os.abort())
    assert len(list(train(source, workers=1, stop_update=1))) == 2  # a lambda cannot be pickled


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
@pytest.mark.parametrize("stuck", [(0,), (1,), (0, 1)])
def test_workers_that_never_begin_are_replaced(stuck: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(evaluate(Pictures(23)))
    begin, tries = loader._begin, mmap.mmap(-1, 2)

    def late(begun: mmap.mmap, worker: int) -> None:
        tries[worker] += 1
        if worker in stuck and tries[worker] == 1:
            # As a process that waits on a lock does, it takes no signal but SIGKILL.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        begin(begun, worker)

    monkeypatch.setattr(loader, "_begin", late)
    monkeypatch.setattr(loader, "_BEGIN_S", 1.0)
    assert same(list(evaluate(Pictures(23), workers=2)), expected)
    assert tries[stuck[0]] == 2
    assert not multiprocessing.active_children()


class Photographs(Pictures):
    """JPEGs, among them a PNG, a CMYK one and some that are cut short."""

    def read(self, sample: int) -> bytes:
        kind, mode = ("PNG", "RGB") if sample == 3 else ("JPEG", "CMYK" if sample == 5 else "RGB")
        coarse = Image.fromarray(np.random.default_rng(sample).integers(0, 256, (9, 11, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((90, 70 + sample)).convert(mode).save(file, kind)
        data = file.getvalue()
        return data[: len(data) - 40 * (sample in (7, 8))]


@pytest.mark.skipif(native.jpeg is None, reason="the decoder in C was not built")
@pytest.mark.parametrize("workers", [0, 2])
def test_both_decoders_give_the_same_views_labels_and_bad_pictures(workers: int) -> None:
    for stream in (train, evaluate):
        one, other = (list(stream(Photographs(23), workers=workers, by_native=choice)) for choice in (True, False))
        for a, b in zip(one, other, strict=True):
            assert (a.images.int() - b.images.int()).abs().max() <= 1
            assert torch.equal(a.labels, b.labels)
            assert a.bad == b.bad
        assert {bad.sample for batch in one for bad in batch.bad} == {7, 8}


@pytest.mark.skipif(native.jpeg is None, reason="the decoder in C was not built")
def test_the_native_decoder_decodes_what_it_is_asked_to_and_pillow_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []
    whole = decode_module._picture
    monkeypatch.setattr(decode_module, "_picture", lambda data: opened.append(data) or whole(data))
    source = Photographs(23)
    list(evaluate(source, by_native=True))
    assert opened == [source.read(sample) for sample in (3, 5, 7, 8)]
    list(evaluate(source))
    assert len(opened) == 4 + 23
