"""Open images as a `Dataset`: from folders, zips, tar shards, URLs, and embedded, downloaded or synthetic data sets."""
