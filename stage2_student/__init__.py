"""Stage two: an FSDP2 student trains from the cache, many times.  Never imports stage one."""
