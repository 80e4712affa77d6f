# python factorize.py configs/grid_continuous.py
base = "configs/grid_base.py"
n_latents = 3
z_dim = 4
batch_size = 64
