"""What every capture does, whoever runs the teacher: the plan, the rows, the shards, one commit at the end.

planning    the rows that a recipe wants in its cache, and the cache's identity
opening     the cache opened, its plan and the units that are missing
targets     from a teacher's outputs to rows
units       from rows to shards
windows     examples encoded ahead of the model
loop        all of it for a loop of one's own: ``with capture(recipe, ...) as cache``
"""
