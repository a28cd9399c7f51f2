"""A model answers the prompts of splits, and its answers become a data set of their own.

plan        who writes what, how; the units; the folder from the first batch to the last file
journal     answers of a unit that is not finished, batch by batch
tables      a unit's answers as rows of Parquet, in the columns of the recipe
files       from journals to files, and the set as a whole
copies      ranks that hold one copy of the model together
loop        all of it, for whichever stage has the model
"""
