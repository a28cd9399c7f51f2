"""Hard conditions by chance: kills, damage, hostile files, small disks, unreliable storage; ``make torture``.

A campaign makes cases from a seed.  Each case ends in one of five ways: a clear error, the right result, something
lost, something wrong, or a hang.  The last three are failures, and one command repeats them.
"""
