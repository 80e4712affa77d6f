# python factorize.py configs/sorting_continuous.py
base = "configs/sorting_base.py"
n_latents = 5
z_dim = 4
steps = 1400
cell_steps = 1200
batch_size = 64
