"""Where images lie: folders, zips, tar shards, URLs, the embedded set. Each makes a `Dataset`."""
