"""What a step costs: ours, its floor and its peers on one model, batch and machine.

    settings ──► workload (model, batch, loss) ──► contenders ──► timing, memory ──► rows ──► report

`zotune bench step | noise | memory | roofline` are the modules of those names.
"""
