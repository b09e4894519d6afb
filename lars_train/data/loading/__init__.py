"""Load batches from a `Source`: order, workers, buffers, and prefetched shards."""
