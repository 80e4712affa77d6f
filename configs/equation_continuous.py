# python factorize.py configs/equation_continuous.py
base = "configs/equation_base.py"
n_latents = 3
z_dim = 4
batch_size = 64
