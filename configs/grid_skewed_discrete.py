# python factorize.py configs/grid_skewed_discrete.py
# strategies of unequal shares, which nothing tells
base = "configs/grid_skewed_base.py"
n_latents = 3
