"""What ``lars-data`` does: pack data sets into tar shards, verify and describe them."""
