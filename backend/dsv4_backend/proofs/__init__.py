"""Per operator family: parity cases, the oracle and named faults.
A module is loaded when its proof is asked for.

An oracle is written from docs and spec/v4.md in NumPy, without a look at the reference and without
torch's casts.
"""
