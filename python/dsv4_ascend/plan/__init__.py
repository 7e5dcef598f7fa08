"""Does V4 fit on these devices, what does it cost, which layout: estimates before anything runs.

Facts and formulas: docs/spec/planner.md. Data: devices.toml and formats.toml. Times are operator
time: kernels, exchanges and launches of one step, without a scheduler.
"""
