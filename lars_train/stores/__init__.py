"""Stores: folders of pictures packed into tar shards, verified, described. What ``lars-data`` does."""
