# python factorize.py configs/grid_routed_discrete.py
base = "configs/grid_routed_base.py"
n_latents = 3
