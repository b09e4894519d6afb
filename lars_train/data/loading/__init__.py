"""From a `Source` to batches: order, workers, buffers, and shards fetched ahead."""
