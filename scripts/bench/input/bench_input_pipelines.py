"""Peers of bench_input.py that are pipelines of their own: DALI, tf.data and turboloader, with one thread each.

DALI and tf.data get bytes and boxes a batch at a time, as their loaders would read them; turboloader reads a tar by
itself, with its own crops. Each library is imported when its peer is made, which raises ImportError or OSError where it
is not there.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench_input_contenders import BATCH, SIZE, TRAIN, Contender, drawings, read, size_of, window

from lars_train.data.dataset import Source

Part = tuple[bytes, tuple[int, int, int, int], bool]


def parts(task: str, pictures: Source, number: int) -> Iterator[list[Part]]:
    """Batches of bytes, the box (left, top, right, bottom) that becomes the view, and whether that is mirrored."""
    batch: list[Part] = []
    for data, drawn in drawings(task, pictures, number):
        view = drawn(*size_of(data))
        batch.append((data, window(view), view.flip))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def dali(folder: Path) -> Contender:
    """Its decoder of regions with the boxes given; image_random_crop is the same with boxes of its own."""
    from nvidia.dali import Pipeline, fn, types

    pipe = Pipeline(BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipe:
        names = ("data", "start", "shape", "flip")
        data, start, shape, flip = (fn.external_source(name=name, device="cpu") for name in names)
        pixels = fn.decoders.image_slice(
            data, start=start, shape=shape, axes=[0, 1], output_type=types.RGB, adjust_orientation=False
        )
        pixels = fn.resize(
            pixels, resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_LINEAR, antialias=True, device="cpu"
        )
        pipe.set_outputs(fn.flip(pixels, horizontal=flip))
    pipe.build()

    def batches(task: str, pictures: Source, number: int) -> Iterator[Any]:
        for batch in parts(task, pictures, number):
            starts = np.array([(top, left) for _, (left, top, _, _), _ in batch], np.int32)
            ends = np.array([(bottom, right) for _, (_, _, right, bottom), _ in batch], np.int32)
            pipe.feed_input("data", [np.frombuffer(data, np.uint8) for data, _, _ in batch])
            pipe.feed_input("start", list(starts))
            pipe.feed_input("shape", list(ends - starts))
            pipe.feed_input("flip", [np.int32(flip) for _, _, flip in batch])
            yield pipe.run()[0]

    def run(task: str, pictures: Source, number: int) -> None:
        for _ in batches(task, pictures, number):
            pass

    def views(task: str, pictures: Source, number: int) -> Iterator[npt.NDArray[np.uint8]]:
        for batch in batches(task, pictures, number):
            yield from (np.array(batch.at(i)) for i in range(len(batch)))

    return Contender("DALI, image_slice", run, views)


def tensorflow(folder: Path) -> Contender:
    """tf.data with decode_and_crop_jpeg, which takes the same boxes."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    asked: list[tuple[str, Source, int]] = []

    def fed() -> Iterator[tuple[list[bytes], npt.NDArray[np.int32], list[bool]]]:
        for batch in parts(*asked[-1]):
            boxes = np.array([box for _, box, _ in batch], np.int32)
            yield [data for data, _, _ in batch], boxes, [flip for _, _, flip in batch]

    def view(data: Any, box: Any, flip: Any) -> Any:
        cut = tf.stack([box[1], box[0], box[3] - box[1], box[2] - box[0]])
        pixels = tf.image.decode_and_crop_jpeg(data, cut, channels=3, dct_method="INTEGER_ACCURATE")
        pixels = tf.image.resize(pixels, (SIZE, SIZE), "bilinear", antialias=True)
        pixels = tf.cast(tf.round(pixels), tf.uint8)
        return tf.cond(flip, lambda: pixels[:, ::-1], lambda: pixels)

    signature = (
        tf.TensorSpec([None], tf.string),
        tf.TensorSpec([None, 4], tf.int32),
        tf.TensorSpec([None], tf.bool),
    )
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    stream = tf.data.Dataset.from_generator(fed, output_signature=signature).unbatch()
    stream = stream.map(view, num_parallel_calls=1).batch(BATCH).with_options(options)

    def batches(task: str, pictures: Source, number: int) -> Iterator[npt.NDArray[np.uint8]]:
        asked[:] = [(task, pictures, number)]
        yield from stream.as_numpy_iterator()

    def run(task: str, pictures: Source, number: int) -> None:
        for _ in batches(task, pictures, number):
            pass

    def views(task: str, pictures: Source, number: int) -> Iterator[npt.NDArray[np.uint8]]:
        for batch in batches(task, pictures, number):
            yield from batch

    return Contender("tf.data, decode_and_crop_jpeg", run, views)


def turboloader(folder: Path) -> Contender:
    """Its fused loader, to float32 and for training alone; it has no cut of the centre."""
    from _turboloader import DirectBatchLoader

    # Pictures are kept, so that no other ones get their id.
    loaders: dict[int, tuple[Source, Any]] = {}
    batch = np.empty((BATCH, SIZE, SIZE, 3), np.float32)

    def loader(pictures: Source) -> Any:
        if id(pictures) not in loaders:
            path = folder / f"turboloader-{len(loaders)}.tar"
            with tarfile.open(path, "w") as file:
                for sample in range(len(pictures)):
                    data = read(pictures, sample)
                    member = tarfile.TarInfo(f"{sample:06d}.jpg")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
            how = {"chw": False, "normalize_01": False, "train_aug": True, "antialias": True}
            loaders[id(pictures)] = pictures, DirectBatchLoader(str(path), SIZE, SIZE, batch_size=BATCH, **how)
        return loaders[id(pictures)][1]

    def run(task: str, pictures: Source, number: int) -> None:
        stream = loader(pictures)
        stream.begin_epoch(number)
        count = 0
        while (found := stream.next_batch_into(batch)) is not None:
            count += found["batch_size"]
        if count != len(pictures) or stream.decode_failures():
            raise ValueError(f"{count} of {len(pictures)} pictures, {stream.decode_failures()} of them blank")

    return Contender("turboloader, fused", run, None, tasks=(TRAIN,))
