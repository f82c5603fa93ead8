"""From folders of media to batches: scanning, buckets, the cache of encoded samples, order and loading."""
