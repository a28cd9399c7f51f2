"""The zstd dictionary of payload version 1; a part of the format, printed in docs/targets.md too.

Answers are short: of a row's few hundred symbols, a table of their frequencies would be a fifth.  The
dictionary is such a table, trained once on rows of 16 positions of the synthetic teacher in tests/benchmarks,
at ``tau`` from 1/16 to 1/1024.  A row that it does not suit gets a table of its own, by zstd itself.
"""

from __future__ import annotations

import base64

DICTIONARY = base64.b64decode(
    "N6Qw7FUNvi8+ELA0STowHFyE/gJB8EV8BdFHjFcQ6gT61lIpx3xkW7PW7ABmHd82QkhrbQPw0baRvTchZAOQ+21LmZLchASjALi4"
    "PCCq4rsAAAAEQKMaCPESIwQAQAgAAAAAAAAAAAAAAAAAAAAAAACkxEVkYyNDwuHhgaFIIBCHB2KBiEQqk+UmAAAAAQAAAAQAAAAI"
    "AAAAB2UHBQYGBgYFBgYFBQUFBQUHBgYGBwYGBgYGBQYGBgYEBQUFBAMEBAQEBAMDAwMDBwcHBgcHBwcGBgUGBgYGBgUFJAEFBQUF"
    "BQQEBAQEBAQIBgcHBwcHBwcHBgYGBgcHBgUGBgUGBg=="
)
