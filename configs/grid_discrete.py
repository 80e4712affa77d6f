# python factorize.py configs/grid_discrete.py
base = "configs/grid_base.py"
n_latents = 3
