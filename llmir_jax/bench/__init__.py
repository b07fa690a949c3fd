"""Measuring how fast decoders are, beside other programs on the same machine and the same weights.

What `llmir bench` prints; `cli/bench.py` is its command. One process is timed at a time: ours, then each baseline,
then ours again. `baselines/protocol.py` has the definitions of all that is measured, which are the same for everyone.
"""
