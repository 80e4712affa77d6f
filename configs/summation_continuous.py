# python factorize.py configs/summation_continuous.py
base = "configs/summation_base.py"
n_latents = 3
z_dim = 4
batch_size = 64
