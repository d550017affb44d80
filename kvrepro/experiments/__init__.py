"""The papers' experiments: each function measures cells and returns their records.

One module a paper (``weightedkv``, ``kvmerger``, ``kvslimmer``) and ``across`` for what compares them. ``common`` is
what they share while measuring, ``tables`` what turns records into data frames and intervals. The two sides are
kept apart because a record's key covers the source of every module the measuring one imports: rewording a table must
not make a measurement stale.
"""
