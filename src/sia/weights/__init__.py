"""The weights lever: an update takes a parent adapter and a recipe, and makes a child adapter.

Nothing here imports torch until it is used: `sia.weights.recipes` is cheap, the rest needs the
extra `train`.
"""
