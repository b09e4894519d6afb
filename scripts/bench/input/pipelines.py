"""Peers of bench_input.py that are whole pipelines: DALI, tf.data and turboloader, with one thread each.

DALI and tf.data receive batches of bytes and boxes, as from their own loaders; turboloader reads a tar itself and draws
its own crops.
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
from contenders import BATCH, SIZE, TRAIN, Contender, draws, size_of, window
from images import read

from lars_train.data.dataset import Source

Pixels = npt.NDArray[np.uint8]


def batches(task: str, images: Source, number: int) -> Iterator[list[tuple[bytes, tuple[int, int, int, int], bool]]]:
    """Yield batches of bytes, box (left, top, right, bottom), and True for a mirrored view."""
    batch = []
    for data, draw in draws(task, images, number):
        view = draw(*size_of(data))
        batch.append((data, window(view), view.flip))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def dali(name: str) -> Contender:
    """Return DALI's decoder of regions with our boxes (image_random_crop would draw its own)."""
    from nvidia.dali import Pipeline, fn, types

    pipe = Pipeline(BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipe:
        inputs = ("data", "start", "shape", "flip")
        data, start, shape, flip = (fn.external_source(name=one, device="cpu") for one in inputs)
        how = {"axes": [0, 1], "output_type": types.RGB, "adjust_orientation": False}
        pixels = fn.decoders.image_slice(data, start=start, shape=shape, **how)
        how = {"interp_type": types.INTERP_LINEAR, "antialias": True, "device": "cpu"}
        pipe.set_outputs(fn.flip(fn.resize(pixels, resize_x=SIZE, resize_y=SIZE, **how), horizontal=flip))
    pipe.build()

    def views(task: str, images: Source, number: int) -> Iterator[Pixels]:
        for batch in batches(task, images, number):
            boxes = np.array([box for _, box, _ in batch], np.int32)
            starts, ends = boxes[:, [1, 0]], boxes[:, [3, 2]]
            pipe.feed_input("data", [np.frombuffer(data, np.uint8) for data, _, _ in batch])
            pipe.feed_input("start", list(starts))
            pipe.feed_input("shape", list(ends - starts))
            pipe.feed_input("flip", [np.int32(flip) for _, _, flip in batch])
            (decoded,) = pipe.run()
            yield from (np.array(decoded.at(i)) for i in range(len(decoded)))

    return Contender(name, views, views)


def tensorflow(name: str) -> Contender:
    """Return tf.data with decode_and_crop_jpeg and our boxes."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    current: list[tuple[str, Source, int]] = []

    def inputs() -> Iterator[tuple[list[bytes], npt.NDArray[np.int32], list[bool]]]:
        for batch in batches(*current[-1]):
            data, boxes, flips = zip(*batch, strict=True)
            yield list(data), np.array(boxes, np.int32), list(flips)

    def view(data: Any, box: Any, flip: Any) -> Any:
        crop = tf.stack([box[1], box[0], box[3] - box[1], box[2] - box[0]])
        pixels = tf.image.decode_and_crop_jpeg(data, crop, channels=3, dct_method="INTEGER_ACCURATE")
        pixels = tf.image.resize(pixels, (SIZE, SIZE), "bilinear", antialias=True)
        pixels = tf.cast(tf.round(pixels), tf.uint8)
        return tf.cond(flip, lambda: pixels[:, ::-1], lambda: pixels)

    kinds = (([None], tf.string), ([None, 4], tf.int32), ([None], tf.bool))
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    signature = tuple(tf.TensorSpec(*kind) for kind in kinds)
    stream = tf.data.Dataset.from_generator(inputs, output_signature=signature).unbatch()
    stream = stream.map(view, num_parallel_calls=1).batch(BATCH).with_options(options)

    def views(task: str, images: Source, number: int) -> Iterator[Pixels]:
        current[:] = [(task, images, number)]
        for batch in stream.as_numpy_iterator():
            yield from batch

    return Contender(name, views, views)


def turboloader(folder: Path, name: str) -> Contender:
    """Return turboloader's fused loader to float32. It has no center crop, so it cannot evaluate."""
    from _turboloader import DirectBatchLoader

    # Keeps the images alive, so that no others get their id.
    loaders: dict[int, tuple[Source, Any]] = {}
    batch = np.empty((BATCH, SIZE, SIZE, 3), np.float32)

    def loader(images: Source) -> Any:
        if id(images) not in loaders:
            path = folder / f"turboloader-{len(loaders)}.tar"
            with tarfile.open(path, "w") as file:
                for sample in range(len(images)):
                    data = read(images, sample)
                    member = tarfile.TarInfo(f"{sample:06d}.jpg")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
            how = {"chw": False, "normalize_01": False, "train_aug": True, "antialias": True}
            loaders[id(images)] = images, DirectBatchLoader(str(path), SIZE, SIZE, batch_size=BATCH, **how)
        return loaders[id(images)][1]

    def views(task: str, images: Source, number: int) -> Iterator[int]:
        stream, count = loader(images), 0
        stream.begin_epoch(number)
        while (found := stream.next_batch_into(batch)) is not None:
            count += found["batch_size"]
            yield count
        if count != len(images) or stream.decode_failures():
            raise ValueError(f"{count} of {len(images)} images, {stream.decode_failures()} of them blank")

    return Contender(name, views, None, tasks=(TRAIN,))
