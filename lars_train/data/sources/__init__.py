"""Sources of images: folders, zips, tar shards, URLs, embedded and downloaded sets. Each makes a `Dataset`."""
