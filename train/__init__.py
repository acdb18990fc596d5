"""Training; installed as `gsa_jax.train`.

    config.py       recipes, their options and presets
    loop.py         the loop that all recipes share; read this first
    recipes.py      where a run starts, what it trains, by which objective
    objectives.py   cross-entropy and distances from the exact model
    step.py         one optimiser step; optimizer.py its optax chain
    data.py         text as rows of tokens, through grain
    checkpoints.py  saved states of a run; run_folder.py everything else in its folder
    evaluator.py    held-out text during training; metrics.py, plot.py what a run reports
    memory.py       how much memory a step takes on each device

May be changed here: this map.
"""
