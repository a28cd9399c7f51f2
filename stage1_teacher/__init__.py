"""Stage one: a frozen teacher writes sparse targets into a cache, once.  Never imports stage two."""
